import itertools
import math

import numpy as np
import pytest
import torch

from viewdiff_nb.faces.geometry import (
    MEAN_FACE,
    SEEN_FROM,
    SHAPE_ERROR,
    euler_angles,
    face_rotation,
    fit_pose,
    fit_similarity,
    normalise_keypoints,
    rotation_matrix,
    to_face_frame,
)

FACE = torch.tensor(  # a frontal face in its own frame: eyes, nose toward the camera, mouth
    [[-30.0, -30, 0], [30, -30, 0], [0, 0, 25], [-20, 30, 0], [20, 30, 0]], dtype=torch.float64
)


def test_rotations_are_rotations_and_euler_angles_come_back():
    angles = (torch.rand(500, 3, dtype=torch.float64) - 0.5) * torch.tensor([3.0, 3.1, 6.2])
    rotation = rotation_matrix(angles)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), torch.eye(3).double().expand(500, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(500).double())
    torch.testing.assert_close(euler_angles(rotation), angles)


def test_order_is_roll_after_yaw_after_pitch():
    x, y, z = torch.tensor([0.3, -0.5, 0.8]).double()
    zero = torch.tensor(0.0).double()
    parts = [rotation_matrix(torch.stack(a)) for a in ((zero, zero, z), (zero, y, zero), (x, zero, zero))]
    torch.testing.assert_close(rotation_matrix(torch.stack((x, y, z))), parts[0] @ parts[1] @ parts[2])


def test_positive_roll_turns_clockwise_in_the_image():
    right = rotation_matrix(torch.tensor([0.0, 0.0, torch.pi / 2])) @ torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(right, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)  # y points down


def test_face_frame_undoes_the_pose():
    angles = torch.tensor([[0.2, 1.3, -0.4], [0.0, -0.9, 0.1]]).double()
    seen = FACE @ rotation_matrix(angles).transpose(1, 2)
    torch.testing.assert_close(to_face_frame(seen, angles), FACE.expand(2, 5, 3))


def test_rotation_read_off_the_keypoints():
    angles = torch.tensor([[0.2, 1.3, -0.4], [0.0, -0.9, 0.1]]).double()
    seen = FACE @ rotation_matrix(angles).transpose(1, 2) * 3 + torch.tensor([100.0, 50, 7])
    torch.testing.assert_close(face_rotation(seen), rotation_matrix(angles))


def test_normalised_keypoints_do_not_depend_on_place_and_size():
    normal = normalise_keypoints(FACE)
    torch.testing.assert_close(normal.mean(0), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(normal.norm(dim=1).mean(), torch.tensor(1.0).double())
    torch.testing.assert_close(normalise_keypoints(FACE * 7 - 40), normal)
    assert normalise_keypoints(torch.zeros(5, 3)).isfinite().all()


def test_gradient_of_normalised_keypoints():
    keypoints = (FACE + torch.randn(2, 5, 3).double()).requires_grad_()
    assert torch.autograd.gradcheck(normalise_keypoints, keypoints)


@pytest.mark.parametrize("place", [0.0, 0.1, -1234.567])  # the mean of five equal numbers may be rounded
def test_coincident_points_become_zero_with_a_finite_gradient(place):
    both = torch.stack((torch.full((5, 3), place), FACE.float())).requires_grad_()
    normal = normalise_keypoints(both)
    assert not normal[0].any()
    torch.testing.assert_close(normal[1], normalise_keypoints(FACE).float())
    (normal * 100 * torch.randn(2, 5, 3)).sum().backward()
    assert both.grad.isfinite().all() and both.grad[1].any()


def test_refuses_two_angles():
    with pytest.raises(ValueError, match=r"last dimension of 3 .* got shape \(4, 2\)"):
        rotation_matrix(torch.zeros(4, 2))


def test_similarity_recovers_a_known_transform():
    turn, scale, shift = 0.7, 2.5, np.array([3.0, -8.0])
    matrix = scale * np.array([(math.cos(turn), -math.sin(turn)), (math.sin(turn), math.cos(turn))])
    source = np.array([(0, 0), (4, 1), (2, 5), (-3, 2.0)])
    found = fit_similarity(source, source @ matrix.T + shift)
    np.testing.assert_allclose(found, np.column_stack([matrix, shift]), atol=1e-12)


def test_similarity_never_mirrors():
    source = np.array([(0, 0), (4, 1), (2, 5), (-3, 2.0)])
    found = fit_similarity(source, source * (-1, 1))
    assert np.linalg.det(found[:, :2]) > 0


def test_points_in_one_place_are_refused():
    with pytest.raises(ValueError, match="source points must not all coincide"):
        fit_similarity(np.ones((3, 2)), np.ones((3, 2)))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (np.ones((3, 3)), np.ones((3, 3)), r"must be \(N, 2\), got \(3, 3\) and \(3, 3\)"),
        (np.eye(2), np.ones((3, 2)), r"must be \(N, 2\), got \(2, 2\) and \(3, 2\)"),
        (np.eye(2), np.array([[0.0, 1.0], [np.nan, 2.0]]), "points must be finite .*nan"),
        (np.array([[0.0, 1.0], [np.nan, 2.0]]), np.eye(2), "points must be finite .*nan"),
    ],
)
def test_points_that_cannot_be_fitted_are_refused(source, target, message):
    with pytest.raises(ValueError, match=message):
        fit_similarity(source, target)


