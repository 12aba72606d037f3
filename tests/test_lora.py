import copy

import numpy as np
import pytest
import torch
from torch import nn

from viewdiff_nb import LoRALinearLayer
from viewdiff_nb.modules.lora import disable_adapters, evaluation_mode, lora_layers


def trained(layer: LoRALinearLayer) -> LoRALinearLayer:
    """An adapter that does something: B is not zero any more."""
    nn.init.normal_(layer.lora_up)
    return layer


def test_hand_computed_update_with_pose():
    layer = LoRALinearLayer(2, 1, rank=1, alpha=3.0, pose_dim=1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.bias.fill_(0.5)
        layer.lora_down.copy_(torch.tensor([[10.0, 0.0, 1.0]]))
        layer.lora_up.fill_(2.0)
    # W x + b = 1 + 2 + .5; A [x; c] = 10 + 7; s B = 3 * 2
    assert layer(torch.tensor([1.0, 1.0]), torch.tensor([7.0])).item() == 3.5 + 6 * 17


def test_new_adapter_changes_nothing_and_only_the_adapter_trains():
    layer = LoRALinearLayer(6, 5, rank=2, pose_dim=3)
    x, pose = torch.randn(4, 6), torch.randn(4, 3)
    torch.testing.assert_close(layer(x, pose), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    layer(x, pose).square().mean().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert layer.lora_up.grad.abs().sum() > 0
    assert sum(p.numel() for p in layer.get_trainable_parameters()) == 2 * (6 + 3) + 5 * 2
    assert {id(p) for p in layer.parameters() if p.requires_grad} == {id(p) for p in layer.get_trainable_parameters()}


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("pose_dim", [0, 3])
def test_merge_is_exact_for_one_pose_and_unmerge_is_bit_exact(dtype, tolerance, pose_dim):
    layer = trained(LoRALinearLayer(12, 9, rank=3, alpha=2.0, pose_dim=pose_dim, dtype=dtype))
    x, pose = torch.randn(5, 12, dtype=dtype), torch.randn(3, dtype=dtype) if pose_dim else None
    weight, bias, before = layer.weight.clone(), layer.bias.clone(), layer(x, pose)
    layer.merge(pose)
    torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance)
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge(pose)
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)
    assert torch.equal(layer(x, pose), before)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


@pytest.mark.parametrize(
    "dtype,bits,smallest",
    [
        (torch.float32, 24, 2.0**-149),
        (torch.float16, 11, 2.0**-24),
        (torch.bfloat16, 8, 2.0**-133),
    ],
)
def test_a_merge_is_rounded_once(dtype, bits, smallest):
    """No entry is further from W + s B A than half the distance between two numbers of the layer's type."""
    layer = trained(LoRALinearLayer(128, 64, rank=4, alpha=3.0, pose_dim=2, dtype=dtype))
    pose = torch.randn(2, dtype=dtype)
    down, up, weight, bias, at = (
        p.detach().double().numpy() for p in (layer.lora_down, layer.lora_up, layer.weight, layer.bias, pose)
    )
    layer.merge(pose)
    exact = weight + 0.75 * up @ down[:, :128], bias + 0.75 * up @ down[:, 128:] @ at
    for merged, wanted in zip((layer.merged_weight, layer.merged_bias), exact, strict=True):
        distance = np.maximum(np.ldexp(1.0, np.frexp(wanted)[1] - bits), smallest)
        assert (np.abs(merged.double().numpy() - wanted) <= 0.5001 * distance).all()


def poses(pose_dim: int) -> dict[str, torch.Tensor]:
    return {"pose": torch.randn(pose_dim)} if pose_dim else {}


@pytest.mark.parametrize("pose_dim", [0, 3])
def test_a_merged_layer_is_saved_as_it_is_trained(pose_dim):
    layer, fresh = (trained(LoRALinearLayer(12, 9, rank=3, pose_dim=pose_dim)) for _ in range(2))
    x, at = torch.randn(5, 12), poses(pose_dim)
    before, saved = layer(x, **at), copy.deepcopy(layer.state_dict())
    layer.merge(**at)
    assert list(layer.state_dict()) == list(saved)
    assert all(torch.equal(value, saved[name]) for name, value in layer.state_dict().items())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x, **at), before)
    fresh.merge(**at)
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("pose_dim", [0, 3])
@pytest.mark.parametrize("saved_merged", [False, True])
def test_what_is_loaded_into_a_merged_layer_is_what_it_computes(pose_dim, saved_merged):
    layer, other = (trained(LoRALinearLayer(12, 9, rank=3, pose_dim=pose_dim)) for _ in range(2))
    x, at = torch.randn(5, 12), poses(pose_dim)
    wanted = other(x, **at)
    if saved_merged:
        other.merge(**at)
    layer.merge(**at)
    model = nn.Sequential(layer)
    model.load_state_dict(nn.Sequential(other).state_dict())
    assert not layer.is_merged and torch.equal(layer(x, **at), wanted)
    layer.merge(**at)
    torch.testing.assert_close(layer(x), wanted)
    layer.unmerge()
    assert torch.equal(layer(x, **at), wanted)


