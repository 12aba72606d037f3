"""Head pose and keypoint geometry: Euler angles, rotations, and the face's own frame.

Conventions (InsightFace's, `landmark_3d_68` and `Face.pose`):

* coordinates: x to the image's right, y down, z toward the camera, in pixels;
* pose: (pitch, yaw, roll); +pitch looks up, +yaw turns the nose to the image's right,
  +roll turns the head clockwise as seen in the image;
* degrees in files, radians in tensors and in every function here;
* a point p of the face's own frame appears at R p, with R = Rz(roll) Ry(yaw) Rx(pitch);
* five keypoints, in this order: see `KEYPOINT_NAMES`.
"""

import numpy as np
import torch
from torch import Tensor

KEYPOINT_NAMES = ("left eye", "right eye", "nose", "mouth left", "mouth right")  # sides of the image
SEEN_FROM = {True: (1, 2, 4), False: (0, 2, 3)}  # rows of KEYPOINT_NAMES on the side that is seen, by yaw < 0
YAW_BINS = ((0, 30), (30, 45), (45, 60), (60, 75), (75, 90))  # |yaw| in degrees, upper end included in the last

# Where the five keypoints lie in a 112 x 112 aligned crop (ArcFace / InsightFace template), in pixels.
ARCFACE_TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)

# The mean of the shipped people's five keypoints in the face's own frame, about their mean; one unit is the distance
# from between the eyes to between the mouth corners. People differ from it by SHAPE_ERROR (standard deviation).
MEAN_FACE = (
    (-0.430, -0.512, -0.120),
    (0.430, -0.512, -0.120),
    (0.0, 0.060, 0.339),
    (-0.339, 0.482, -0.050),
    (0.339, 0.482, -0.050),
)
SHAPE_ERROR = 0.07
GAUSS_NEWTON_STEPS = 15


