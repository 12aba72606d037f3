"""LoRA against PEFT's: the same numbers and gradients, whatever the sizes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from viewdiff_nb import LoRALinearLayer


def peft_twin(layer: LoRALinearLayer) -> nn.Module:
    """PEFT's LoRA layer with the same weights."""
    holder = nn.Sequential(nn.Linear(layer.in_features, layer.out_features))
    config = LoraConfig(r=layer.rank, lora_alpha=layer.alpha, target_modules=["0"], use_rslora=layer.rslora)
    twin = inject_adapter_in_model(config, holder)[0]
    with torch.no_grad():
        twin.base_layer.weight.copy_(layer.weight)
        twin.base_layer.bias.copy_(layer.bias)
        twin.lora_A["default"].weight.copy_(layer.lora_down)
        twin.lora_B["default"].weight.copy_(layer.lora_up)
    return twin.to(layer.weight.dtype)


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    rank=st.integers(1, 16),
    batch=st.integers(1, 9),
    alpha=st.floats(0.1, 32),
    rslora=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_peft_forward_and_gradient(inputs, outputs, rank, batch, alpha, rslora, double, seed):
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    rank = min(rank, inputs, outputs)
    layer = LoRALinearLayer(inputs, outputs, rank, alpha, rslora=rslora, dtype=dtype)
    nn.init.normal_(layer.lora_up, std=0.1)
    twin = peft_twin(layer)
    x = torch.randn(batch, inputs, dtype=dtype, requires_grad=True)
    ours, theirs = layer(x), twin(x)
    tolerance = {"rtol": 1e-6, "atol": 1e-6 * max(1.0, ours.abs().max().item())}
    torch.testing.assert_close(ours, theirs, **tolerance)
    probe = torch.randn_like(ours)
    wanted = torch.autograd.grad(
        (theirs * probe).sum(), (x, twin.lora_A["default"].weight, twin.lora_B["default"].weight)
    )
    got = torch.autograd.grad((ours * probe).sum(), (x, layer.lora_down, layer.lora_up))
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6 * max(1.0, w.abs().max().item()))
