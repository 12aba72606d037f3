import pytest
import torch
from torch import nn

from viewdiff_nb import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.faces.geometry import rotation_matrix
from viewdiff_nb.modules.lora import LoRALinearLayer, lora_layers
from viewdiff_nb.modules.transformer import MEMORY_TOKENS, fuse_views

SMALL = {
    "d_model": 32,
    "nhead": 4,
    "num_layers": 2,
    "dim_feedforward": 48,
    "voxel_resolution": 8,
    "n_views": 3,
    "dropout": 0.0,
}


def build(lora=False, projection=False, cross_view=False, **options):
    return EnhancedTransformerDecoderOnly3D(
        use_lora_attention=lora, use_projection_layer=projection, use_cross_view=cross_view, **SMALL | options
    )


def trained_base():
    base = build()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.1)
    return base


def inputs(batch=6, width=32):
    angles = torch.rand(batch, 3) - 0.5
    return {
        "src": torch.randn(batch, width),
        "angles": angles,
        "keypoints_3d": 30 * torch.randn(batch, 5, 3),
        "pose": angles,
    }


MODULES = {
    "lora": {"lora": True},
    "feed forward": {"lora": True, "lora_targets": ("attention", "feed_forward")},
    "projection": {"projection": True},
    "cross-view": {"cross_view": True},
    "all": {"lora": True, "projection": True, "cross_view": True},
}
ADDED = {
    "lora": {"lora"},
    "feed forward": {"lora"},
    "projection": {"projection"},
    "cross-view": {"cross_view"},
    "all": {"lora", "projection", "cross_view"},
}


@pytest.mark.parametrize("case", MODULES)
def test_step_0_equals_the_base(case):
    base, model, x = trained_base(), build(**MODULES[case]), inputs()
    model.load_base(base.state_dict())
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(**x), base.train(mode)(**x), rtol=0, atol=1e-6)
    assert base(**x).abs().max() > 0.1


@pytest.mark.parametrize("case", MODULES)
def test_every_added_parameter_trains_and_the_frozen_base_does_not(case):
    model, x = build(**MODULES[case]), inputs()
    model.load_base(trained_base().state_dict())
    model.freeze_base()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    roles = model.parameter_roles()
    for _ in range(3):  # zero-initialised layers pass no gradient on in the first step
        optimizer.zero_grad()
        (model(**x) - 1).square().sum().backward()
        optimizer.step()
    dead = [n for n, p in model.named_parameters() if roles[n] != "base" and (p.grad is None or not p.grad.abs().sum())]
    # a bias common to all keys is removed by softmax
    assert [name for name in dead if name != "cross_view.0.key.bias"] == []
    for name, p in model.named_parameters():
        if roles[name] == "base":
            assert p.grad is None and torch.equal(p, before[name]), name
    assert set(model.parameter_groups()) == ADDED[case]


def test_every_base_parameter_trains():
    model, x = trained_base(), inputs()
    (model(**x) - 1).square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert dead == []


def test_residual_and_frontal_prediction_differ_by_the_input():
    model, x = trained_base(), inputs()
    torch.testing.assert_close(model(**x, return_residual=False), x["src"] + model(**x))


def test_every_input_matters():
    model = build(lora=True, projection=True)
    model.load_base(trained_base().state_dict())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = inputs()
    output = model(**x)
    for name, value in x.items():
        changed = model(**x | {name: value + torch.randn_like(value)})
        assert (changed - output).abs().max() > 1e-3, name


def test_prediction_scales_with_the_embedding_and_ignores_where_the_face_is():
    model, x = trained_base(), inputs()
    output = model(**x)
    torch.testing.assert_close(model(**x | {"src": 20 * x["src"]}), 20 * output, rtol=1e-4, atol=1e-4)
    moved = x | {"keypoints_3d": 3 * x["keypoints_3d"] + 200}
    torch.testing.assert_close(model(**moved), output, rtol=1e-3, atol=1e-4)
    assert model(**x | {"src": torch.zeros(6, 32)}).isfinite().all()


def test_pose_defaults_to_the_head_pose():
    model, x = build(lora=True), inputs()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.testing.assert_close(model(**x | {"pose": None}), model(**x))


@pytest.mark.parametrize("case", [*MODULES, "base"])
def test_a_pose_without_error_is_an_exact_one_to_the_last_bit(case):
    model, x = build(**MODULES.get(case, {})), inputs()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    exact = model(**x)
    assert torch.equal(model(**x, pose_error=torch.zeros(6, 3)), exact)
    assert torch.equal(model(**x, pose_error=None), exact)
    assert (model(**x, pose_error=torch.full((6, 3), 0.5)) - exact).abs().max() > 1e-4


