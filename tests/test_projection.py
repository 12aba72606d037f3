import math

import pytest
import torch
from conftest import DEVICES
from torch import nn
from torch.autograd import gradcheck

from viewdiff_nb import LightweightFaceProjectionLayer
from viewdiff_nb.faces.geometry import rotation_matrix
from viewdiff_nb.modules import projection as volume

FACE = torch.tensor([[-30.0, -30, 0], [30, -30, 0], [0, 0, 25], [-20, 30, 0], [20, 30, 0]])


def layer(resolution=8, width=12, **options):
    return LightweightFaceProjectionLayer(width, voxel_resolution=resolution, zero_init=False, **options)


def seen(angles, face=FACE):
    """The keypoints of a face that the camera sees at these angles."""
    return face.to(angles.dtype) @ rotation_matrix(angles).transpose(-1, -2)


def over_background(features, weights, background):
    """The rendering of features (B, C, R, R, R) in front of a background (C,)."""
    return volume.composite(features, weights) + (1 - weights.sum(2)) * background[:, None, None]


def transparent(projection: nn.Module) -> nn.Module:
    """A layer whose CNN passes the occupancy on: density and shares are equal blobs at the keypoints."""
    first, _, last = projection.refine
    with torch.no_grad():
        projection.compress.weight.zero_()
        projection.compress.bias.fill_(1.0)
        for conv in (first, last):
            conv.weight.zero_()
            conv.bias.zero_()
        for k in range(5):
            first.weight[k, k, 1, 1, 1] = 10.0
            last.weight[0, k, 1, 1, 1] = 10.0
            last.weight[1 + k, k, 1, 1, 1] = 1.0
    return projection


@pytest.mark.parametrize("shape", [(3, 12), (3, 12, 1, 1), (3, 12, 7, 7), (3, 12, 5, 9)])
@pytest.mark.parametrize("resolution", [8, 16, 32])
def test_output_has_the_shape_of_the_input_and_starts_at_zero(shape, resolution):
    features, pose = torch.randn(shape), torch.zeros(3, 3)
    new = LightweightFaceProjectionLayer(12, voxel_resolution=resolution)
    assert torch.equal(new(features, seen(pose), pose), torch.zeros(shape))
    output = layer(resolution)(features, seen(pose), pose)
    assert output.shape == shape and output.isfinite().all() and output.abs().max() > 0


def test_vector_and_one_pixel_map_agree():
    projection, features, pose = layer(), torch.randn(3, 12), torch.randn(3, 3) * 0.3
    torch.testing.assert_close(
        projection(features[..., None, None], seen(pose), pose)[..., 0, 0], projection(features, seen(pose), pose)
    )


def test_constant_map_agrees_with_its_vector_inside():
    projection, pose = layer(), torch.zeros(1, 3)
    vector = torch.randn(1, 12)
    per_point = projection._keypoint_features(vector, seen(pose) / 100)
    from_map = projection._keypoint_features(vector[..., None, None].expand(1, 12, 9, 9), seen(pose) / 100)
    torch.testing.assert_close(from_map, per_point, rtol=1e-5, atol=1e-6)


def test_rendering_the_shares_equals_rendering_the_feature_volume():
    """The layer composites K shares and mixes features afterwards; the same as compositing all channels."""
    projection = layer().double()
    nn.init.normal_(projection.background)
    pose = torch.tensor([[0.1, 0.4, 0.2], [0.0, -0.7, 0.0]]).double()
    _, seen_volume = projection(torch.randn(2, 12).double(), seen(pose), pose * 0.5, return_volume=True)
    image = over_background(seen_volume.features, seen_volume.weights, projection.background)
    torch.testing.assert_close(seen_volume.image, image)
    torch.testing.assert_close(seen_volume.weights, volume.ray_weights(seen_volume.density, 2 / 8))


def test_every_keypoint_every_pose_and_the_features_matter():
    projection, pose = layer().double(), torch.tensor([[0.1, 0.5, 0.0]]).double()
    features, points = torch.randn(1, 12).double(), seen(pose)
    output = projection(features, points, pose, pose)
    for k in range(5):
        for axis in range(3):
            moved = points.clone()
            moved[0, k, axis] += 3.0
            assert (projection(features, moved, pose, pose) - output).abs().max() > 1e-6, (k, axis)
    assert (projection(features, points, pose + 0.3, pose) - output).abs().max() > 1e-5
    assert (projection(features, points, pose, pose + 0.3) - output).abs().max() > 1e-5
    assert (projection(features + 1, points, pose, pose) - output).abs().max() > 1e-5