MEAN = torch.tensor(MEAN_FACE).double()
ALL, NONE = torch.ones(5, dtype=torch.bool), torch.zeros(3).double()


def random_poses(count, yaw=80):
    """Radians, of heads that look anywhere."""
    return (2 * torch.rand(count, 3).double() - 1) * torch.tensor([30.0, yaw, 40]).deg2rad().double()


def photographed(angles, faces=MEAN):
    """Faces in their own frame turned, and each scaled and shifted: (N, 5, 3) pixels."""
    size, place = 20 + 80 * torch.rand(len(angles), 1, 1).double(), 400 * torch.rand(len(angles), 1, 3).double()
    return faces @ rotation_matrix(angles).mT * size + place * torch.tensor([1.0, 1.0, 0.0])


def side_seen(angles):
    """(N, 5) the three points of the side that is seen."""
    seen = torch.zeros(len(angles), 5, dtype=torch.bool)
    for row, yaw in enumerate(angles[:, 1].tolist()):
        seen[row, list(SEEN_FROM[yaw < 0])] = True
    return seen


def test_the_pose_of_a_mean_face_is_found():
    angles = random_poses(50, yaw=70)
    points = photographed(angles)
    prior = angles + 0.2 * (2 * torch.rand(50, 3) - 1)  # only to begin with
    found, error, keypoints = fit_pose(points[..., :2], ALL.expand(50, 5), prior, torch.full((50, 3), 1e4))
    torch.testing.assert_close(found, angles, atol=1e-6, rtol=0)
    torch.testing.assert_close(keypoints[..., :2], points[..., :2], atol=0, rtol=0)
    torch.testing.assert_close(
        keypoints[..., 2] - keypoints[..., 2:].mean(1), points[..., 2] - points[..., 2:].mean(1), atol=1e-3, rtol=0
    )
    assert (error > 0).all()


def test_hidden_points_are_filled_in():
    """Three points and the right pose; where the hidden ones are said to be does not matter."""
    angles = random_poses(50)
    points, seen = photographed(angles), side_seen(angles)
    given = points[..., :2].where(seen[..., None], 1e3 * torch.randn(50, 5, 2))
    found, _, keypoints = fit_pose(given, seen, angles, torch.full((50, 3), 0.1))
    torch.testing.assert_close(found, angles, atol=1e-8, rtol=0)
    torch.testing.assert_close(keypoints, points, atol=1e-5, rtol=0)


