"""What controls change, and what they leave alone."""

import pytest
import torch
from torch import Tensor

from viewdiff_nb.modules.controls import (
    Bottleneck,
    KeypointDensity,
    MisledProjection,
    PlainProjection,
    add_bottlenecks,
    separate_views,
    train_only,
)
from viewdiff_nb.modules.projection import KEYPOINT_WIDTH, LightweightFaceProjectionLayer, gaussian_occupancy
from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D

WIDTH, BATCH = 24, 6
SIZES = {"d_model": 32, "nhead": 4, "num_layers": 2, "dim_feedforward": 48, "feature_dim": WIDTH}


@pytest.fixture
def layer() -> LightweightFaceProjectionLayer:
    torch.manual_seed(0)
    return LightweightFaceProjectionLayer(WIDTH, voxel_resolution=6, zero_init=False)


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor]:
    """Features, keypoints and poses of a batch."""
    random = torch.Generator().manual_seed(1)
    points = torch.randn(BATCH, 5, 3, generator=random)
    return torch.randn(BATCH, WIDTH, generator=random), points, 0.5 * torch.randn(BATCH, 3, generator=random)


def output(layer, mistake, features, points, pose) -> Tensor:
    mean = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    return MisledProjection(layer, mistake, mean)(features, points, source_pose=pose)


def test_mean_keypoints_leave_nothing_of_the_person(layer, given):
    features, points, pose = given
    found = output(layer, "mean keypoints", *given)
    torch.testing.assert_close(found, output(layer, "mean keypoints", features, points.flip(0), pose.flip(0)))
    assert not torch.allclose(found, layer(features, points, source_pose=pose), atol=1e-3)


def test_another_persons_keypoints_are_those_half_a_batch_away(layer, given):
    features, points, pose = given
    before = output(layer, "another person's keypoints", *given)
    points = points.clone()
    points[1] = points[1].flip(0)
    moved = (output(layer, "another person's keypoints", features, points, pose) - before).abs().amax(1) > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [1 + BATCH // 2]


def test_a_pose_that_is_not_undone_is_right_for_frontal_heads_only(layer, given):
    features, points, pose = given
    frontal = torch.zeros_like(pose)
    right = layer(features, points, source_pose=frontal)
    torch.testing.assert_close(output(layer, "pose not undone", features, points, frontal), right)
    assert not torch.allclose(output(layer, "pose not undone", *given), layer(features, points, source_pose=pose))


def test_another_pose_is_right_where_all_have_the_same(layer, given):
    features, points, pose = given
    same = pose[:1].expand_as(pose)
    right = layer(features, points, source_pose=same)
    torch.testing.assert_close(output(layer, "another pose", features, points, same), right)
    assert not torch.allclose(output(layer, "another pose", *given), layer(features, points, source_pose=pose))


def test_a_pose_must_be_there_to_be_wrong_about(layer, given):
    with pytest.raises(ValueError, match="source_pose must be given"):
        output(layer, "another pose", *given[:2], None)
    with pytest.raises(ValueError, match="frontal target only"):
        PlainProjection(WIDTH, 8)(*given[:2], given[2], given[2])


def test_a_plain_layer_starts_at_zero_and_uses_what_the_projection_is_told(given):
    plain = PlainProjection(WIDTH, 8)
    assert plain(*given[:2], source_pose=given[2]).eq(0).all()
    torch.nn.init.normal_(plain.expand.weight)
    inputs = [value.clone().requires_grad_() for value in given]
    plain(*inputs[:2], source_pose=inputs[2]).sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in inputs)
    assert sum(p.numel() for p in plain.parameters()) == 8 * (2 * WIDTH + 37) + WIDTH


def test_the_regulariser_has_the_gradient_of_the_share_that_is_not_near():
    torch.manual_seed(0)
    layer = KeypointDensity(WIDTH, 5, 4, how="draw")
    logit, keypoints = torch.randn(3, 1, 4, 4, 4, requires_grad=True), torch.rand(3, 5, 3) - 0.5
    layer.density(logit, keypoints).sum().mul(0).backward()
    found, logit.grad = logit.grad.clone(), None
    density = LightweightFaceProjectionLayer.density(layer, logit, keypoints)
    occupancy = gaussian_occupancy(keypoints, 4, KEYPOINT_WIDTH)
    share = (density * (1 - occupancy.amax(1, keepdim=True))).flatten(1).sum(1) / density.flatten(1).sum(1)
    (layer.DRAWN * share.mean()).backward()
    torch.testing.assert_close(found, logit.grad)


