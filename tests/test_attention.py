import pytest
import torch
from torch import nn

from viewdiff_nb import CrossViewAttention, PoseConditionedLoRAAttention
from viewdiff_nb.modules.attention import attention_weights, encode_pose, weighted_tokens
from viewdiff_nb.modules.lora import disable_adapters
from viewdiff_nb.training.batches import FaceBatch
from viewdiff_nb.training.result import find_cause


def copy_into(torch_attention: nn.MultiheadAttention, ours) -> nn.MultiheadAttention:
    """torch's multi-head attention with our weights: an independent implementation of the formula."""
    with torch.no_grad():
        torch_attention.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        biases = [
            layer.bias if layer.bias is not None else torch.zeros(ours.feature_dim)
            for layer in (ours.query, ours.key, ours.value)
        ]
        torch_attention.in_proj_bias.copy_(torch.cat(biases))
        torch_attention.out_proj.weight.copy_(ours.out.weight)
        torch_attention.out_proj.bias.copy_(ours.out.bias)
    return torch_attention.eval()


def trained(attention: PoseConditionedLoRAAttention) -> PoseConditionedLoRAAttention:
    for layer in (attention.query, attention.key, attention.value, attention.out):
        nn.init.normal_(layer.lora_up, std=0.3)
    return attention


@pytest.mark.parametrize("tokens", [1, 2, 9])  # few queries take the absorbed path, many the projected one
def test_base_equals_torch_multihead_attention(tokens):
    ours = PoseConditionedLoRAAttention(32, num_heads=4, rank=0)
    theirs = copy_into(nn.MultiheadAttention(32, 4, batch_first=True), ours)
    x, memory = torch.randn(3, tokens, 32), torch.randn(3, 6, 32)
    context = torch.cat((x, memory), 1)
    wanted, wanted_weights = theirs(x, context, context, average_attn_weights=False)
    output, weights = ours(x, None, memory, return_attention=True)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_adapted_equals_its_formula_written_out(tokens):
    ours = trained(PoseConditionedLoRAAttention(16, pose_dim=3, num_heads=2, rank=3, alpha=2.0)).double()
    x, memory, pose = torch.randn(2, tokens, 16).double(), torch.randn(2, 4, 16).double(), torch.randn(2, 3).double()
    context = torch.cat((x, memory), 1)

    def adapted(layer, tokens):
        code = torch.cat((pose.sin(), pose.cos()), 1)[:, None].expand(-1, tokens.shape[1], -1)
        update = torch.cat((tokens, code), 2) @ layer.lora_down.T @ layer.lora_up.T
        return tokens @ layer.weight.T + layer.bias + 2.0 / 3 * update

    q, v = adapted(ours.query, x), adapted(ours.value, context)
    k = context @ (ours.key.weight + 2.0 / 3 * ours.key.lora_up @ ours.key.lora_down).T
    heads = []
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5
        heads.append(scores.softmax(-1) @ v[..., part])
    a = torch.cat(heads, -1)
    wanted = a @ ours.out.weight.T + ours.out.bias + 2.0 / 3 * (a @ ours.out.lora_down.T @ ours.out.lora_up.T)
    torch.testing.assert_close(ours(x, pose, memory), wanted, rtol=1e-10, atol=1e-10)


def test_attention_is_over_several_tokens_and_alive():
    ours = trained(PoseConditionedLoRAAttention(32, num_heads=4, rank=4))
    x, memory, pose = torch.randn(3, 32), torch.randn(3, 6, 32), torch.randn(3, 3)
    output, weights = ours(x, pose, memory, return_attention=True)
    assert output.shape == (3, 32) and weights.shape == (3, 4, 1, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 1))
    assert weights.std() > 1e-3
    output.square().sum().backward()
    for layer in (ours.query, ours.key):  # dead (zero gradient) where the only token attends to itself
        assert layer.lora_up.grad.abs().sum() > 0
    alone = trained(PoseConditionedLoRAAttention(32, num_heads=4, rank=4))
    lonely, ones = alone(x, pose, return_attention=True)
    assert torch.equal(ones, torch.ones(3, 4, 1, 1))
    lonely.square().sum().backward()
    assert alone.query.lora_up.grad.abs().max() < 1e-6


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_weights_are_those_that_the_fast_path_used(tokens):
    ours = trained(PoseConditionedLoRAAttention(32, num_heads=4, rank=4))
    x, memory, pose = torch.randn(5, tokens, 32), torch.randn(5, 6, 32), torch.randn(5, 3)
    output, weights = ours(x, pose, memory, return_attention=True)
    v = ours.value(torch.cat((x, memory), 1), ours._pose_code(pose, 5)).unflatten(-1, (4, 8)).transpose(1, 2)
    torch.testing.assert_close(ours.out((weights @ v).transpose(1, 2).flatten(2)), output, rtol=1e-5, atol=1e-5)