def test_place_size_and_hidden_points_change_no_pose():
    angles = random_poses(20)
    seen, prior = side_seen(angles), angles + 0.1 * torch.randn(20, 3)
    points = photographed(angles)[..., :2] + torch.randn(20, 5, 2)
    wanted, wanted_error, keypoints = fit_pose(points, seen, prior, torch.full((20, 3), 0.3))
    moved = (7 * points - 300).where(seen[..., None], 0.0)
    found, error, moved_keypoints = fit_pose(moved, seen, prior, torch.full((20, 3), 0.3))
    torch.testing.assert_close((found, error), (wanted, wanted_error))
    torch.testing.assert_close(moved_keypoints, 7 * keypoints - torch.tensor([300.0, 300, 0]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("hidden", "yaw", "spread"), [(False, 0.0, (20, 20, 20)), (True, 60.0, (10, 10, 20))])
def test_errors_of_poses_are_as_large_as_they_are_said_to_be(hidden, yaw, spread):
    """Faces that differ from the mean as people do, and angles that differ from the prior as the prior says."""
    count, spread = 2000, torch.tensor(spread).deg2rad().double()
    prior = torch.tensor([0.0, yaw, 0.0]).deg2rad().double().expand(count, 3)
    angles = prior + spread * torch.randn(count, 3)
    faces = MEAN + SHAPE_ERROR * torch.randn(count, 5, 3)
    seen = side_seen(angles) if hidden else ALL.expand(count, 5)
    found, error, _ = fit_pose(photographed(angles, faces)[..., :2], seen, prior, spread.expand(count, 3))
    z = (found - angles) / error
    assert ((z.std(0) - 1).abs() < 0.1).all(), z.std(0)
    assert (z.mean(0).abs() < 0.2).all() and (error.mean(0) < spread).all()


def test_a_tighter_prior_leaves_smaller_errors():
    angles = random_poses(20)
    points, seen = photographed(angles, MEAN + SHAPE_ERROR * torch.randn(20, 5, 3))[..., :2], side_seen(angles)
    errors = [fit_pose(points, seen, angles, torch.full((20, 3), spread))[1] for spread in (0.5, 0.2, 0.05, 1e-4)]
    for wider, tighter in itertools.pairwise(errors):
        assert (tighter < wider).all()
    torch.testing.assert_close(errors[-1], torch.full((20, 3), 1e-4).double(), rtol=1e-3, atol=0)
    exact, _, _ = fit_pose(points, seen, angles + 0.2, torch.full((20, 3), 1e-6))
    torch.testing.assert_close(exact, angles + 0.2, atol=1e-6, rtol=0)


def test_two_points_tell_no_pose():
    seen = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 0]]).bool()
    with pytest.raises(ValueError, match="a pose is fitted to at least 3 seen keypoints, got 2"):
        fit_pose(torch.randn(2, 5, 2), seen, NONE.expand(2, 3), torch.ones(2, 3))


def test_a_pose_does_not_hang_on_the_others_of_its_batch():
    angles = random_poses(6)
    points, seen = photographed(angles)[..., :2], side_seen(angles)
    points[1] *= 40
    given = (angles + 0.3, torch.full((6, 3), 0.2))
    together = fit_pose(points, seen, *given)
    for i in range(6):
        alone = fit_pose(points[i : i + 1], seen[i : i + 1], *(value[i : i + 1] for value in given))
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[i], other[0])


def test_a_far_face_beside_a_near_one_keeps_its_shape():
    tiny = 1e-3 * FACE.float()
    both = torch.stack((tiny, 1e5 * FACE.float()))
    torch.testing.assert_close(normalise_keypoints(both)[0], normalise_keypoints(tiny[None])[0])


def test_axes_of_a_crooked_face_by_hand():
    """Eyes and mouth that are no rectangle: x along both, y what is left of the way down, z out of the face."""
    face = torch.tensor([[-3.0, -4, 0], [3, -2, 0], [0, 0, 2], [-2, 3, 0], [2, 3, 0]], dtype=torch.float64)
    across, down = torch.tensor([10.0, 2, 0]).double(), torch.tensor([0.0, 12, 0]).double()
    x = across / 104**0.5
    y = down - 24 / 104 * across  # orthogonal to across
    y = y / y.norm()
    wanted = torch.stack((x, y, torch.tensor([0.0, 0, 1]).double()), 1)
    torch.testing.assert_close(face_rotation(face), wanted)
    torch.testing.assert_close(face_rotation(face.expand(4, 5, 3)), wanted.expand(4, 3, 3))


@pytest.mark.parametrize("yaw", [-math.pi / 2, math.pi / 2])
def test_a_sine_that_rounding_made_larger_than_1_has_an_angle(yaw):
    rotation = rotation_matrix(torch.tensor([[0.0, yaw, 0.0]], dtype=torch.float64)) * (1 + 1e-9)
    torch.testing.assert_close(euler_angles(rotation)[0, 1].item(), yaw)
