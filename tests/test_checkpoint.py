import json
import os
import resource
import shutil
import struct
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONFIG, people, run, sets
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from viewdiff_nb.files import PART
from viewdiff_nb.modules.baselines import MLP
from viewdiff_nb.training import checkpoint
from viewdiff_nb.training.checkpoint import (
    FORMAT,
    CheckpointError,
    DamagedCheckpoint,
    build_model,
    find_checkpoint,
    load_base_weights,
    load_checkpoint,
    load_model,
    load_train_config,
    newest_checkpoint,
    save_checkpoint,
    save_weights,
)
from viewdiff_nb.training.result import predict

CONTENT = {
    "model": {"w": torch.arange(5000.0)},
    "epoch": 4,
    "history": [{"epoch": 1, "train_loss": 0.5}],
    "order": None,
}


def test_checkpoints_are_checked_when_read(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, CONTENT)
    found = load_checkpoint(path)
    assert torch.equal(found["model"]["w"], CONTENT["model"]["w"]) and found["history"] == CONTENT["history"]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"a\.pth is truncated, damaged or no checkpoint"):
        load_checkpoint(path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="was not written by this version of the kit"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "b.pth")


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path):
    """Refused, or (in the padding of the archive) without influence; never other numbers."""
    path = tmp_path / "a.pth"
    save_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(len(whole), (200,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:
            assert torch.equal(found["model"]["w"], CONTENT["model"]["w"]) and found["epoch"] == 4, place
    assert refused > 150


@pytest.mark.parametrize("bit", [0x01, 0x10, 0x80])
def test_no_flipped_bit_of_the_table_of_contents_makes_other_numbers(tmp_path, bit):
    """Checksums do not cover it. One of its bits calls an entry a folder, and torch then reads memory as it lies."""
    path = tmp_path / "a.pth"
    save_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    for place in range(whole.index(b"PK\1\2"), len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            found = load_checkpoint(path)
        except CheckpointError:
            continue
        assert torch.equal(found["model"]["w"], CONTENT["model"]["w"]) and found["epoch"] == 4, place


def test_nothing_but_tensors_and_plain_values_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": FORMAT, "model": Trap()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="truncated, damaged or no checkpoint"):
        load_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_checkpoint(path, {"epoch": lambda: 2})  # cannot be pickled
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # the disk that ends in the middle of a file
        with pytest.raises(OSError, match=r"cannot write .*a\.pth: File too large; older files are whole"):
            save_checkpoint(path, CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_a_full_disk_is_found_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    with pytest.raises(OSError, match="0.00 GB free, and the checkpoints of this run need about .* raise save_every"):
        run(replace(CONFIG, save_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


WHOLE = {
    "best": 0.5,
    "stale": 0,
    "seconds": 1.0,
    "optimizer": {},
    "scaler": {},
    "config": {},
    "data": {},
    "trace": torch.zeros(2, 3),
    **dict.fromkeys(("generator", "torch_rng"), torch.Generator().get_state()),
}


def run_of(epoch, batch=0, **more):
    return CONTENT | WHOLE | {"epoch": epoch, "batch": batch, "steps": 10 * epoch + batch} | more


def test_the_newest_checkpoint_is_the_one_that_has_come_furthest(tmp_path):
    """A copy of a folder may give its files any times, and names say nothing about the work behind them."""
    assert newest_checkpoint(tmp_path) is None
    progress = {"a": (2, 0), "last_enhanced": (2, 7), "checkpoint_epoch_10_enhanced": (10, 0), "z": (9, 12)}
    for age, (name, (epoch, batch)) in enumerate(progress.items()):
        save_checkpoint(tmp_path / f"{name}.pth", run_of(epoch, batch))
        os.utime(tmp_path / f"{name}.pth", (1000 - age, 1000 - age))
    for name in ("checkpoint_epoch_10_enhanced", "z", "last_enhanced", "a"):
        assert find_checkpoint("auto", str(tmp_path)) == newest_checkpoint(tmp_path) == tmp_path / f"{name}.pth"
        (tmp_path / f"{name}.pth").unlink()


def test_files_that_no_run_can_go_on_from_are_passed_over(tmp_path):
    save_checkpoint(tmp_path / "a.pth", run_of(1))
    torch.save({"w": torch.ones(2)}, tmp_path / "foreign.pth")
    save_checkpoint(tmp_path / "base.pth", {"model": {"w": torch.ones(2)}})
    with pytest.warns(DamagedCheckpoint) as told:
        assert newest_checkpoint(tmp_path) == tmp_path / "a.pth"
    assert [str(warning.message).split()[2].split("/")[-1] for warning in told] == ["base.pth", "foreign.pth"]
    (tmp_path / "a.pth").write_bytes(b"PK")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be used: .*a\.pth is trunc.*base\.pth.*foreign\.pth"
    ):
        newest_checkpoint(tmp_path)


SMALLEST = [b"", b".", b"K", b"U", b"h", b"G", b"J", b"R", b"\x80", b"PK\3\4", b"PK\5\6" + bytes(18), b"[" * 1000]


@pytest.mark.parametrize("content", SMALLEST)
def test_a_damaged_last_checkpoint_is_passed_over(tmp_path, content):
    save_checkpoint(tmp_path / "checkpoint_epoch_3_enhanced.pth", run_of(3))
    (tmp_path / checkpoint.LAST).write_bytes(content)
    with pytest.warns(DamagedCheckpoint, match=checkpoint.LAST):
        assert find_checkpoint("auto", str(tmp_path)) == tmp_path / "checkpoint_epoch_3_enhanced.pth"
    with pytest.warns(DamagedCheckpoint), pytest.raises(CheckpointError, match=r"epoch_3_enhanced\.pth can be resumed"):
        find_checkpoint(str(tmp_path / checkpoint.LAST), None)


def test_damaged_numbers_of_the_last_checkpoint_are_found(tmp_path):
    """Its pickle, which says how far it has come, is whole; the tensor's bytes are not."""
    save_checkpoint(tmp_path / "a.pth", run_of(3))
    save_checkpoint(tmp_path / "b.pth", run_of(4))
    whole = (tmp_path / "b.pth").read_bytes()
    place = whole.index(struct.pack("<4f", 100, 101, 102, 103))
    (tmp_path / "b.pth").write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    with pytest.warns(DamagedCheckpoint, match=r"b\.pth is truncated, damaged"):
        assert newest_checkpoint(tmp_path) == tmp_path / "a.pth"


def repickled(path, change):
    """The checkpoint with another pickle in it; all checksums are right."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("/data.pkl") else content)


def refused(path):
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        return len(str(error)) < 500 + len(str(path))
    return False


@pytest.mark.parametrize("content", SMALLEST)
def test_a_damaged_pickle_with_right_checksums_is_refused(tmp_path, content):
    save_checkpoint(tmp_path / "a.pth", run_of(1))
    repickled(tmp_path / "a.pth", lambda _: content)
    assert refused(tmp_path / "a.pth")


def test_every_shorter_pickle_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, run_of(1))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        length = len(archive.read("archive/data.pkl"))
    for end in range(length):
        path.write_bytes(whole)
        repickled(path, lambda content, end=end: content[:end])
        assert refused(path), end


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage is deprecated")
def test_other_bytes_in_the_pickle_raise_no_other_error(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, run_of(1))
    whole, generator = path.read_bytes(), np.random.default_rng(0)

    def damage(content):
        content = bytearray(content)
        for _ in range(generator.integers(1, 4)):
            content[generator.integers(len(content))] = generator.choice(list(b".KUhGJR\x80\x8a()[]}tqXcsuQ\x00\xff"))
        return bytes(content)

    count = 0
    for _ in range(500):
        path.write_bytes(whole)
        repickled(path, damage)
        count += refused(path)  # any other error ends the test
    assert count > 300


def test_an_archive_larger_than_its_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert (tmp_path / "a.pth").stat().st_size < 20_000 and refused(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "entry",
    [
        {"epoch": "3"},
        {"epoch": True},
        {"epoch": None},
        {"history": {}},
        {"history": [1]},
        {"config": []},
        {"model": []},
        {"trace": [1.0]},
        {"data": 5},
        {"best": "1"},
    ],
)
def test_entries_of_another_type_are_refused(tmp_path, entry):
    save_checkpoint(tmp_path / "a.pth", run_of(3) | entry)
    with pytest.raises(CheckpointError, match=f"is damaged: .*{next(iter(entry))}"):
        load_checkpoint(tmp_path / "a.pth")


def test_what_a_run_leaves_behind(tmp_path):
    config = replace(
        CONFIG,
        use_lora_attention=True,
        lora_targets=("attention", "feed_forward"),
        save_every=1,
        save_dir=str(tmp_path),
    )
    (tmp_path / f"{checkpoint.LAST}.77{PART}").write_bytes(b"a run that was killed")
    result = run(config)
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock",
        checkpoint.BEST,
        checkpoint.BEST_WEIGHTS,
        "checkpoint_epoch_1_enhanced.pth",
        "checkpoint_epoch_2_enhanced.pth",
    }
    assert result.checkpoint == tmp_path / "checkpoint_epoch_2_enhanced.pth"
    _, val = sets()
    last = load_model(result.checkpoint)
    assert not last.training
    assert torch.equal(predict(last, val), predict(result.model, val))
    best = load_model(tmp_path / checkpoint.BEST_WEIGHTS)
    assert torch.equal(predict(best, val), predict(load_model(tmp_path / checkpoint.BEST), val))
    assert load_file(tmp_path / checkpoint.BEST_WEIGHTS).keys() == result.model.state_dict().keys()


def test_weights_of_a_base_in_every_format(tmp_path):
    weights = {"w": torch.ones(3)}
    save_checkpoint(tmp_path / "a.pth", {"model": weights})
    torch.save(weights, tmp_path / "b.pth")
    save_file(weights, tmp_path / "c.safetensors")
    for path in tmp_path.iterdir():
        assert torch.equal(load_base_weights(path)["w"], weights["w"])
    (tmp_path / "c.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_base_weights(tmp_path / "c.safetensors")
    torch.save(weights, tmp_path / "d.pth", _use_new_zipfile_serialization=False)  # that of old, without checksums
    with pytest.raises(CheckpointError, match=r"d\.pth is truncated, damaged or no checkpoint: .*not a zip file"):
        load_base_weights(tmp_path / "d.pth")
    save_file(weights, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="not written by this version"):
        load_model(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        torch.save([1], tmp_path / "b.pth")
        load_base_weights(tmp_path / "b.pth")


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
    weights = {name: value.clone() for name, value in load_file(path).items()}  # not of the file that is written over
    for config in ("{", "[" * 100_000, "9" * 5000, json.dumps({"d_model": "x" * 5000})):
        save_file(weights, path, {"format": FORMAT, "config": config})
        with pytest.raises(CheckpointError, match=r"the config in .*a\.safetensors") as caught:
            load_train_config(path)
        assert len(str(caught.value)) < 600
    save_file(weights, path, {"format": FORMAT})
    with pytest.raises(CheckpointError, match="without the config"):
        load_train_config(path)


def test_a_run_cannot_go_on_from_weights_alone(files):
    _, path, other = files
    for weights in (path, other):
        wanted = f"{weights.name} holds weights, but no training run .*base_model_path"
        with pytest.raises(CheckpointError, match=wanted):
            checkpoint.check_run(weights, load_checkpoint(weights))
        if weights.suffix == ".safetensors":
            with pytest.raises(CheckpointError, match=wanted):
                find_checkpoint(str(weights), None)
        else:
            assert find_checkpoint(str(weights), None) == weights