def test_the_source_pose_is_undone():
    """The same face seen from anywhere makes the same volume, with the pose given or read off the keypoints."""
    projection, features = layer().double(), torch.randn(1, 12).double().expand(4, -1)
    angles = (torch.rand(4, 3).double() - 0.5) * torch.tensor([1.0, 3.0, 1.0]).double()
    for source in (angles, None):
        output, seen_volume = projection(features, seen(angles), None, source, return_volume=True)
        torch.testing.assert_close(output, output[:1].expand_as(output))
        torch.testing.assert_close(seen_volume.occupancy, seen_volume.occupancy[:1].expand(4, -1, -1, -1, -1))


def test_place_and_size_of_the_face_do_not_matter():
    projection, features, pose = layer().double(), torch.randn(1, 12).double(), torch.zeros(1, 3).double()
    a = projection(features, seen(pose), pose)
    torch.testing.assert_close(projection(features, seen(pose) * 4 + 77, pose), a)


@pytest.mark.parametrize("axis,direction", [(1, (1, 0)), (0, (0, -1)), (2, (0, 0))])
def test_the_rendered_nose_moves_as_geometry_says(axis, direction):
    """+yaw moves the nose to the image's right, +pitch up, roll leaves it where it is."""
    projection = transparent(layer(32)).double()
    features, frontal = torch.ones(1, 12).double(), torch.zeros(1, 3).double()
    turned = frontal.clone()
    turned[0, axis] = 0.5

    def nose(pose):
        _, v = projection(features, seen(frontal), pose, frontal, return_volume=True)
        splat = volume.composite(v.shares[:, 2:3], torch.ones_like(v.weights)).clamp_min(0)[0, 0]
        c = volume.axis_centres(32, dtype=torch.float64)
        place = torch.stack(((splat * c).sum(), (splat * c[:, None]).sum())) / splat.sum()
        torch.testing.assert_close(place, v.keypoints[0, 2, :2], atol=0.03, rtol=0)
        return place

    step = nose(turned) - nose(frontal)
    reach = nose_length() * torch.sin(torch.tensor(0.5)).item()
    expected = torch.tensor(direction).double() * reach
    torch.testing.assert_close(step, expected, atol=0.06, rtol=0)


def nose_length():
    """Distance of the nose from the centre of the keypoints, in grid units, along z."""
    centred = FACE - FACE.mean(0)
    return (centred[2, 2] / centred.norm(dim=1).mean() * 0.5).item()


def test_mirrored_face_gives_the_mirrored_picture():
    projection = transparent(layer(16)).double()
    features, pose = torch.ones(1, 12).double(), torch.tensor([[0.0, 0.6, 0.0]]).double()
    _, one = projection(features, seen(pose * 0), pose, pose * 0, return_volume=True)
    _, other = projection(features, seen(pose * 0), -pose, pose * 0, return_volume=True)
    torch.testing.assert_close(other.density.sum(2), one.density.sum(2).flip(-1))


def test_gradients_reach_everything():
    projection, pose = layer(), torch.randn(2, 3) * 0.3
    points = seen(pose).requires_grad_()
    projection(torch.randn(2, 12), points, pose, pose).square().sum().backward()
    for name, parameter in projection.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert points.grad.abs().sum(dim=-1).min() > 0