def test_an_unknown_yaw_leaves_the_pose_token_without_it():
    """The keypoints in the face's own frame know the yaw still, so only that token is looked at."""
    model, x = trained_base(), inputs()
    turned = x["angles"] + torch.tensor([0.0, 1.0, 0.0])

    def token(angles, error):
        return model._encode_memory(angles, x["keypoints_3d"], torch.tensor(error).expand(6, 3))[:, 0]

    unknown, known = [0.0, 20.0, 0.0], [0.0, 0.0, 0.0]
    assert torch.equal(token(turned, unknown), token(x["angles"], unknown))
    assert (token(turned, known) - token(x["angles"], known)).abs().max() > 1e-3
    pitched = x["angles"] + torch.tensor([1.0, 0.0, 0.0])
    assert (token(pitched, unknown) - token(x["angles"], unknown)).abs().max() > 1e-3  # which is known still


def test_attention_over_named_tokens():
    model, x = trained_base(), inputs()
    output, weights = model(**x, return_attention=True)
    assert weights.shape == (6, 2, 4, 1, 1 + len(MEMORY_TOKENS))
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, 2, 4, 1))
    torch.testing.assert_close(output, model(**x))
    assert weights.std() > 1e-3


def test_embeddings_of_another_width():
    model = build(lora=True, projection=True, feature_dim=20)
    assert model(**inputs(width=20)).shape == (6, 20)


def test_guide_size_is_about_ten_million():
    base = EnhancedTransformerDecoderOnly3D(use_lora_attention=False, use_projection_layer=False)
    assert 9.5e6 < sum(p.numel() for p in base.parameters()) < 10.5e6


def test_blocks_do_not_share_weights():
    model = build(lora=True)
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
    assert len({layer.weight.data_ptr() for layer in lora_layers(model).values()}) == 8


def test_lora_targets():
    assert len(lora_layers(build(lora=True))) == 8
    assert len(lora_layers(build(lora=True, lora_targets=("attention", "feed_forward")))) == 12
    assert isinstance(build(lora=True, lora_targets=("feed_forward",)).blocks[0].linear1, LoRALinearLayer)
    assert not lora_layers(build(lora=False))
    with pytest.raises(ValueError, match=r"lora_targets must be among .* got \['embedding'\]"):
        build(lora=True, lora_targets=("embedding",))


def test_base_checkpoints_are_checked_both_ways():
    model, state = build(lora=True), trained_base().state_dict()
    short = {name: value for name, value in state.items() if name != "norm.weight"}
    with pytest.raises(ValueError, match=r"1 parameters missing \['norm.weight'\]"):
        model.load_base(short)
    with pytest.raises(ValueError, match=r"1 unknown \['extra'\]"):
        model.load_base(state | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"other sizes: .* is \(32, 32\) instead of \(64, 64\)"):
        EnhancedTransformerDecoderOnly3D(**SMALL | {"d_model": 64}, feature_dim=32).load_base(state)


def test_an_adapted_model_can_be_a_base():
    """Cross-view attention on top of LoRA and projection: everything loaded, nothing changed at step 0."""
    adapted, x = build(lora=True, projection=True), inputs()
    for parameter in adapted.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = build(lora=True, projection=True, cross_view=True)
    model.load_base(adapted.state_dict())
    torch.testing.assert_close(model.eval()(**x), adapted.eval()(**x), rtol=0, atol=1e-6)


def test_views_meet_where_asked():
    model = build(cross_view=True, cross_view_after=(0, 2))
    assert list(model.cross_view) == ["0", "2"]
    with pytest.raises(ValueError, match=r"cross_view_after must be among 0..2, got \(3,\)"):
        build(cross_view=True, cross_view_after=(3,))


def test_fused_views_are_the_mean_of_unit_predictions():
    fused = fuse_views(torch.tensor([[2.0, 0.0], [0.0, 7.0], [1.0, 0.0], [1.0, 0.0]]), 2)
    torch.testing.assert_close(fused, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))


def test_building_is_deterministic_given_the_seed_and_seeds_nothing_itself():
    torch.manual_seed(5)
    first = build(lora=True, projection=True).state_dict()
    after = torch.rand(3)
    torch.manual_seed(5)
    second = build(lora=True, projection=True).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(after, torch.rand(3))


def test_cross_view_needs_whole_people():
    with pytest.raises(ValueError, match="got 7 with n_views=3; use 6 or 9"):
        build(cross_view=True)(**inputs(7))


def test_refuses_wrong_shapes():
    model, x = build(), inputs()
    with pytest.raises(ValueError, match=r"src must be \(6, 32\), got \(6, 31\)"):
        model(**x | {"src": x["src"][:, 1:]})
    with pytest.raises(ValueError, match=r"angles must be \(6, 3\)"):
        model(**x | {"angles": x["angles"][:, :2]})
    with pytest.raises(ValueError, match=r"keypoints_3d must be \(6, 5, 3\), got \(6, 4, 3\)"):
        model(**x | {"keypoints_3d": x["keypoints_3d"][:, 1:]})


