"""How a face is cut out of a picture: aligned to the 112 x 112 template by five or three points, at one or more scales.

A crop is named alignment@scale, "five@1" is the usual one. A recogniser may embed several crops of a picture, and the
sum counts (`viewdiff_nb.faces.recogniser`).

* five: the similarity transform that brings all five keypoints closest to the template (Umeyama 1991). Seen from the
  side it makes faces small, since five points of a profile are narrower than the template's.
* three: only eye, nose and mouth corner of the side that is seen.
* scale: the face is enlarged by that factor about `CENTRE`.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from viewdiff_nb.faces.geometry import ARCFACE_TEMPLATE, SEEN_FROM, fit_similarity

CROP_SIZE = 112
CENTRE = (56.0, 60.0)  # pixels of the crop
ALIGNMENTS = ("five", "three")
SCALES = (0.5, 2.0)
PROFILE = 45.0  # degrees of |yaw| from which on a view is cropped as a profile
FRONT_CROPS = ("five@1",)
PROFILE_CROPS = ("five@1.12", "three@1.12")  # chosen on CFP's training folds, see docs/real_faces.md


def parse_crop(name: str) -> tuple[str, float]:
    """Alignment and scale of a crop's name.

    >>> parse_crop("three@1.12")
    ('three', 1.12)
    """
    alignment, _, scale = name.partition("@")
    try:
        factor = float(scale)
    except ValueError:
        factor = np.nan
    if alignment not in ALIGNMENTS or not SCALES[0] <= factor <= SCALES[1]:
        low, high = SCALES
        wanted = f"{' or '.join(ALIGNMENTS)}, @, and a scale from {low:g} to {high:g}, as in five@1"
        raise ValueError(f"a crop is named by {wanted}; got {name!r}")
    return alignment, factor


def check_crop_names(names: Sequence[str]) -> None:
    """A ValueError if there is none, or one that names no crop."""
    if not names:
        raise ValueError(f"crops must name one crop or more, got {names!r}")
    for name in names:
        parse_crop(name)


def crops_of(yaw: float, profile_crops: Sequence[str] = PROFILE_CROPS) -> Sequence[str]:
    """The crops of a view whose yaw is given in degrees."""
    return profile_crops if abs(yaw) >= PROFILE else FRONT_CROPS


def crop_transforms(points: np.ndarray, yaw: float, crops: Sequence[str], size: int = CROP_SIZE) -> np.ndarray:
    """
    Args:
        points: (5, 2) keypoints in pixels of the picture.
        yaw: of the head, any unit; its sign says which side is seen.
        crops: names of K crops.
        size: side of the crops in pixels.

    Returns:
        (K, 2, 3): a point p of the picture goes to A[:, :2] p + A[:, 2] of the crop.
    """
    template, found = np.array(ARCFACE_TEMPLATE), []
    for name in crops:
        alignment, scale = parse_crop(name)
        rows = list(SEEN_FROM[yaw < 0]) if alignment == "three" else slice(None)
        transform = fit_similarity(points[rows], template[rows]) * scale
        transform[:, 2] += (1 - scale) * np.array(CENTRE)
        found.append(transform * (size / CROP_SIZE))
    return np.stack(found)


def cut_crops(picture: np.ndarray | Image.Image, transforms: np.ndarray, size: int = CROP_SIZE) -> np.ndarray:
    """(K, size, size, 3) uint8 crops of a picture (H, W, 3) of uint8; what lies outside of it is black."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    crops = []
    for transform in transforms:
        back = np.linalg.inv(transform[:, :2])
        corner = -back @ transform[:, 2]
        rows = (*back[0], corner[0], *back[1], corner[1])
        crop = image.transform((size, size), Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC)
        crops.append(np.asarray(crop))
    return np.stack(crops)
