"""A person's usable frames: which of them is the front, and how they are kept between runs."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..files import read_torch, write_atomically

PARTS_VERSION = 2
BLUR_COST = 5.0  # degrees away from frontal that weigh as much as half the sharpness
ARRAYS = ("features", "keypoints", "poses", "sharpness")


@dataclass
class Person:
    """A person's frames: arrays features (n, D), keypoints (n, 5, 3), poses (n, 3), sharpness (n,), and their entries.

    entries: n dicts with person_name, image_path and, of videos, frame_index.
    failed: dicts with reason, person_name, image_path, error and, of videos, frame_index.
    """

    arrays: dict[str, np.ndarray]
    entries: list[dict]
    failed: list[dict]


def frontal_angles(poses: np.ndarray) -> np.ndarray:
    """Angle between where the face looks and the camera; roll does not count, alignment undoes it.

    Args:
        poses: (N, 3) pitch, yaw, roll in degrees.

    Returns:
        (N,) degrees.

    >>> frontal_angles(np.array([[0.0, 0.0, 20.0], [0.0, -30.0, 0.0], [45.0, 45.0, 0.0]])).round(3).tolist()
    [0.0, 30.0, 60.0]
    """
    pitch, yaw = np.deg2rad(poses[:, 0]), np.deg2rad(poses[:, 1])
    return np.rad2deg(np.arccos(np.clip(np.cos(pitch) * np.cos(yaw), -1, 1)))


def choose_front(poses: np.ndarray, sharpness: np.ndarray, front_angle: float = 15.0) -> int | None:
    """The most frontal and sharp frame: smallest angle + BLUR_COST · log2(sharpest / sharpness).

    So a frame of half the sharpness must be BLUR_COST degrees more frontal. Only frames within front_angle take
    part, and the sharpest is the sharpest of them; of equals the first is taken.

    Args:
        poses: (N, 3) pitch, yaw, roll in degrees.
        sharpness: (N,) variance of the Laplacian.
        front_angle: degrees.

    Returns:
        the row, or None if no frame is frontal enough.

    >>> poses = np.array([[0.0, 1.0, 0.0], [0.0, 8.0, 0.0], [0.0, 40.0, 0.0]])
    >>> choose_front(poses, np.array([20.0, 300.0, 900.0])), choose_front(poses, np.array([200.0, 300.0, 900.0]))
    (1, 0)
    """
    angles = frontal_angles(poses)
    near = np.flatnonzero(angles <= front_angle)
    if not len(near):
        return None
    sharp = np.maximum(sharpness[near], 1e-6)
    return int(near[(angles[near] + BLUR_COST * np.log2(sharp.max() / sharp)).argmin()])


class DamagedPart(ValueError):
    """A part that cannot be read."""


def save_part(path: Path, fingerprint: str, person: Person) -> None:
    """Write a person's frames; the file appears whole or not at all."""
    content = {"fingerprint": fingerprint, "entries": person.entries, "failed": person.failed,
               "arrays": {name: torch.from_numpy(values) for name, values in person.arrays.items()}}  # fmt: skip
    write_atomically(path, lambda file: torch.save(content, file))


def load_part(path: Path, fingerprint: str) -> Person | None:
    """A person's frames; None if they are not there or damaged, or were made of other files or with other options."""
    if not path.is_file():
        return None
    try:
        part = read_torch(path, DamagedPart)
    except DamagedPart:
        return None  # so it is made anew
    if not isinstance(part, dict) or part.get("fingerprint") != fingerprint:
        return None
    if not {"arrays", "entries", "failed"} <= set(part):
        return None
    arrays = {name: values.numpy() for name, values in part["arrays"].items()}
    return Person(arrays, part["entries"], part["failed"])


def fingerprint_of(files: list[Path], photos: Path, settings: dict) -> str:
    """Changes with the names, sizes and times of a person's files, and with the settings."""
    stats = [(path.relative_to(photos).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([PARTS_VERSION, settings, stats], sort_keys=True).encode()).hexdigest()
