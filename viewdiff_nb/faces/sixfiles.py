"""Writes a face set: the guide's six files, which `viewdiff_nb.faces.views.load_face_views` reads."""

import json
from pathlib import Path

import numpy as np

from ..files import write_atomically, write_text
from .geometry import KEYPOINT_NAMES

KINDS = ("front", "video")
CONVENTIONS = {  # of poses and keypoints, as the metadata states them; see viewdiff_nb.faces.geometry
    "pose_order": ["pitch", "yaw", "roll"],
    "pose_unit": "degrees",
    "pose_signs": "+pitch looks up, +yaw turns the nose to the image's right, +roll is clockwise",
    "rotation": "Rz(roll) Ry(yaw) Rx(pitch)",
    "keypoint_names": list(KEYPOINT_NAMES),
    "keypoint_axes": "x right, y down, z toward the camera",
}


def write_samples(folder, kind, features, keypoints, poses, entries, info):
    """Write the three files of one half of a set; each appears whole or not at all.

    Args:
        folder: where to.
        kind: "front" or "video".
        features: (N, D) embeddings.
        keypoints: (N, 5, 3) pixels.
        poses: (N, 3) pitch, yaw, roll in degrees.
        entries: N dicts with at least `person_name`.
        info: dict, the metadata's `standard_info`.
    """
    counts = {len(features), len(keypoints), len(poses), len(entries)}
    if kind not in KINDS or len(counts) != 1:
        raise ValueError(f"kind must be one of {KINDS} and all counts equal, got {kind!r} and counts {sorted(counts)}")
    folder = Path(folder)
    for part, array in (("feature", features), ("keypoints", keypoints)):
        write_atomically(
            folder / f"{kind}_{part}.npy", lambda file, array=array: np.save(file, array, allow_pickle=False)
        )
    write_text(folder / f"{kind}_metadata.json", metadata_text(features.shape[1], info, poses, entries))


def metadata_text(feature_dim, info, poses, entries):
    """A metadata file: compact JSON with one sample a line."""
    pose_lines = ",\n".join(
        json.dumps([float(angle) for angle in pose], separators=(",", ":")) for pose in poses
    )
    entry_lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries)
    return (
        f'{{"num_samples":{len(poses)},\n"feature_dim":{feature_dim},\n'
        f'"standard_info":{json.dumps(info, separators=(",", ":"))},\n'
        f'"poses":[\n{pose_lines}\n],\n"metadata":[\n{entry_lines}\n]}}\n'
    )