def test_the_face_volume_is_what_the_model_renders():
    """Its image, expanded, is what the model adds to its feature token."""
    model, given = build(projection=True).eval(), inputs()
    nn.init.normal_(model.projection.expand.weight)
    seen = []
    model.projection.register_forward_hook(lambda _, __, output: seen.append(output))
    model(**given)
    found = model.face_volume(**{name: given[name] for name in ("src", "angles", "keypoints_3d")})
    torch.testing.assert_close(model.projection._to_features(found.image, (1, 1)).flatten(1), seen[0])
    assert found.density.shape == (6, 1, 8, 8, 8)


def test_the_face_volume_has_the_resolution_and_pose_asked_for():
    model, given = build(projection=True).eval(), inputs()
    given = {name: given[name] for name in ("src", "angles", "keypoints_3d")}
    assert model.face_volume(**given, resolution=5).features.shape[2:] == (5, 5, 5)
    assert model.projection.voxel_resolution == 8
    half_turn = torch.tensor([[0.0, torch.pi, 0.0]]).expand(6, 3)
    frontal, turned = model.face_volume(**given), model.face_volume(**given, target_pose=half_turn)
    torch.testing.assert_close(turned.density, frontal.density.flip(2, 4), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned.keypoints, frontal.keypoints * torch.tensor([-1.0, 1.0, -1.0]))
    with pytest.raises(ValueError, match="no projection layer; build it with use_projection_layer=True"):
        build().face_volume(**given)


def test_the_projection_turns_to_the_target_pose():
    model = build(projection=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    given, target = inputs(), torch.tensor([[0.0, 0.8, 0.0]]).expand(6, 3)
    seen = []
    model.projection.register_forward_hook(lambda layer, taken, out: seen.append(taken))
    model(**given, target_pose=target)
    assert seen[0][2] is target and seen[0][3] is given["angles"]
    frontal = model(**given)
    torch.testing.assert_close(model(**given, target_pose=torch.zeros(6, 3)), frontal, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(**given, target_pose=target), frontal, atol=1e-3)


def test_a_model_without_projection_cannot_turn():
    with pytest.raises(ValueError, match="use_projection_layer=True"):
        build()(**inputs(), target_pose=torch.zeros(6, 3))


def test_the_base_by_hand():
    """One block against its definition, in torch's own operations: every token, norm and residual."""
    torch.manual_seed(3)
    model, given = build(num_layers=1).double().eval(), {k: v.double() for k, v in inputs().items()}
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    src, angles, points = given["src"], given["angles"], given["keypoints_3d"]
    length = src.norm(dim=1, keepdim=True)
    seen = points - points.mean(1, keepdim=True)
    seen = seen / seen.norm(dim=2).mean(1)[:, None, None]
    own = seen @ rotation_matrix(angles)
    code = torch.cat((angles.sin(), angles.cos()), 1)
    pose = model.pose_encoder(code)[:, None]
    memory = torch.cat((pose, model.keypoint_encoder(torch.cat((seen, own), 2)) + model.keypoint_identity), 1)
    x = model.input(src / length * 32**0.5)[:, None] + pose
    block = model.blocks[0]
    normed = block.norm1(x)
    attention = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    query, key, value = block.attention.query, block.attention.key, block.attention.value
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat((query.weight, key.weight, value.weight)))
        attention.in_proj_bias.copy_(torch.cat((query.bias, torch.zeros(32), value.bias)))  # the key has none
        attention.out_proj.weight.copy_(block.attention.out.weight)
        attention.out_proj.bias.copy_(block.attention.out.bias)
    tokens = torch.cat((normed, memory), 1)
    x = x + attention(normed, tokens, tokens, need_weights=False)[0]
    x = x + block.linear2(nn.functional.gelu(block.linear1(block.norm2(x))))
    torch.testing.assert_close(model(**given), model.output(model.norm(x[:, 0])) * length)


def test_views_that_only_fill_up_are_seen_by_nobody():
    """Before the first block, and after others."""
    for after in ((0,), (1, 2)):
        model, x = build(cross_view=True, cross_view_after=after).eval(), inputs()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        mask = torch.tensor([True, True, False] * 2)
        other = x | {"src": torch.where(mask[:, None], x["src"], -x["src"])}
        found, changed = model(**x, view_mask=mask)[mask], model(**other, view_mask=mask)[mask]
        torch.testing.assert_close(found, changed)
        assert not torch.allclose(model(**x)[mask], model(**other)[mask], atol=1e-3)
