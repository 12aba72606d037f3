"""Rows of the controls: each is what its name says."""

from dataclasses import replace

import pytest
import torch
from conftest import people
from studies_fixture import TOY

from viewdiff_nb.studies.control_rows import ROWS, rows_of
from viewdiff_nb.training.checkpoint import build_model, prepare_model, save_checkpoint

WITHOUT_PEFT = [name for name in ROWS if "PEFT" not in name]
ADAPTED = [name for name in rows_of("adapted") if name in WITHOUT_PEFT]


@pytest.fixture(scope="module")
def faces():
    return people(12, views=6)


@pytest.fixture(scope="module")
def base(faces, tmp_path_factory):
    torch.manual_seed(0)
    model = build_model(TOY, faces.feature_dim, base=True)
    torch.nn.init.normal_(model.output.weight, std=0.1)
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save_checkpoint(path, {"model": model.state_dict()})
    return str(path), model.eval()


def built(name, faces, base_path):
    row = ROWS[name]
    config = replace(
        TOY, **({"base_model_path": base_path} | row.options | {"rank": min(8, row.options.get("rank", 8))})
    )
    return row.build(config, faces) if row.build else prepare_model(config, faces.feature_dim)[0]


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapted_model_starts_as_its_base(name, faces, base):
    model = built(name, faces, base[0]).eval()
    given = {"return_residual": False} | faces.conditions()
    with torch.no_grad():
        torch.testing.assert_close(model(faces.src, **given), base[1](faces.src, **given), atol=1e-5, rtol=1e-5)
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", rows_of("scratch"))
def test_a_model_from_scratch_trains_all(name, faces):
    row = ROWS[name]
    small = {
        key: value for key, value in row.options.items() if key not in ("d_model", "num_layers", "dim_feedforward")
    }
    config = replace(TOY, **small)
    model = row.build(config, faces) if row.build else prepare_model(config, faces.feature_dim)[0]
    assert all(p.requires_grad for p in model.parameters())


def trainable(name, faces, base_path):
    return sum(p.numel() for p in built(name, faces, base_path).parameters() if p.requires_grad)


def test_a_plain_layer_is_as_large_as_the_projection(faces, base):
    projection, plain = (trainable(name, faces, base[0]) for name in ("projection", "plain layer"))
    assert projection * 0.98 <= plain <= projection
    mistakes = [name for name in ROWS if name.startswith("projection,")]
    assert len(mistakes) == 7 and {trainable(name, faces, base[0]) for name in mistakes} == {projection}


def test_views_that_do_not_meet_have_the_same_layers(faces):
    for views in (2, 3, 5):
        meet, apart = (ROWS[f"cross-view, {views} views{how}"] for how in ("", " that do not meet"))
        assert meet.options == apart.options and meet.build is None and apart.build is not None


def test_rslora_has_the_scale_of_its_paper():
    options = ROWS["rsLoRA r=16"].options
    assert options["lora_alpha"] / options["rank"] == 16 / 16**0.5
