"""A voxel grid drawn as cubes, in about ten milliseconds at 16³: painter's algorithm, orthographic.

Grids are (R, R, R) with axes (depth, y, x) as in `modules.volume`; points are (x right, y down, z toward the camera)
in grid coordinates, [-1, 1].
"""

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..faces.geometry import rotation_matrix
from ..modules.volume import voxel_centres

INK, PAPER, FRAME = (40, 40, 40), (255, 255, 255), (170, 170, 170)
FIELD = 1.9  # half of what the picture shows, in grid units: the cube's corner, seen from anywhere
STEPS = np.vstack([np.eye(3), -np.eye(3)])  # the six directions of a cube's sides, as points


def draw_cubes(
    shown: np.ndarray,
    colours: np.ndarray,
    azimuth: float = -30.0,
    elevation: float = 20.0,
    size: int = 640,
    points: np.ndarray | None = None,
    names: tuple[str, ...] = (),
) -> Image.Image:
    """Draw some voxels of a grid.

    Args:
        shown: (R, R, R) bool, the voxels to draw.
        colours: (R, R, R, 3) RGB in 0..1.
        azimuth: degrees that the grid is turned about the vertical, as yaw turns a head.
        elevation: degrees from which the camera looks down on it.
        size: of the square picture, pixels.
        points: (K, 3) marks over the cubes, e.g. keypoints; names: theirs.
    """
    about_y, about_x = rotation_matrix(torch.tensor([[0.0, azimuth, 0.0], [-elevation, 0.0, 0.0]]).deg2rad()).numpy()
    turn = about_x @ about_y
    scale = size / 2 / FIELD
    picture = Image.new("RGB", (size, size), PAPER)
    draw = ImageDraw.Draw(picture)
    _draw_frame(draw, turn, scale, size)
    corners, depth, paint = _faces(shown, colours, turn)
    order = depth.argsort()  # far ones first
    xy = (corners[order] @ turn[:2].T) * scale + size / 2
    for polygon, fill in zip(xy.reshape(len(xy), 8).tolist(), paint[order].tolist(), strict=True):
        draw.polygon(polygon, fill=tuple(fill))
    _name_axes(draw, turn, scale, size)
    if points is not None:
        _draw_points(draw, points @ turn.T * scale + size / 2, names, size)
    return picture


def _faces(shown: np.ndarray, colours: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sides that face the camera and are not covered by a neighbour: corners (N, 4, 3), depth (N,), RGB (N, 3)."""
    resolution = len(shown)
    centres, half = _centres(resolution), 1 / resolution
    padded = np.pad(shown, 1)
    corners, paints, middles = [], [], []
    for step in STEPS[STEPS @ turn[2] > 1e-6]:
        x, y, z = step.astype(int)
        at = np.roll(padded, (z, -y, -x), (0, 1, 2))[1:-1, 1:-1, 1:-1]  # depth runs against z
        bare = shown & ~at
        across = half * np.roll(step, 1)
        along = half * np.roll(step, 2)
        square = np.stack([across + along, across - along, -across - along, along - across])
        middle = centres[bare] + half * step
        corners.append(middle[:, None] + square)
        middles.append(middle @ turn[2])
        light = 0.62 + 0.38 * max(0.0, float(turn @ step @ (-0.35, -0.6, 0.72)))
        paints.append((colours[bare] * light * 255).clip(0, 255).astype(np.uint8))
    if not corners:
        return np.zeros((0, 4, 3)), np.zeros(0), np.zeros((0, 3), np.uint8)
    return np.concatenate(corners), np.concatenate(middles), np.concatenate(paints)


def _draw_frame(draw: ImageDraw.ImageDraw, turn: np.ndarray, scale: float, size: int) -> None:
    """The grid's edges behind the cubes."""
    ends = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    near = (ends @ turn[2]).argmax()
    xy = ends @ turn[:2].T * scale + size / 2
    for i in range(8):
        for j in range(i + 1, 8):
            if (ends[i] != ends[j]).sum() == 1 and near not in (i, j):
                draw.line([*xy[i], *xy[j]], fill=FRAME, width=max(1, size // 400))


def _name_axes(draw: ImageDraw.ImageDraw, turn: np.ndarray, scale: float, size: int) -> None:
    """The names of the axes beside edges that are seen."""
    side, front = (1 if turn[2, axis] >= 0 else -1 for axis in (0, 2))  # of x and z, the faces that are seen
    labels = (("x, image right", (0, 1.12, front), "mt"), ("z, to camera", (side, 1.12, 0), "mt"),
              ("y, down", (-side * 1.04, 0, front), "rm" if side * front > 0 else "lm"))  # fmt: skip
    for name, place, anchor in labels:
        at = np.array(place) @ turn[:2].T * scale + size / 2
        draw.text(tuple(at), name, INK, _font(size // 32), anchor=anchor)


def _draw_points(draw: ImageDraw.ImageDraw, xyz: np.ndarray, names: tuple[str, ...], size: int) -> None:
    radius, font = size / 90, _font(size // 32)
    for i in xyz[:, 2].argsort():
        x, y = xyz[i, :2]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(214, 39, 40), outline=PAPER)
        if names:
            draw.text((x + 1.5 * radius, y), names[i], INK, font, anchor="lm", stroke_width=2, stroke_fill=PAPER)


@lru_cache(maxsize=4)
def _centres(resolution: int) -> np.ndarray:
    return voxel_centres(resolution).double().numpy()


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings, so that pictures look alike everywhere."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