@pytest.mark.parametrize("how", ["start", "carve"])
def test_density_lies_at_the_keypoints(given, how):
    torch.manual_seed(0)
    layer = KeypointDensity(WIDTH, 5, 12, how=how)
    points = torch.zeros(2, 5, 3)
    points[:, :, 0] = torch.linspace(-0.1, 0.1, 5)  # all in the middle, in units of their own spread
    _, volume = layer(given[0][:2], points, source_pose=torch.zeros(2, 3), return_volume=True)
    near = volume.occupancy.amax(1, keepdim=True) > 0.5
    assert volume.density[near].mean() > 3 * volume.density[~near].mean()
    plain = LightweightFaceProjectionLayer(WIDTH, 5, 12)
    _, volume = plain(given[0][:2], points, source_pose=torch.zeros(2, 3), return_volume=True)
    assert volume.density[near].mean() < 3 * volume.density[~near].mean()


def test_bottlenecks_change_nothing_at_first_and_alone_are_trained(given):
    torch.manual_seed(0)
    model = EnhancedTransformerDecoderOnly3D(**SIZES, use_lora_attention=False, use_projection_layer=False).eval()
    torch.nn.init.normal_(model.output.weight)
    before = model(given[0], given[2], given[1])
    add_bottlenecks(model, 3)
    torch.testing.assert_close(model(given[0], given[2], given[1]), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".1.down." in name or ".1.up." in name for name in trained)
    per_adapter = 2 * 32 * 3 + 32 + 3
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * per_adapter
    assert Bottleneck(4, 2)(torch.ones(1, 4)).eq(1).all()


def test_what_is_not_named_is_frozen():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    train_only(model, name_ends_with=("bias",))
    assert [p.requires_grad for p in model.parameters()] == [False, True, False, True]
    train_only(model, name_starts_with=("1.",))
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    with pytest.raises(ValueError, match="no parameter ends with"):
        train_only(model, ("gamma",))


def test_separate_views_do_not_meet(given):
    features, points, pose = given
    options = SIZES | {"use_lora_attention": False, "use_projection_layer": False, "use_cross_view": True, "n_views": 3}
    torch.manual_seed(0)
    model = EnhancedTransformerDecoderOnly3D(**options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    other = features.clone()
    other[1] = -other[1]

    def moved() -> list[int]:
        change = (model(other, pose, points) - model(features, pose, points)).abs().amax(1)
        return (change > 1e-5).nonzero()[:, 0].tolist()

    count = sum(p.numel() for p in model.parameters())
    assert moved() == [0, 1, 2]  # its person's views
    separate_views(model)
    assert moved() == [1] and sum(p.numel() for p in model.parameters()) == count
    plain = EnhancedTransformerDecoderOnly3D(**SIZES)
    with pytest.raises(ValueError, match="no cross-view attention"):
        separate_views(plain)


@pytest.mark.parametrize("mistake", ["pose not undone", "another pose", "mean keypoints", "another person's keypoints"])
def test_a_misled_projection_still_turns_to_the_target(layer, given, mistake):
    features, points, pose = given
    mean = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    misled, target = MisledProjection(layer, mistake, mean), torch.tensor([[0.0, 0.7, 0.0]]).expand(BATCH, 3)
    frontal = misled(features, points, source_pose=pose)
    turned = misled(features, points, target, pose)
    assert (turned - frontal).abs().amax() > 1e-3


def test_another_pose_is_that_of_the_sample_half_a_batch_away(layer, given):
    features, points, pose = given
    torch.testing.assert_close(
        output(layer, "another pose", *given), layer(features, points, source_pose=pose[[3, 4, 5, 0, 1, 2]])
    )


def test_what_density_starts_and_where():
    layer = KeypointDensity(WIDTH, 5, 4, how="start")
    keypoints = torch.full((1, 5, 3), -0.75) * torch.tensor([1.0, 1.0, -1.0])  # in the centre of the first voxel
    density = layer.density(torch.zeros(1, 1, 4, 4, 4), keypoints)
    torch.testing.assert_close(density[0, 0, 0, 0, 0], torch.tensor(2.0).exp().log1p())  # softplus(-4 + 6)
    torch.testing.assert_close(density[0, 0, 3, 3, 3], torch.tensor(-4.0).exp().log1p(), rtol=1e-3, atol=0)
    plain = LightweightFaceProjectionLayer(WIDTH, 5, 4).density(torch.zeros(1), keypoints)
    torch.testing.assert_close(plain, torch.tensor([-1.0]).exp().log1p())
