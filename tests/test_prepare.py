import json
import struct
import time
from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, people
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from viewdiff_nb.modules.baselines import MLP
from viewdiff_nb.training.checkpoint import (
    FORMAT,
    CheckpointError,
    build_model,
    load_model,
    load_train_config,
    save_checkpoint,
    save_weights,
)
from viewdiff_nb.training.evaluation import predict

ADAPTED = replace(
    CONFIG, use_lora_attention=True, lora_targets=("attention", "feed_forward"), use_projection_layer=True
)


@pytest.fixture
def files(tmp_path):
    """One model as a checkpoint and as safetensors."""
    model = build_model(ADAPTED, 32).eval()
    torch.nn.init.normal_(model.output.weight)
    save_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "config": ADAPTED.to_dict()})
    save_weights(tmp_path / "a.safetensors", model.state_dict(), ADAPTED.to_dict())
    return model, tmp_path / "a.pth", tmp_path / "a.safetensors"


def test_a_model_comes_back_from_both_formats(files):
    model, *paths = files
    faces = people(4)
    for path in paths:
        assert torch.equal(predict(load_model(path), faces), predict(model, faces))
        assert load_train_config(path) == ADAPTED and hash(load_train_config(path)) == hash(ADAPTED)


def huge(**sizes):
    return lambda config: config | sizes


BAD = {
    "layers without end": huge(num_layers=10**6),
    "layers in words": huge(num_layers="two"),
    "no layer": huge(num_layers=-1),
    "width without end": huge(d_model=2**40, nhead=1),
    "more width than memory": huge(d_model=2**20, nhead=1, dim_feedforward=2**20),
    "another width": huge(d_model=64),
    "no width": huge(d_model=0),
    "more than 64 bits": huge(dim_feedforward=10**30),
    "a long number": huge(d_model=10**4000),
    "a long text": huge(loss="x" * 5000),
    "ranks without end": huge(rank=2**30, d_model=2**31),
    "no heads": huge(nhead=0),
    "lists": huge(d_model=[512]),
    "unknown": huge(depth=3),
    "targets in lists": huge(lora_targets=[["attention"]]),
    "not adapted": huge(use_projection_layer=False),
    "no config": lambda config: None,
    "a list": lambda config: [1],
    "a text": lambda config: "config",
}


@pytest.mark.parametrize("case", BAD)
def test_a_config_that_does_not_fit_the_weights_is_refused_at_once(files, case):
    model, *paths = files
    config = BAD[case](ADAPTED.to_dict())
    torch.save({"format": FORMAT, "model": model.state_dict(), "config": config}, paths[0])
    save_weights(paths[1], model.state_dict(), config)
    for path in paths:
        started = time.monotonic()
        with pytest.raises(CheckpointError, match=path.name) as caught:
            load_model(path)
        assert time.monotonic() - started < 5 and len(str(caught.value)) < 600


def test_weights_that_a_small_file_only_claims_are_refused(files):
    """A tensor may show one number 2**40 times; a model of that size would be built for it."""
    model, path, _ = files
    state = model.state_dict() | {"output.weight": torch.zeros(1).expand(2**20, 2**20)}
    save_checkpoint(path, {"model": state, "config": ADAPTED.to_dict()})
    with pytest.raises(CheckpointError, match="larger than the file"):
        load_model(path)


def test_another_model_is_named(files):
    _, path, other = files
    mlp = MLP(32)
    save_checkpoint(path, {"model": mlp.state_dict(), "config": ADAPTED.to_dict()})
    save_weights(other, mlp.state_dict(), ADAPTED.to_dict())
    for damaged in (path, other):
        with pytest.raises(CheckpointError, match=r"no matrix output\.weight"):
            load_model(damaged)


def test_damaged_safetensors_are_refused(files):
    _, _, path = files
    whole = path.read_bytes()
    for end in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        for load in (load_model, load_train_config):
            with pytest.raises(CheckpointError, match=r"a\.safetensors"):
                load(path)
    length = struct.unpack("<Q", whole[:8])[0]
    for header in (b"[]", b"{", b"[" * 100_000, b'{"__metadata__": 5}', b"\xff" * 9, b"9" * 5000):
        path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
        for load in (load_model, load_train_config):
            with pytest.raises(CheckpointError, match=r"a\.safetensors"):
                load(path)


def test_weights_that_are_not_finite_are_named(files):
    _, _, path = files
    with safe_open(path, "pt") as file:
        header = file.metadata()
    weights = load_file(path)
    save_file(weights | {"norm.bias": weights["norm.bias"] * float("nan")}, path, header)
    with pytest.raises(CheckpointError, match=r"not finite: 'norm\.bias'"):
        load_model(path)


def test_a_name_that_comes_twice_is_refused(files):
    """Else the second would be taken, whoever wrote it."""
    _, _, path = files
    header = (
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="the key 'w' comes twice"):
        load_model(path)


def test_a_damaged_config_in_the_header_is_refused(files):
    _, _, path = files
    weights = load_file(path)
    for config in ("{", "[" * 100_000, "9" * 5000, json.dumps({"d_model": "x" * 5000})):
        save_file(weights, path, {"format": FORMAT, "config": config})
        with pytest.raises(CheckpointError, match=r"the config in .*a\.safetensors") as caught:
            load_train_config(path)
        assert len(str(caught.value)) < 600
    save_file(weights, path, {"format": FORMAT})
    with pytest.raises(CheckpointError, match="without the config"):
        load_train_config(path)