def rotation_matrix(angles: Tensor) -> Tensor:
    """(..., 3, 3) R = Rz(roll) Ry(yaw) Rx(pitch) of Euler angles (..., 3) pitch, yaw, roll in radians.

    >>> nose = torch.tensor([0.0, 0.0, 1.0])                       # straight at the camera
    >>> right = rotation_matrix(torch.tensor([0.0, torch.pi / 2, 0.0])) @ nose
    >>> [round(v) for v in right.tolist()]                         # +yaw: to the image's right
    [1, 0, 0]
    >>> up = rotation_matrix(torch.tensor([torch.pi / 2, 0.0, 0.0])) @ nose
    >>> [round(v) for v in up.tolist()]                            # +pitch: up, y points down
    [0, -1, 0]
    """
    if angles.shape[-1] != 3:
        raise ValueError(f"angles need a last dimension of 3 (pitch, yaw, roll), got shape {tuple(angles.shape)}")
    (sx, sy, sz), (cx, cy, cz) = angles.sin().unbind(-1), angles.cos().unbind(-1)
    rows = (
        (cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx),
        (sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
        (-sy, cy * sx, cy * cx),
    )
    return torch.stack([entry for row in rows for entry in row], -1).unflatten(-1, (3, 3))


def euler_angles(rotation: Tensor) -> Tensor:
    """(..., 3) pitch, yaw, roll in radians of rotations (..., 3, 3): undoes `rotation_matrix`, for |yaw| <= pi / 2."""
    pitch = torch.atan2(rotation[..., 2, 1], rotation[..., 2, 2])
    yaw = torch.asin((-rotation[..., 2, 0]).clamp(-1, 1))
    roll = torch.atan2(rotation[..., 1, 0], rotation[..., 0, 0])
    return torch.stack((pitch, yaw, roll), -1)


def normalise_keypoints(keypoints: Tensor) -> Tensor:
    """Keypoints (..., 5, 3) of any unit, centred on their mean, and their mean distance from it scaled to 1.

    Points that coincide but for rounding become zeros, without a gradient.
    """
    centred = keypoints - keypoints.mean(-2, keepdim=True)
    size = centred.norm(dim=-1).mean(-1)[..., None, None]
    rounding = 4 * torch.finfo(keypoints.dtype).eps * keypoints.abs().amax((-2, -1), keepdim=True)
    return centred / size.where(size > rounding, torch.inf)


def to_face_frame(keypoints: Tensor, angles: Tensor) -> Tensor:
    """R^T k: keypoints (..., 5, 3) as the camera sees them, in the face's own frame; angles (..., 3) in radians."""
    return keypoints @ rotation_matrix(angles)


def mean_keypoints(angles: Tensor) -> Tensor:
    """(..., 5, 3) `MEAN_FACE` turned by angles (..., 3) in radians: what stands for keypoints that nobody measured.

    >>> mean_keypoints(torch.tensor([0.0, torch.pi / 6, 0.0]))[2]  # the nose, .339 sin 30° to the right
    tensor([0.1695, 0.0600, 0.2936])
    """
    return torch.tensor(MEAN_FACE, dtype=angles.dtype, device=angles.device) @ rotation_matrix(angles).mT


def face_rotation(keypoints: Tensor) -> Tensor:
    """(..., 3, 3) the head's rotation, read off its keypoints (..., 5, 3) alone, which must not lie on one line.

    Its columns are the face's axes seen by the camera: x from the left to the right eye and mouth corner, y from the
    eyes to the mouth (made orthogonal to x), z out of the face. It differs from a fitted head pose by the (constant,
    small) tilt between the plane of eyes and mouth and the frontal plane.
    """
    left_eye, right_eye, _, mouth_left, mouth_right = keypoints.unbind(-2)
    across = (right_eye - left_eye) + (mouth_right - mouth_left)
    x = torch.nn.functional.normalize(across, dim=-1)
    down = (mouth_left + mouth_right) - (left_eye + right_eye)
    y = torch.nn.functional.normalize(down - (down * x).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack((x, y, torch.linalg.cross(x, y)), -1)


def fit_pose(points: Tensor, seen: Tensor, prior: Tensor, prior_error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head poses of keypoints of which some are hidden: the most likely turn of `MEAN_FACE` under weak perspective.

    Three points do not tell a pose, so it takes what is known beforehand: angles are normal about a prior, and seen
    points about the turned mean face, with `SHAPE_ERROR`. The maximum a posteriori by Gauss-Newton, its errors by
    Laplace's approximation, the inverse of J^T J.

    Args:
        points: (N, 5, 2) pixels; hidden ones hold any finite number.
        seen: (N, 5) bool, three or more each.
        prior, prior_error: (N, 3) pitch, yaw, roll in radians, and their standard deviations.

    Returns:
        angles (N, 3) in radians, their standard errors (N, 3), and all keypoints (N, 5, 3) in pixels: the seen ones
        where they were seen, the hidden ones and the depths (z toward the camera) from the fit.
    """
    if (fewest := int(seen.sum(1).min())) < 3:
        raise ValueError(f"a pose is fitted to at least 3 seen keypoints, got {fewest}")
    face, points = torch.tensor(MEAN_FACE, dtype=torch.float64), points.double()
    prior, prior_error, weight = prior.double(), prior_error.double(), seen.double()
    middle = (points * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    spread = ((points - middle[:, None]) * weight[..., None]).norm(dim=(1, 2))
    turned = face @ rotation_matrix(prior).mT
    size = turned[..., :2] - (turned[..., :2] * weight[..., None]).sum(1, keepdim=True) / weight.sum(1)[:, None, None]
    scale = spread / (size * weight[..., None]).norm(dim=(1, 2))  # pixels a unit, to begin with
    start = middle - scale[:, None] * ((turned[..., :2] * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))
    unknown = torch.cat(
        (prior, torch.zeros_like(scale)[:, None], start / scale[:, None]), 1
    )  # angles, log scale, shift

    def errors(unknown: Tensor, points: Tensor, weight: Tensor, prior: Tensor, error: Tensor, scale: Tensor) -> Tensor:
        """Of one face, in standard deviations."""
        found = unknown[3].exp() * (face @ rotation_matrix(unknown[:3]).mT)[:, :2] + unknown[4:]
        off = (found - points / scale) * weight[:, None] / SHAPE_ERROR
        return torch.cat((off.flatten(), (unknown[:3] - prior) / error))

    given = points, weight, prior, prior_error, scale
    for _ in range(GAUSS_NEWTON_STEPS):
        jacobian = torch.func.vmap(torch.func.jacfwd(errors))(unknown, *given)
        normal = jacobian.mT @ jacobian
        off = torch.func.vmap(errors)(unknown, *given)
        unknown = unknown - torch.linalg.solve(normal, (jacobian.mT @ off[..., None])[..., 0])
    errors_of = torch.linalg.inv(normal).diagonal(dim1=1, dim2=2)[:, :3].sqrt()
    whole = unknown[:, 3:4].exp()[..., None] * (face @ rotation_matrix(unknown[:, :3]).mT) * scale[:, None, None]
    flat = torch.where(seen[..., None], points, whole[..., :2] + (unknown[:, None, 4:] * scale[:, None, None]))
    return unknown[:, :3], errors_of, torch.cat((flat, whole[..., 2:]), -1)


def fit_similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The similarity transform that moves points closest to others (Umeyama 1991), without mirroring.

    Args:
        source: (N, 2) points, not all in one place.
        target: (N, 2) where they should go.

    Returns:
        (2, 3) matrix A; a point p goes to A[:, :2] p + A[:, 2].
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.shape != target.shape or source.shape[1:] != (2,):
        raise ValueError(f"source and target points must be (N, 2), got {source.shape} and {target.shape}")
    source_mean, target_mean = source.mean(0), target.mean(0)
    from_source, from_target = source - source_mean, target - target_mean
    variance = (from_source**2).sum() / len(source)
    if not (variance > 1e-12 and np.isfinite(target).all()):
        raise ValueError(
            "points must be finite and the source points must not all coincide, "
            f"got {source.tolist()} and {target.tolist()}"
        )
    left, strength, right = np.linalg.svd(from_target.T @ from_source / len(source))
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])  # -1 would mirror
    rotation = left @ np.diag(signs) @ right
    scale = (strength * signs).sum() / variance
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])