@pytest.mark.parametrize("turned", [False, True])
def test_large_grids_go_in_turns_with_the_same_result(monkeypatch, turned):
    projection, pose = layer().double(), torch.randn(5, 3).double() * 0.3
    features, points = torch.randn(5, 12).double(), seen(pose)
    target = pose.flip(0) if turned else None
    results = []
    for budget in (10**9, 2 * 8**3):  # all at once, two at a time
        monkeypatch.setattr(volume, "VOXEL_BUDGET", budget)
        projection.zero_grad()
        output = projection(features, points, target)
        output.square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(projection(features, points, target), output)
        results.append([output, *(p.grad for p in projection.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("batch", [8, 64])
def test_activations_at_32_take_at_most_four_times_those_at_16(batch):
    """The guide's claim, for all that the layer keeps between forward and backward, and for one part in turn."""
    kept = {resolution: kept_bytes(layer(resolution), batch) for resolution in (16, 32)}
    assert kept[32] <= 4 * kept[16]


def kept_bytes(projection, batch):
    """Bytes that a training step holds at its worst moment: kept for backward, plus one part's volumes."""
    pose = torch.zeros(batch, 3)
    weights = {p.untyped_storage().data_ptr() for p in projection.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        projection(torch.randn(batch, 12), seen(pose))
    between = sum(kept.values())
    voxels = min(volume.VOXEL_BUDGET, batch * volume.FINE**3)
    part = max(1, voxels // projection.voxel_resolution**3)
    if part >= batch:
        return between
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        projection._render(seen(pose[:part]) / 100, torch.ones(part, 5, requires_grad=True), None)
    return between + sum(kept.values())


def test_refuses_wrong_shapes():
    projection = layer()
    good, points = torch.randn(2, 12), torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match=r"features must be \(B, 12\) .* got \(2, 11\)"):
        projection(good[:, :11], points)
    with pytest.raises(ValueError, match=r"keypoints_3d must be \(2, 5, 3\), got \(2, 4, 3\)"):
        projection(good, points[:, :4])
    with pytest.raises(ValueError, match=r"target_pose \(pitch, yaw, roll\) must be \(2, 3\), got \(3,\)"):
        projection(good, points, torch.zeros(3))
    with pytest.raises(ValueError, match="at least 4, got 2"):
        LightweightFaceProjectionLayer(12, voxel_resolution=2)


def random_density(resolution=8):
    return torch.rand(2, 1, resolution, resolution, resolution, dtype=torch.float64) * 5


def test_an_empty_grid_renders_the_background():
    weights = volume.ray_weights(torch.zeros(1, 1, 8, 8, 8), 0.25)
    assert weights.abs().max() == 0
    features, background = torch.randn(1, 3, 8, 8, 8), torch.tensor([1.0, 2.0, 3.0])
    assert volume.composite(features, weights).abs().max() == 0
    image = over_background(features, weights, background)
    assert torch.equal(image, background.view(1, 3, 1, 1).expand(1, 3, 8, 8))


def test_an_opaque_voxel_hides_what_is_behind_it():
    density, features = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    density[0, 0, [2, 5], 3, 4] = 1e6
    features[0, 0, 2, 3, 4], features[0, 0, 5, 3, 4] = 7.0, 99.0
    image = volume.composite(features, volume.ray_weights(density, 0.25))
    assert image[0, 0, 3, 4] == 7.0 and image.sum() == 7.0


def test_weights_are_a_sub_distribution_even_behind_very_dense_voxels():
    density = random_density() ** 8
    density[0, 0, 3] = 1e9
    for dtype in (torch.float32, torch.float64):
        weights = volume.ray_weights(density.to(dtype), 0.25)
        assert weights.min() >= 0 and weights.sum(2).max() <= 1 + 1e-6
    background = 1 - volume.ray_weights(density, 0.25).sum(2)
    torch.testing.assert_close(background, torch.exp(-(density * 0.25).sum(2)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("resolution", [4, 16, 64])
def test_constant_density_decays_exponentially(resolution):
    sigma, step = 3.0, 2 / resolution
    density = torch.full((1, 1, resolution, 2, 2), sigma, dtype=torch.float64)
    depth = step * torch.arange(resolution, dtype=torch.float64)
    torch.testing.assert_close(volume.transmittance(density, step)[0, 0, :, 0, 0], torch.exp(-sigma * depth))
    total = volume.ray_weights(density, step).sum(2)
    torch.testing.assert_close(total, torch.full_like(total, 1 - math.exp(-2 * sigma)))


def test_gaussian_occupancy_is_the_gaussian_of_the_distance():
    keypoints = torch.randn(2, 5, 3, dtype=torch.float64) * 0.4
    occupancy = volume.gaussian_occupancy(keypoints, 7, width=0.3)
    distance = (volume.voxel_centres(7, dtype=torch.float64)[None, None] - keypoints[:, :, None, None, None]).norm(
        dim=-1
    )
    torch.testing.assert_close(occupancy, torch.exp(-(distance**2) / (2 * 0.3**2)))


def test_lift_is_the_sum_over_keypoints():
    features, occupancy = torch.randn(2, 5, 3), torch.rand(2, 5, 4, 4, 4)
    torch.testing.assert_close(volume.lift(features, occupancy), torch.einsum("bkc,bkzyx->bczyx", features, occupancy))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_quarter_turns_permute_voxels_exactly(axis):
    """What was at p is found at R p, checked voxel by voxel without any interpolation."""
    angles = torch.zeros(1, 3, dtype=torch.float64)
    angles[0, axis] = torch.pi / 2
    rotation = rotation_matrix(angles)
    scene = torch.randn(1, 2, 6, 6, 6, dtype=torch.float64)
    turned = volume.rotate(scene, rotation)
    points = volume.voxel_centres(6, dtype=torch.float64).view(-1, 3)
    moved = points @ rotation[0].T
    index = ((moved + 1) * 3 - 0.5).round().long()
    depth = 5 - index[:, 2]
    torch.testing.assert_close(turned[0, :, depth, index[:, 1], index[:, 0]], scene[0].flatten(1), rtol=1e-9, atol=1e-9)


WIDTH = 0.2


def blobs(points, resolution):
    return volume.gaussian_occupancy(points[None], resolution, WIDTH).sum(1, keepdim=True)


def trilinear_bound(resolution):
    """|error| <= 3 axes * h^2 / 8 * max|f''|, with f'' <= 1 / width^2 for a Gaussian (blobs do not overlap)."""
    return 3 * (2 / resolution) ** 2 / 8 / WIDTH**2


def test_turning_the_grid_equals_turning_the_points_and_converges():
    points = torch.tensor([[0.3, -0.2, 0.1], [-0.2, 0.3, -0.3]], dtype=torch.float64)
    rotation = rotation_matrix(torch.tensor([[0.3, 0.7, -0.2]], dtype=torch.float64))
    errors = []
    for resolution in (8, 16, 32):
        turned = volume.rotate(blobs(points, resolution), rotation)
        errors.append((turned - blobs(points @ rotation[0].T, resolution)).abs().max().item())
        assert errors[-1] < trilinear_bound(resolution)
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


def test_camera_and_scene_rotations_are_inverse():
    """Turning by theta and back by -theta gives the scene, up to an interpolation error that shrinks."""
    points = torch.tensor([[0.2, -0.1, 0.3], [-0.3, 0.2, 0.0]], dtype=torch.float64)
    theta = torch.tensor([[0.2, 0.5, 0.1]], dtype=torch.float64)
    errors = []
    for resolution in (8, 16, 32):
        scene = blobs(points, resolution)
        back = volume.rotate(volume.rotate(scene, rotation_matrix(theta)), rotation_matrix(theta).transpose(1, 2))
        errors.append((back - scene).abs().max().item())
        assert errors[-1] < 2 * trilinear_bound(resolution)
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


def test_gradients_in_double_precision():
    keypoints = (torch.randn(1, 2, 3, dtype=torch.float64) * 0.3).requires_grad_()
    features = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    density = (torch.rand(1, 1, 4, 4, 4, dtype=torch.float64) + 0.1).requires_grad_()
    background = torch.randn(2, dtype=torch.float64, requires_grad=True)
    angles = torch.tensor([[0.2, 0.5, -0.3]], dtype=torch.float64, requires_grad=True)

    def render(keypoints, features, density, background, angles):
        voxels = volume.lift(features, volume.gaussian_occupancy(keypoints, 4, 0.4))
        scene = volume.rotate(torch.cat((density, voxels), 1), rotation_matrix(angles))
        return over_background(scene[:, 1:], volume.ray_weights(scene[:, :1], 0.5), background)

    assert gradcheck(render, (keypoints, features, density, background, angles))


@pytest.mark.parametrize("resolution", [4, 7])
def test_convolved_splats_are_the_convolution_of_the_occupancy(resolution):
    """In value and in all gradients, against torch's own convolution; a keypoint lies at the border."""
    torch.manual_seed(resolution)
    convolution = nn.Conv3d(5, 3, 3, padding=1, dtype=torch.float64)
    points = torch.rand(2, 5, 3, dtype=torch.float64, requires_grad=True)
    gains = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, *3 * [resolution], dtype=torch.float64)
    occupancy = gains[..., None, None, None] * volume.gaussian_occupancy(points, resolution, volume.KEYPOINT_WIDTH)
    wanted, found = convolution(occupancy), volume.splat_and_convolve(points, gains, convolution, resolution)
    torch.testing.assert_close(found, wanted)
    known = [points, gains, *convolution.parameters()]
    for one, other in zip(
        torch.autograd.grad((wanted * weights).sum(), known),
        torch.autograd.grad((found * weights).sum(), known),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("resolution", [4, 7])
def test_a_convolution_in_planes_is_the_one_in_space(resolution):
    """In value and in all gradients, against torch's own; which a GPU takes below resolution 16."""
    torch.manual_seed(resolution)
    convolution = nn.Conv3d(5, 3, 3, padding=1, dtype=torch.float64)
    grid = torch.randn(2, 5, *3 * [resolution], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, *3 * [resolution], dtype=torch.float64)
    known = [grid, *convolution.parameters()]
    for one, other in zip(
        torch.autograd.grad((convolution(grid) * weights).sum(), known),
        torch.autograd.grad((volume.convolve_in_planes(grid, convolution) * weights).sum(), known),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(convolution(grid), volume.convolve_in_planes(grid, convolution))


if "cuda" in DEVICES:

    @pytest.mark.parametrize("resolution", [16, 32])
    def test_a_fine_grid_on_a_gpu_is_that_of_the_cpu(resolution):
        torch.manual_seed(0)
        layer = LightweightFaceProjectionLayer(32, 5, resolution, zero_init=False)
        features, keypoints, pose = torch.randn(3, 32), torch.randn(3, 5, 3), torch.rand(3, 3)
        wanted = layer(features, keypoints, pose, pose)
        found = layer.cuda()(features.cuda(), keypoints.cuda(), pose.cuda(), pose.cuda())
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-2, atol=1e-3)  # convolutions are in TF32
