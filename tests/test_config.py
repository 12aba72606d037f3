from dataclasses import replace

import pytest
import torch
from conftest import CONFIG

from viewdiff_nb.training.config import ARCHITECTURE, TrainConfig, choose_device


@pytest.mark.parametrize("bad,message", [
    ({"epochs": 0}, "epochs must be positive, got 0"), ({"loss": "l1"}, "loss must be one of mse, cosine"),
    ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"), ({"lr": float("nan")}, "lr must be a finite number"),
    ({"lora_lr": float("inf")}, "lora_lr must be a finite number, got inf"),
    ({"min_yaw": 50.0, "max_yaw": 40.0}, "min_yaw must be below"), ({"dropout": 1.0}, "dropout"),
    ({"use_prior_preservation": True}, "needs the base model"), ({"freeze_base": True}, "random weights"),
    ({"use_cross_view": True, "n_views": 5, "batch_size": 32}, "multiple of n_views=5"),
    ({"pose_dim": 6}, "pose_dim must be 3"),
    ({"use_prior_preservation": True, "base_model_path": "b", "use_cross_view": True, "n_views": 4}, "single views"),
    ({"use_lora_attention": True, "rank": 999}, "rank must not exceed d_model=32"), ({"lambda_prior": -1.0}, "lambda"),
    ({"use_lora_attention": True, "lora_targets": ()}, "adapts nothing"), ({"devices": 0}, "devices must be positive"),
    ({"patience": 0}, "patience must be at least 1"), ({"monitor": "val_lss"}, "monitor must be one of val_loss"),
    ({"resume": "auto"}, "give save_dir"), ({"save_minutes": -1.0}, "save_minutes must not be negative"),
])  # fmt: skip
def test_contradictory_configs_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **bad)


def test_every_size_of_the_model_comes_from_the_config():
    sizes = {"d_model": 48, "nhead": 6, "num_layers": 3, "dim_feedforward": 40, "dropout": 0.3, "pose_dim": 0,
             "n_views": 2, "rank": 3, "voxel_resolution": 5, "use_lora_attention": True, "use_projection_layer": True,
             "use_cross_view": True, "lora_alpha": 5.0, "lora_targets": ("feed_forward",)}  # fmt: skip
    assert set(sizes) == set(ARCHITECTURE)
    model = TrainConfig(**sizes).build_model(32)
    block = model.blocks[0]
    assert (len(model.blocks), block.dropout, block.attention.num_heads) == (3, 0.3, 6)
    assert block.linear1.weight.shape == (40, 48) and (block.linear1.rank, block.linear1.alpha) == (3, 5.0)
    assert model.projection.voxel_resolution == 5 and model.n_views == 2 and model.feature_dim == 32
    base = TrainConfig(**sizes).build_model(32, base=True)
    assert base.projection is None and base.cross_view is None and set(base.parameter_roles().values()) == {"base"}


def test_asking_for_a_missing_gpu():
    if torch.cuda.is_available():
        assert choose_device("auto").type == "cuda"
    else:
        with pytest.raises(ValueError, match="sees no GPU"):
            choose_device("cuda")