def test_a_merged_layer_is_copied_and_converted_like_any_other(tmp_path):
    layer = trained(LoRALinearLayer(12, 9, rank=3, pose_dim=3))
    x, pose = torch.randn(5, 12), torch.randn(3)
    before = layer(x, pose)
    layer.merge(pose)
    torch.save(layer, tmp_path / "layer.pt")
    for twin in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        twin.unmerge()
        assert layer.is_merged and torch.equal(twin(x, pose), before)
    layer.double()
    torch.testing.assert_close(layer(x.double()), before.double(), rtol=1e-5, atol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer(x.double(), pose.double()), before.double(), rtol=1e-5, atol=1e-5)
    layer.merge(pose.double())
    assert layer.to("meta")(x.double().to("meta")).device.type == "meta"


def test_merging_leaves_the_wrapped_layer_alone():
    linear = nn.Linear(7, 4)
    layer = trained(LoRALinearLayer.from_linear(linear, rank=2))
    x = torch.randn(3, 7)
    before = linear(x)
    layer.merge()
    assert torch.equal(linear(x), before) and not torch.allclose(layer(x), before)


def test_wraps_a_linear_layer_without_copying():
    linear = nn.Linear(7, 4, dtype=torch.float64)
    layer = LoRALinearLayer.from_linear(linear, rank=2)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert layer.lora_down.dtype == torch.float64 and not linear.weight.requires_grad
    x = torch.randn(3, 7, dtype=torch.float64)
    assert torch.equal(layer(x), linear(x))
    assert LoRALinearLayer.from_linear(nn.Linear(3, 3, bias=False), rank=1).bias is None


def test_disabling_adapters_is_undone_even_after_an_error():
    model = nn.Sequential(trained(LoRALinearLayer(4, 4, rank=2)), nn.GELU(), trained(LoRALinearLayer(4, 4, rank=2)))
    x = torch.randn(2, 4)
    with_adapters = model(x)
    with pytest.raises(KeyError), disable_adapters(model):
        assert not torch.equal(model(x), with_adapters)
        raise KeyError
    assert torch.equal(model(x), with_adapters)


def test_merged_adapters_are_disabled_too():
    model = nn.Sequential(trained(LoRALinearLayer(4, 4, rank=2)), nn.GELU(), trained(LoRALinearLayer(4, 4, rank=2)))
    x = torch.randn(2, 4)
    with disable_adapters(model):
        without = model(x)
    lora_layers(model)["0"].merge()
    merged = model(x)
    with disable_adapters(model):
        assert torch.equal(model(x), without)
    assert torch.equal(model(x), merged)


def test_dropout_acts_on_the_adapter_only_and_only_in_training():
    layer = trained(LoRALinearLayer(50, 3, rank=2, dropout=0.5))
    x = torch.randn(2, 50)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.lora_up)
    layer.train()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"rank": 0}, "rank must be in 1..4"),
        ({"rank": 5}, "got 5"),
        ({"alpha": 0.0}, "alpha must be positive, got 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"pose_dim": -1}, "pose_dim"),
    ],
)
def test_refuses_impossible_sizes(bad, message):
    with pytest.raises(ValueError, match=message):
        LoRALinearLayer(4, 6, **bad)


def test_refuses_a_missing_or_wrong_pose():
    layer = LoRALinearLayer(4, 4, rank=1, pose_dim=3)
    with pytest.raises(ValueError, match=r"pose must be \(\.\.\., 3\), .* got none"):
        layer(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"got \(2, 2\)"):
        layer(torch.randn(2, 4), torch.randn(2, 2))
    with pytest.raises(ValueError, match=r"one pose .* must be \(3,\), got \(2, 3\)"):
        layer.merge(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="bias"):
        LoRALinearLayer(4, 4, rank=1, pose_dim=3, bias=False).merge(torch.randn(3))


def test_every_module_is_in_its_own_mode_again():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    model[1].eval()  # frozen statistics
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    assert [module.training for module in model] == [True, False, True] and model.training


def test_wrapping_a_layer_draws_no_more_than_its_adapter():
    linear = nn.Linear(12, 8)
    torch.manual_seed(5)
    wrapped = LoRALinearLayer.from_linear(linear, rank=3)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    wanted = nn.init.kaiming_uniform_(torch.empty(3, 12), a=5**0.5)
    assert torch.equal(wrapped.lora_down, wanted) and torch.equal(torch.get_rng_state(), after)
    assert not wrapped.lora_up.any() and wrapped.weight is linear.weight
    with pytest.raises(TypeError):
        LoRALinearLayer.from_linear(linear, rank=3, dtype=torch.float64)


def test_rslora_divides_by_the_root_of_the_rank():
    assert LoRALinearLayer(9, 9, rank=9, alpha=6.0, rslora=True).scale == 2.0
    assert LoRALinearLayer(9, 9, rank=9, alpha=18.0).scale == 2.0
