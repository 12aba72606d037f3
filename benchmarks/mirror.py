"""People seen in a mirror: what recognisers need whose embedding is that of a crop, then that of its mirror image."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from viewdiff_nb.faces.views import KINDS, FaceDataError, FaceViews
from viewdiff_nb.files import read_json

MIRRORED_KEYPOINTS = (1, 0, 2, 4, 3)  # which keypoint of the mirror image is called by each name: left becomes right
FLIP_TEST = "crop and mirrored crop"  # in standard_info: an embedding is that of the crop, then that of its mirror


def has_mirrored_halves(folder: Path) -> bool:
    """Whether both metadata files of a set say, under `embedding` or after the recogniser's name, what halves are."""
    for kind in KINDS:
        info = read_json(folder / f"{kind}_metadata.json", FaceDataError).get("standard_info")
        if not isinstance(info, dict):
            return False
        if info.get("embedding") != FLIP_TEST and not str(info.get("recogniser", "")).endswith(f", {FLIP_TEST}"):
            return False
    return True


def mirrored(faces: FaceViews) -> FaceViews:
    """The same people in a mirror, in memory: halves of embeddings swapped, yaw, roll and keypoints mirrored.

    Keypoints are mirrored about x = 0, which suits models that centre them. Whether halves are those of a crop and of
    its mirror image only the set's files say, see `has_mirrored_halves`.

    Raises:
        ValueError: if embeddings have no halves.
    """
    if faces.feature_dim % 2:
        raise ValueError(f"embeddings of {faces.feature_dim} numbers have no halves that could be swapped")
    faces = faces.in_memory()
    return replace(
        faces,
        front=swap_halves(faces.front),
        src=swap_halves(faces.src[:]),
        keypoints_3d=mirror_keypoints(faces.keypoints_3d[:]),
        angles=faces.angles * torch.tensor([1.0, -1.0, -1.0], device=faces.device),
    )


def swap_halves(embeddings: Tensor) -> Tensor:
    """(..., D) with its two halves exchanged."""
    return embeddings.roll(embeddings.shape[-1] // 2, -1)


def mirror_keypoints(keypoints: Tensor) -> Tensor:
    """(..., 5, 3) mirrored about x = 0; what was left is then called right."""
    return keypoints[..., MIRRORED_KEYPOINTS, :] * torch.tensor([-1.0, 1.0, 1.0], device=keypoints.device)
