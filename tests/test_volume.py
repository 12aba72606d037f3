import math

import pytest
import torch
from torch.autograd import gradcheck

from viewdiff_nb.faces.geometry import rotation_matrix
from viewdiff_nb.modules import projection as volume


def random_density(resolution=8):
    return torch.rand(2, 1, resolution, resolution, resolution, dtype=torch.float64) * 5


def test_an_empty_grid_renders_the_background():
    weights = volume.ray_weights(torch.zeros(1, 1, 8, 8, 8), 0.25)
    assert weights.abs().max() == 0
    features, background = torch.randn(1, 3, 8, 8, 8), torch.tensor([1.0, 2.0, 3.0])
    assert volume.composite(features, weights).abs().max() == 0
    image = volume.composite(features, weights, background)
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
        return volume.composite(scene[:, 1:], volume.ray_weights(scene[:, :1], 0.5), background)

    assert gradcheck(render, (keypoints, features, density, background, angles))
