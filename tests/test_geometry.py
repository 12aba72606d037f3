import math

import numpy as np
import pytest
import torch

from viewdiff_nb.faces.geometry import (
    euler_angles,
    face_rotation,
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