def test_a_pose_or_bias_in_the_keys_would_change_nothing():
    """Why k has neither: a shift of all keys of a sample leaves softmax(q k^T) as it is."""
    q, k, shift = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 1, 8)
    torch.testing.assert_close(attention_weights(q, k + shift), attention_weights(q, k), rtol=1e-4, atol=1e-6)


def test_dropout_takes_the_written_path_and_agrees_without_it():
    ours = trained(PoseConditionedLoRAAttention(32, num_heads=4, rank=4, dropout=0.5))
    x, memory, pose = torch.randn(3, 32), torch.randn(3, 6, 32), torch.randn(3, 3)
    assert not torch.equal(ours(x, pose, memory), ours(x, pose, memory))
    ours.eval()
    absorbed = ours(x, pose, memory)
    code = ours._pose_code(pose, 3)
    q = ours.query(x[:, None], code).unflatten(-1, (4, 8)).transpose(1, 2)
    written, _ = ours._projected(q, torch.cat((x[:, None], memory), 1), code, False)
    torch.testing.assert_close(ours.out(written)[:, 0], absorbed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["key", "value"])
@pytest.mark.parametrize(
    "register",
    [
        lambda layer, call: layer.register_forward_hook(lambda *_: call()),
        lambda layer, call: layer.register_forward_pre_hook(lambda *_: call()),
        lambda layer, call: layer.register_full_backward_hook(lambda *_: call()),
        lambda layer, call: layer.register_full_backward_pre_hook(lambda *_: call()),
        lambda layer, call: nn.modules.module.register_module_forward_hook(
            lambda m, *_: call() if m is layer else None
        ),
    ],
    ids=["forward", "before", "backward", "before backward", "global"],
)
def test_hooks_on_key_and_value_are_called(layer, register):
    ours = trained(PoseConditionedLoRAAttention(32, num_heads=4, rank=4))
    x, memory, pose = torch.randn(3, 32, requires_grad=True), torch.randn(3, 6, 32), torch.randn(3, 3)
    without, calls = ours(x, pose, memory), []
    handle = register(getattr(ours, layer), lambda: calls.append(1))
    with handle:
        output = ours(x, pose, memory)
        output.sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(output, without, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(x, pose, memory), without)  # the short way again


@pytest.mark.parametrize("layer", ["key", "value"])
def test_the_cause_of_a_divergence_is_named(layer):
    ours = PoseConditionedLoRAAttention(32, num_heads=4, rank=4)
    nn.init.constant_(getattr(ours, layer).lora_up, torch.inf)
    x, memory, pose = torch.randn(3, 32), torch.randn(3, 6, 32), torch.randn(3, 3)
    data = FaceBatch(x, pose, torch.randn(3, 5, 3), torch.arange(3))
    assert f"the output of {layer} is the first" in find_cause(ours, data, lambda _: ours(x, pose, memory).sum())


@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_scores_beyond_float16_before_they_are_scaled(tokens):
    """q . k is 102,400, more than float16 holds; divided by sqrt(64) it is 12,800."""
    ours = PoseConditionedLoRAAttention(64, num_heads=1, rank=0).half()
    with torch.no_grad():
        for linear in (ours.query, ours.key, ours.value, ours.out):
            linear.weight.copy_(torch.eye(64))
            if linear.bias is not None:
                linear.bias.zero_()
    x, memory = torch.full((2, tokens, 64), 40.0).half(), torch.full((2, 20, 64), 39.0).half()
    output, weights = ours(x, None, memory, return_attention=True)
    wanted = torch.cat((torch.full((tokens,), 1 / tokens), torch.zeros(20))).half()  # the rest have exp(-320)
    torch.testing.assert_close(weights, wanted.expand(2, 1, tokens, -1))
    torch.testing.assert_close(output, x)
    torch.testing.assert_close(weighted_tokens(x / 8, torch.cat((x, memory), 1)), x)


