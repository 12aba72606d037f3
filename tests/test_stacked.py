import pytest
import torch
from conftest import DEVICES
from torch import nn

from viewdiff_nb import EnhancedTransformerDecoderOnly3D, PoseConditionedLoRAAttention
from viewdiff_nb.modules.lora import disable_adapters, lora_layers
from viewdiff_nb.modules.stacked import StackedAttention, stack_adapters, unstack

SIZES = {"d_model": 32, "nhead": 4, "num_layers": 2, "dim_feedforward": 48, "dropout": 0.0, "voxel_resolution": 4}


def models(options: dict, ranks=(2, 5, 3), device="cpu") -> list[EnhancedTransformerDecoderOnly3D]:
    """The same frozen base with different adapters, all of them at work."""
    base = EnhancedTransformerDecoderOnly3D(**SIZES, use_lora_attention=False, use_projection_layer=False)
    nn.init.normal_(base.output.weight, std=0.1)
    built = []
    for i, rank in enumerate(ranks):
        model = EnhancedTransformerDecoderOnly3D(**SIZES | options, rank=rank, lora_alpha=float(i + 1))
        model.load_base(base.state_dict())
        model.freeze_base()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
        built.append(model.to(device))
    return built


def trainable(stack: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in stack.named_parameters() if p.requires_grad}


def inputs(count: int, batch: int, device="cpu") -> dict[str, torch.Tensor]:
    return {
        "src": torch.randn(count * batch, 32, device=device),
        "angles": torch.randn(count * batch, 3, device=device),
        "keypoints_3d": torch.randn(count * batch, 5, 3, device=device),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"use_projection_layer": False},
        {"use_projection_layer": True},
        {"use_projection_layer": False, "pose_dim": 0},
        {"use_projection_layer": False, "lora_targets": ("feed_forward",)},
        {"use_projection_layer": True, "lora_targets": ("attention", "feed_forward"), "rslora": True},
    ],
    ids=str,
)
def test_predictions_and_gradients_are_those_of_the_models_one_by_one(options, device):
    built = models(options, device=device)
    stacked, given = stack_adapters(built), inputs(3, 4, device)
    together = stacked(**given, return_residual=False)
    alone = [
        model(**{k: v[4 * i : 4 * i + 4] for k, v in given.items()}, return_residual=False)
        for i, model in enumerate(built)
    ]
    loose = 10 if device == "cuda" and options["use_projection_layer"] else 1  # cuDNN convolves in TF32
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4 * loose, atol=1e-4 * loose)
    together.square().sum().backward()
    stacks = {name: parameter.grad.clone() for name, parameter in trainable(stacked).items()}
    assert stacks and all(p.grad is None for model in built for p in model.parameters() if not p.requires_grad)
    for part in alone:
        part.square().sum().backward()
    compared = 0
    for name, gradient in stacks.items():
        if not name.endswith((".lora_down", ".lora_up")):
            continue
        for i, model in enumerate(built):
            own = model.get_parameter(name).grad
            found = gradient[i][tuple(slice(size) for size in own.shape)]
            torch.testing.assert_close(found, own, rtol=1e-3 * loose, atol=1e-4 * loose * float(own.abs().max()))
            assert gradient[i].count_nonzero() == found.count_nonzero()  # the padding has none
            compared += 1
    assert compared >= 12


def test_adapters_travel_back_to_their_models():
    built = models({"use_projection_layer": True})
    before = [{n: p.clone() for n, p in model.named_parameters()} for model in built]
    stacked = stack_adapters(built)
    with torch.no_grad():
        for parameter in trainable(stacked).values():
            parameter.mul_(2)
    unstack(stacked, built)
    assert "ranks=[2, 5, 3]" in repr(stacked)
    for model, old in zip(built, before, strict=True):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, old[name] * (2 if parameter.requires_grad else 1))


def test_one_token_attention_shows_the_weights_of_each():
    built = models({"use_projection_layer": False})
    given = inputs(3, 2)
    _, weights = stack_adapters(built)(**given, return_attention=True)
    for i, model in enumerate(built):
        _, own = model(**{k: v[2 * i : 2 * i + 2] for k, v in given.items()}, return_attention=True)
        torch.testing.assert_close(weights[2 * i : 2 * i + 2], own)


def test_a_stack_offers_only_what_it_can_do():
    """It is no LoRA layer: it can be neither merged nor disabled."""
    stacked = stack_adapters(models({"use_projection_layer": False, "lora_targets": ("attention", "feed_forward")}))
    assert not lora_layers(stacked)
    kinds = {
        type(module).__name__: module for module in stacked.modules() if type(module).__name__.startswith("Stacked")
    }
    assert set(kinds) == {"StackedAttention", "StackedLoRALinear"}
    for kind in kinds.values():
        assert not [name for name in ("merge", "unmerge", "adapter_enabled", "is_merged") if hasattr(kind, name)]
    with (
        pytest.raises(ValueError, match=r"has no LoRA layer to disable.*unstack\(\)"),
        disable_adapters(stacked),
    ):
        pass


def test_scores_beyond_float16_before_they_are_scaled():
    """q . k is 102,400, more than float16 holds; divided by sqrt(64) it is 12,800."""
    built = [PoseConditionedLoRAAttention(64, pose_dim=0, num_heads=1, rank=1).half() for _ in range(2)]
    with torch.no_grad():
        for attention in built:
            for linear in (attention.query, attention.key, attention.value, attention.out):
                linear.weight.copy_(torch.eye(64))
                if linear.bias is not None:
                    linear.bias.zero_()
    x, memory = torch.full((2, 1, 64), 40.0).half(), torch.full((2, 6, 64), 39.0).half()
    output, weights = StackedAttention(built)(x, None, memory, return_attention=True)
    torch.testing.assert_close(output, x)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0, 0, 0, 0, 0, 0]).half().expand(2, 1, 1, 7))


def test_a_stack_leaves_its_models_alone():
    built = models({"use_projection_layer": True})
    before = [{name: p.clone() for name, p in model.named_parameters()} for model in built]
    stacked = stack_adapters(built)
    with torch.no_grad():
        for parameter in trainable(stacked).values():
            parameter.add_(1)
    for model, old in zip(built, before, strict=True):
        assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


def test_what_cannot_be_stacked():
    built = models({"use_projection_layer": False})
    built[0].norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm\.weight is trainable; freeze the base"):
        stack_adapters(built)
    crossed = EnhancedTransformerDecoderOnly3D(**SIZES, use_cross_view=True)
    with pytest.raises(ValueError, match="one model at a time"):
        stack_adapters([crossed])
    with pytest.raises(ValueError, match="no dropout of their own"):
        stack_adapters(models({"use_projection_layer": False, "lora_dropout": 0.1}))


def test_all_have_a_projection_of_one_resolution_or_none():
    def built(**options):
        torch.manual_seed(0)
        sizes = {"d_model": 16, "nhead": 2, "num_layers": 1, "dim_feedforward": 24}
        model = EnhancedTransformerDecoderOnly3D(**sizes, **options)
        model.freeze_base()
        return model

    coarse, fine = (built(use_projection_layer=True, voxel_resolution=size) for size in (4, 8))
    without = built(use_projection_layer=False)
    for pair in ([coarse, without], [without, coarse], [coarse, fine]):
        with pytest.raises(ValueError, match="projection of one voxel_resolution, or none"):
            stack_adapters(pair)
