import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIG, network_that_moves, people

from viewdiff_nb.drop_in import DropIn
from viewdiff_nb.files import read_safetensors, write_safetensors
from viewdiff_nb.metrics import yaw_bin
from viewdiff_nb.modules.adjusted import Adjusted
from viewdiff_nb.pretrained import PRETRAINED, load_drop_in, load_pretrained, save_drop_in
from viewdiff_nb.training.checkpoint import CheckpointError

RAW = (0.0, "none")
WAYS = (RAW, RAW, (0.25, "none"), (0.5, "even"), (1.0, "even"))


@pytest.fixture(scope="module")
def faces():
    return people(20, views=20)


@pytest.fixture(scope="module")
def model(faces):
    network = network_that_moves(faces.feature_dim)
    given = faces.src, faces.angles, faces.keypoints_3d, faces.front
    ways = {way: Adjusted(network if way[0] else None, *given, step=way[0], centring=way[1]) for way in WAYS}
    return DropIn.of(ways, WAYS).eval()


@pytest.fixture
def path(tmp_path, model):
    save_drop_in(tmp_path / "mine.safetensors", model, CONFIG, "a recogniser")
    return tmp_path / "mine.safetensors"


def predicted(model, faces):
    return model(faces.src, faces.angles, faces.keypoints_3d, return_residual=False)


def test_it_comes_back_but_for_half_precision(path, model, faces):
    found, recogniser = load_drop_in(path)
    assert recogniser == "a recogniser" and found.ways == WAYS and not found.training
    expected = predicted(model, faces)
    torch.testing.assert_close(predicted(found, faces), expected, atol=2e-3, rtol=0)
    assert not torch.allclose(expected, faces.src, atol=0.05)
    stored, _ = read_safetensors(path, ValueError)
    assert {value.dtype for name, value in stored.items() if name != "shift"} == {torch.float16}


def test_a_drop_in_without_a_network_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="never follows a network"):
        save_drop_in(tmp_path / "x.safetensors", DropIn(None, [RAW] * 5), CONFIG, "a recogniser")
    assert not list(tmp_path.iterdir())


def change(path, tensors=lambda t: t, **header):
    found, texts = read_safetensors(path, ValueError)
    write_safetensors(path, tensors(found), {k: v for k, v in (texts | header).items() if v is not None})


@pytest.mark.parametrize(
    "harm, words",
    [
        ({"format": "something else"}, "is no drop-in of this version"),
        ({"config": None}, "is no drop-in of this version"),
        ({"config": "{"}, "not valid JSON"),
        ({"config": "[1, 2]"}, "the config in .* is damaged"),
        ({"config": json.dumps({"d_model": -3})}, "the config in .* is damaged"),
        ({"config": json.dumps({"speed": 3})}, "another version of the kit"),
        ({"config": json.dumps(CONFIG.to_dict() | {"d_model": 64})}, "holds no model of its config"),
        ({"ways": "[]"}, "a way for each of 5 bins"),
        ({"ways": "7"}, "holds no drop-in"),
        ({"ways": json.dumps([[2.0, "none"]] * 5)}, "a step from 0 to 1"),
        ({"ways": json.dumps([[0.5, "odd"]] * 5)}, "a step from 0 to 1"),
        ({"ways": json.dumps([[True, "none"]] * 5)}, "a step from 0 to 1"),
    ],
)
def test_a_damaged_header_is_told(path, harm, words):
    change(path, **harm)
    with pytest.raises(CheckpointError, match=words):
        load_drop_in(path)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda t: {name: value for name, value in t.items() if name != "shift"}, "holds no drop-in"),
        (lambda t: t | {"shift": t["shift"][:4]}, r"the shift is torch.float32 \(4, 3, 32\)"),
        (lambda t: t | {"shift": t["shift"] / 0}, "the shift is not finite"),
        (lambda t: t | {"network.output.weight": t["network.output.weight"] / 0}, "not finite: .*output.weight"),
        (lambda t: {n: v for n, v in t.items() if n != "network.output.weight"}, "no matrix output.weight"),
        (lambda t: t | {"network.more": torch.zeros(3)}, "holds no model of its config"),
    ],
)
def test_damaged_tensors_are_told(path, harm, words):
    change(path, tensors=harm)
    with pytest.raises(CheckpointError, match=words):
        load_drop_in(path)


def test_a_truncated_file_and_none(path):
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_drop_in(path)
    with pytest.raises(FileNotFoundError, match="write one with save_drop_in"):
        load_drop_in(path.with_name("none.safetensors"))


@pytest.mark.parametrize("name", PRETRAINED)
def test_shipped_weights_keep_near_frontal_views_and_move_others(name):
    model = load_pretrained(name)
    torch.manual_seed(0)
    src = F.normalize(torch.randn(64, model.model.feature_dim), dim=1)
    angles = torch.linspace(-90, 90, 64).deg2rad()[:, None] * torch.tensor([0.0, 1.0, 0.0])
    found = model(src, angles, torch.randn(64, 5, 3), return_residual=False)
    near = yaw_bin(angles[:, 1].abs().rad2deg()) < 2
    torch.testing.assert_close(found[near], src[near], atol=1e-6, rtol=0)
    moved = (found[~near] * src[~near]).sum(1)
    assert (moved < 0.999).all() and (moved > 0.7).all()
    assert PRETRAINED[name].stat().st_size < 4e6


def test_a_name_that_is_not_shipped():
    with pytest.raises(ValueError, match="ships mobilefacenet; got 'resnet'"):
        load_pretrained("resnet")