def test_pose_matters_and_angles_wrap():
    ours = trained(PoseConditionedLoRAAttention(32, num_heads=4, rank=4))
    x, memory, pose = torch.randn(3, 32), torch.randn(3, 6, 32), torch.randn(3, 3)
    output = ours(x, pose, memory)
    assert (ours(x, pose + 0.5, memory) - output).abs().max() > 1e-3
    torch.testing.assert_close(ours(x, pose + 2 * torch.pi, memory), output, rtol=1e-4, atol=1e-5)


def test_merge_is_exact_for_one_pose():
    ours = trained(PoseConditionedLoRAAttention(32, num_heads=4, rank=4)).double()
    x, memory, pose = torch.randn(3, 32).double(), torch.randn(3, 6, 32).double(), torch.randn(3).double()
    before = ours(x, pose.expand(3, 3), memory)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    ours.merge(pose)
    torch.testing.assert_close(ours(x, None, memory), before, rtol=1e-12, atol=1e-12)
    ours.unmerge()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_merged_attention_is_saved_and_loaded_as_it_was_trained(tokens):
    ours, fresh = (trained(PoseConditionedLoRAAttention(32, num_heads=4, rank=4)) for _ in range(2))
    x, memory, pose = torch.randn(3, tokens, 32), torch.randn(3, 6, 32), torch.randn(3)
    before = ours(x, pose.expand(3, 3), memory)
    ours.merge(pose)
    fresh.merge(pose + 1)
    fresh.load_state_dict(ours.state_dict())
    torch.testing.assert_close(fresh(x, pose.expand(3, 3), memory), before, rtol=0, atol=0)
    with disable_adapters(ours):
        without = ours(x, None, memory)
    ours.unmerge()
    with disable_adapters(ours):
        torch.testing.assert_close(ours(x, None, memory), without, rtol=0, atol=0)


def test_an_attention_is_merged_whole_or_not_at_all():
    ours = trained(PoseConditionedLoRAAttention(32, num_heads=4, rank=4))
    ours.out.merge()
    with pytest.raises(RuntimeError, match="out is merged already"):
        ours.merge(torch.randn(3))
    assert not any(layer.is_merged for layer in (ours.query, ours.key, ours.value))


def test_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="multiple of num_heads, got 30 and 4"):
        PoseConditionedLoRAAttention(30, num_heads=4)
    ours = PoseConditionedLoRAAttention(32, num_heads=4)
    with pytest.raises(ValueError, match=r"pose \(angles in radians\) must be \(2, 3\), got none"):
        ours(torch.randn(2, 32))
    with pytest.raises(ValueError, match=r"features must be \(B, 32\)"):
        ours(torch.randn(2, 31), torch.randn(2, 3))


def test_cross_view_equals_torch_multihead_attention_over_all_views():
    ours = CrossViewAttention(32, num_heads=4, n_views=3)
    theirs = copy_into(nn.MultiheadAttention(32, 4, batch_first=True), ours)
    x = torch.randn(2 * 3, 2, 32)
    joint = ours.norm(x).reshape(2, 6, 32)
    wanted, wanted_weights = theirs(joint, joint, joint, average_attn_weights=False)
    output, weights = ours(x, return_attention=True)
    torch.testing.assert_close(output, x + wanted.reshape(6, 2, 32), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-6)
    assert weights.shape == (2, 4, 6, 6)


def test_permuting_views_permutes_outputs_and_people_stay_apart():
    ours = CrossViewAttention(16, num_heads=2, n_views=4).double()
    x = torch.randn(2, 4, 16).double()
    order = torch.tensor([2, 0, 3, 1])
    output = ours(x.view(8, 16)).view(2, 4, 16)
    torch.testing.assert_close(ours(x[:, order].reshape(8, 16)).view(2, 4, 16), output[:, order])
    changed = x.clone()
    changed[1] += 1.0
    torch.testing.assert_close(ours(changed.view(8, 16)).view(2, 4, 16)[0], output[0])
    assert (ours(changed.view(8, 16)).view(2, 4, 16)[1] - output[1]).abs().max() > 1e-2


