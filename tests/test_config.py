from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from conftest import CONFIG

from viewdiff_nb.modules import transformer
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.training.config import (
    ARCHITECTURE,
    LIMITS,
    LORA_TARGETS,
    LOSS_NAMES,
    MONITORED,
    Monitored,
    TrainConfig,
)
from viewdiff_nb.training.devices import choose_device
from viewdiff_nb.training.losses import LOSSES


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"epochs": 0}, "epochs must be from 1 to .*, got 0"),
        ({"loss": "l1"}, "loss must be one of mse, cosine"),
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"lora_lr": float("inf")}, "lora_lr must be a finite number, got inf"),
        ({"min_yaw": 50.0, "max_yaw": 40.0}, "min_yaw must be below"),
        ({"dropout": 1.0}, "dropout"),
        ({"use_prior_preservation": True}, "needs the base model"),
        ({"freeze_base": True}, "random weights"),
        ({"use_cross_view": True, "n_views": 5, "batch_size": 32}, "multiple of n_views=5"),
        ({"pose_dim": 6}, "pose_dim must be 3"),
        (
            {"use_prior_preservation": True, "base_model_path": "b", "use_cross_view": True, "n_views": 4},
            "single views",
        ),
        ({"use_lora_attention": True, "rank": 999}, "rank must not exceed 32.* got 999"),
        ({"lambda_prior": -1.0}, "lambda"),
        ({"use_lora_attention": True, "lora_targets": ()}, "adapts nothing"),
        ({"devices": 0}, "devices must be from 1"),
        ({"patience": 0}, "patience must be from 1"),
        ({"monitor": "val_lss"}, "monitor must be one of val_loss"),
        ({"resume": "auto"}, "give save_dir"),
        ({"save_minutes": -1.0}, "save_minutes must be >= 0, got -1"),
        ({"d_model": 0}, "d_model must be from 1"),
        ({"num_layers": 0}, "num_layers must be from 1"),
        ({"num_layers": -1}, "num_layers must be from 1"),
        ({"num_layers": 10**6}, "num_layers .*, got 1000000"),
        ({"dim_feedforward": 0}, "dim_feedforward must be from 1"),
        ({"nhead": 5}, "d_model must be a multiple of nhead=5"),
        (
            {"use_lora_attention": True, "lora_targets": ("feed_forward",), "dim_feedforward": 2},
            "rank must not exceed 2",
        ),
        ({"seed": 2**70}, "seed must be from 0"),
        ({"batch_size": 2**70}, "batch_size must be from 1"),
        ({"epochs": 10**30}, "epochs must be from 1"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"resume": ""}, "resume must be a name or a path .*, got ''"),
        ({"save_dir": ""}, "save_dir must be a name or a path"),
        ({"prior_terms": ()}, "prior_terms must be of kl, feature, l2"),
        ({"lora_targets": ("atention",)}, "lora_targets must be of attention, feed_forward"),
        ({"val_people": 1}, "val_people must be from 2"),
        ({"use_amp": "no"}, "use_amp must be true or false, got 'no'"),
        ({"mixup": True, "use_cross_view": True, "n_views": 4}, "either mixup or use_cross_view"),
        ({"paired_views": True, "use_cross_view": True, "n_views": 4}, "either paired_views or use_cross_view"),
        ({"paired_views": True, "batch_size": 15}, "even batch_size, got 15"),
        (
            {"use_cuda_graph": True, "gradient_accumulation_steps": 2},
            "accumulation_steps is 2; give --no-use_cuda_graph",
        ),
    ],
)
def test_contradictory_configs_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **bad)


def test_paths_and_lists_are_taken(tmp_path):
    config = replace(CONFIG, save_dir=tmp_path, lora_targets=["attention"])
    assert config.save_dir == str(tmp_path) and config.lora_targets == ("attention",)
    assert hash(config) == hash(replace(config))


def test_every_number_has_limits():
    """So that no flag reaches torch, which would not name it."""
    free = {"max_yaw", "prior_max_yaw"}  # any number is an angle
    named = {"loss", "monitor", "lora_targets", "prior_terms"}
    numbers = {f.name for f in fields(TrainConfig) if {int, float} & {f.type, *get_args(f.type)}}
    assert numbers - free | named == set(LIMITS)


def test_names_are_those_of_the_parts_that_they_choose():
    assert set(LOSS_NAMES) == set(LOSSES)
    assert LORA_TARGETS == transformer.LORA_TARGETS
    assert set(get_args(Monitored)) == set(MONITORED)


def test_every_size_of_the_model_comes_from_the_config():
    sizes = {
        "d_model": 48,
        "nhead": 6,
        "num_layers": 3,
        "dim_feedforward": 40,
        "dropout": 0.3,
        "pose_dim": 0,
        "n_views": 2,
        "rank": 3,
        "voxel_resolution": 5,
        "use_lora_attention": True,
        "use_projection_layer": True,
        "use_cross_view": True,
        "lora_alpha": 5.0,
        "lora_targets": ("feed_forward",),
    }
    assert set(sizes) == set(ARCHITECTURE)
    model = build_model(TrainConfig(**sizes), 32)
    block = model.blocks[0]
    assert (len(model.blocks), block.dropout, block.attention.num_heads) == (3, 0.3, 6)
    assert block.linear1.weight.shape == (40, 48) and (block.linear1.rank, block.linear1.alpha) == (3, 5.0)
    assert model.projection.voxel_resolution == 5 and model.n_views == 2 and model.feature_dim == 32
    base = build_model(TrainConfig(**sizes), 32, base=True)
    assert base.projection is None and base.cross_view is None and set(base.parameter_roles().values()) == {"base"}


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda .* got 'cud'"):
        choose_device("cud")


def test_asking_for_a_missing_gpu():
    if torch.cuda.is_available():
        assert choose_device("auto").type == "cuda"
    else:
        with pytest.raises(ValueError, match="sees no GPU"):
            choose_device("cuda")
