"""Renders a head at an exact pose: aligned 112 x 112 crops as recognisers want them, or plain pictures.

Coordinates are those of `viewdiff_nb.faces.geometry`: x to the image's right, y down, z toward the
camera. Heads are in metres about their pivot; the pinhole camera looks at the pivot from
`CAMERA_DISTANCE`. Angles are (pitch, yaw, roll) in radians.
"""

from dataclasses import dataclass

import numpy as np
import torch

from viewdiff_nb.faces.crops import CROP_SIZE, FRONT_CROPS, crop_transforms
from viewdiff_nb.faces.geometry import rotation_matrix

from .raster import draw_mesh
from .scenes import GAMMA, Background, Light, check_numbers

PHOTO_SIZE = 256  # of the notional photo from which crops are cut, in pixels
PHOTO_FIELD = 0.40  # width of what a picture shows at the pivot, in metres
CAMERA_DISTANCE = 1.0  # metres
SUPERSAMPLING = 2
LARGEST_SIZE = 2048
STUDIO_LIGHT, GREY = Light(), Background()


@dataclass(frozen=True)
class Mesh:
    """A textured triangle mesh.

    Attributes:
        vertices: (V, 3) metres, in the face's own frame.
        normals: (V, 3) outward unit normals.
        uv: (V, 2) texture coordinates, 0..1, v counted from texture row 0.
        faces: (T, 3) vertex indices.
    """

    vertices: np.ndarray
    normals: np.ndarray
    uv: np.ndarray
    faces: np.ndarray

    def __post_init__(self):
        count = len(check_numbers("mesh vertices", self.vertices, (None, 3)))
        check_numbers("mesh normals", self.normals, (count, 3))
        check_numbers("mesh texture coordinates", self.uv, (count, 2), 0, 1)
        check_numbers("mesh faces", self.faces, (None, 3), 0, count - 1)


def rotation(angles):
    """(3, 3) float64 rotation of (pitch, yaw, roll) in radians."""
    return rotation_matrix(torch.from_numpy(check_numbers("angles", angles, (3,), -np.pi, np.pi))).numpy()


def project(points, angles, size=PHOTO_SIZE, field=PHOTO_FIELD):
    """Turn points with the head and see them through the camera.

    Args:
        points: (N, 3) metres, in the face's own frame.
        angles: (pitch, yaw, roll) in radians.
        size: side of the picture, in pixels.
        field: width of what the picture shows at the pivot, in metres.

    Returns:
        (N, 3) x right, y down from the picture's top left corner, z toward the camera, in pixels: each
        point turned and scaled by the picture's scale at its distance, so that z has the scale of x and
        y; and (N,) distances from the camera plane, in metres.
    """
    turned = check_numbers("points", points, (None, 3)) @ rotation(angles).T
    distance = CAMERA_DISTANCE - turned[:, 2]
    if (distance <= 0.05).any():
        raise ValueError(f"a point lies {distance.min():.3f} m from the camera; it must be 0.05 m or more away")
    scale = size / field * CAMERA_DISTANCE / distance
    return turned * scale[:, None] + (size / 2, size / 2, 0.0), distance


class HeadRenderer:
    """One head, ready to be rendered at any pose.

    Args:
        mesh: its `Mesh`.
        texture: (H, H, 3) uint8 stored RGB.
        keypoints: (5, 3) metres, in the face's own frame, in `KEYPOINT_NAMES` order.
    """

    def __init__(self, mesh, texture, keypoints):
        texture = np.asarray(texture)
        if texture.dtype != np.uint8 or texture.ndim != 3 or texture.shape != (len(texture), len(texture), 3):
            raise ValueError(f"texture must be square uint8 RGB (H, H, 3), got {texture.dtype} {texture.shape}")
        if len(texture) < 2:
            raise ValueError(f"texture must be 2 x 2 texels or more, got {texture.shape}")
        self.mesh = mesh
        self.keypoints = check_numbers("keypoints", keypoints, (5, 3))
        to_linear = ((np.arange(256) / 255) ** GAMMA).astype(np.float32)
        self._texture = to_linear[texture]
        self._uv = np.ascontiguousarray(mesh.uv, np.float64)
        self._faces = np.ascontiguousarray(mesh.faces, np.int32)

    def crops(self, angles, names=FRONT_CROPS, light=STUDIO_LIGHT, background=GREY, jitter=None, size=CROP_SIZE):
        """Aligned crops as a recogniser wants them, each drawn by itself, under one light and before one background.

        Args:
            angles: (pitch, yaw, roll) in radians.
            names: of K crops, see `viewdiff_nb.faces.crops`.
            light: the `Light`.
            background: the `Background`.
            jitter: (5, 3) error of the keypoint detector in pixels of the notional photo, or None for none.
            size: side of the crops in pixels; the template is scaled with it.

        Returns:
            (K, size, size, 3) uint8 RGB, and the (5, 3) keypoints with the jitter, in pixels of the notional
            photo of `PHOTO_SIZE` from which the crops are cut: x right, y down, z toward the camera.
        """
        size = check_size(size)
        keypoints, _ = project(self.keypoints, angles)
        if jitter is not None:
            keypoints = keypoints + check_numbers("jitter", jitter, (5, 3))
        transforms = crop_transforms(keypoints[:, :2], angles[1], names, size)
        drawn = [self._draw(angles, light, background, each, size, PHOTO_SIZE, PHOTO_FIELD) for each in transforms]
        return np.stack(drawn), keypoints

    def picture(self, angles, light=STUDIO_LIGHT, background=GREY, size=PHOTO_SIZE, field=PHOTO_FIELD):
        """An unaligned square picture with the head's pivot in the middle.

        Args:
            angles: (pitch, yaw, roll) in radians.
            light: the `Light`.
            background: the `Background`.
            size: side of the picture in pixels.
            field: width of what it shows at the pivot, in metres.

        Returns:
            (size, size, 3) uint8 RGB, and the (5, 3) keypoints in its pixels.
        """
        size = check_size(size)
        field = float(check_numbers("field", field, (), 0.05, 5.0))
        keypoints, _ = project(self.keypoints, angles, size, field)
        as_seen = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        return self._draw(angles, light, background, as_seen, size, size, field), keypoints

    def _draw(self, angles, light, background, alignment, size, photo_size, field):
        """Draw at `SUPERSAMPLING` times the size, average down in linear light, store as uint8."""
        photo, distance = project(self.mesh.vertices, angles, photo_size, field)
        screen = (photo[:, :2] @ alignment[:, :2].T + alignment[:, 2]) * SUPERSAMPLING
        # The picture's plane may be turned by the alignment; shading stays in the photo's frame.
        normals = self.mesh.normals @ rotation(angles).T
        canvas = background.paint(size).repeat(SUPERSAMPLING, 0).repeat(SUPERSAMPLING, 1)
        direction = np.array(light.direction) / np.linalg.norm(light.direction)
        draw_mesh(
            canvas,
            screen,
            distance,
            normals,
            self._uv,
            self._faces,
            self._texture,
            direction,
            np.array(light.colour, np.float64),
            float(light.ambient),
            float(light.gloss),
        )
        linear = canvas.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean((1, 3))
        return np.rint(linear ** (1 / GAMMA) * 255).astype(np.uint8)


def check_size(size):
    """A picture size as an int, or an error that names it."""
    if int(size) != size or not 8 <= size <= LARGEST_SIZE:
        raise ValueError(f"size must be a whole number of pixels from 8 to {LARGEST_SIZE}, got {size}")
    return int(size)