def test_a_missing_view_has_no_influence():
    ours = CrossViewAttention(16, num_heads=2, n_views=3).double()
    x = torch.randn(3, 16).double()
    mask = torch.tensor([True, True, False])
    output, weights = ours(x, mask, return_attention=True)
    other = x.clone()
    other[2] += 100.0
    torch.testing.assert_close(ours(other, mask)[:2], output[:2])
    assert weights[:, :, :2, 2].abs().max() == 0
    assert torch.equal(output[2], x[2])
    assert ours(x, torch.tensor([False] * 3)).isfinite().all()
    torch.testing.assert_close(ours(x, torch.tensor([True] * 3)), ours(x))
    pair = CrossViewAttention(16, num_heads=2, n_views=2).double()
    pair.load_state_dict(ours.state_dict())
    torch.testing.assert_close(output[:2], pair(x[:2]))  # as if the view had never been there


def test_batch_must_be_a_multiple_of_the_views():
    with pytest.raises(ValueError, match=r"批次大小必须是n_views的倍数.*got 8 with n_views=5; use 5 or 10.*drop_last"):
        CrossViewAttention(512, n_views=5)(torch.randn(8, 512))


def test_guide_sizes():
    assert CrossViewAttention(512, num_heads=8, n_views=5)(torch.randn(40, 512)).shape == (40, 512)


class Wrapper(nn.Module):
    """What a library may put around a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *arguments):
        return self.layer(*arguments)


def test_wrapped_layers_are_given_the_pose():
    torch.manual_seed(0)
    attention = PoseConditionedLoRAAttention(16, num_heads=4)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    features, pose, memory = torch.randn(3, 16), torch.randn(3, 3), torch.randn(3, 6, 16)
    wanted = attention(features, pose, memory)
    attention.query, attention.value = Wrapper(attention.query), Wrapper(attention.value)
    torch.testing.assert_close(attention(features, pose, memory), wanted)


def test_a_pose_of_another_shape_is_refused_also_while_merged():
    attention = PoseConditionedLoRAAttention(16, num_heads=4)
    attention.merge(torch.zeros(3))
    attention(torch.randn(2, 16))
    with pytest.raises(ValueError, match="pose"):
        attention(torch.randn(2, 16), torch.zeros(2, 2))


def test_trainable_parameters_come_in_the_order_of_the_layers():
    for rank in (0, 2):
        attention = PoseConditionedLoRAAttention(16, num_heads=4, rank=rank)
        layers = (attention.query, attention.key, attention.value, attention.out)
        wanted = [p for layer in layers for p in ((layer.lora_down, layer.lora_up) if rank else layer.parameters())]
        assert all(a is b for a, b in zip(attention.get_trainable_parameters(), wanted, strict=True))
    with pytest.raises(RuntimeError, match="rank 0"):
        PoseConditionedLoRAAttention(16, num_heads=4, rank=0).merge()


def test_the_code_of_an_uncertain_pose_is_the_mean_code():
    pose, error = torch.randn(6, 3).double(), torch.rand(6, 3).double() * 1.5
    draws = pose + error * torch.randn(200_000, 6, 3)
    wanted = torch.cat((draws.sin(), draws.cos()), -1).mean(0)
    torch.testing.assert_close(encode_pose(pose, error), wanted, atol=0.01, rtol=0)
    assert (encode_pose(pose, error) - encode_pose(pose)).abs().max() > 0.1


def test_an_exact_pose_is_coded_as_ever_and_an_unknown_one_not_at_all():
    pose = torch.randn(6, 3)
    assert torch.equal(encode_pose(pose, torch.zeros(6, 3)), encode_pose(pose))
    assert encode_pose(pose, torch.full((6, 3), 10.0)).abs().max() < 1e-20
    one = encode_pose(pose, torch.tensor([0.0, 10.0, 0.0]))  # only the yaw is unknown
    torch.testing.assert_close(one[:, [0, 2, 3, 5]], encode_pose(pose)[:, [0, 2, 3, 5]], rtol=0, atol=0)
    assert one[:, [1, 4]].abs().max() < 1e-20
