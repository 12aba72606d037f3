"""Finished results of studies, kept so that a second run only does what is missing."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..faces.splits import Split
from ..paths import RUNS


class Store:
    """Finished results, one JSON file per key: config, data and version.

    Training times are those of the machine, and of its load, on which a result was made.
    """

    def __init__(self, split: Split, folder: Path = RUNS) -> None:
        self.folder = folder / "study"
        self.data = fingerprint(split)

    def path(self, key: dict) -> Path:
        text = json.dumps(key | {"data": self.data, "version": __version__}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def get(self, key: dict, make: Callable[[Path], dict]) -> dict:
        """The stored result of key, or make(path), stored; make may put further files beside path."""
        if (found := self.find(key)) is not None:
            return found
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"key": key} | make(path)))
        os.replace(part, path)
        return json.loads(path.read_text())

    def find(self, key: dict) -> dict | None:
        """The stored result of key; None if there is none."""
        path = self.path(key)
        return json.loads(path.read_text()) if path.is_file() else None

    def get_with_weights(self, key: dict, make: Callable[[Path], dict]) -> tuple[Path, dict]:
        """As `get`, for a make that also writes a checkpoint, path with suffix .pth; made again if that is gone."""
        checkpoint = self.path(key).with_suffix(".pth")
        if not checkpoint.is_file():
            self.path(key).unlink(missing_ok=True)
        return checkpoint, self.get(key, make)


def fingerprint(split: Split) -> str:
    """A hash of all tensors of a split."""
    digest = hashlib.sha256()
    for faces in (split.train, split.val, split.test):
        for tensor in (faces.front, faces.src, faces.keypoints_3d, faces.angles, faces.person):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class NotFinishedError(LookupError):
    """The result asked for is not stored."""


class FinishedStore(Store):
    """Tells whether a result is stored: `get` makes nothing, and raises `NotFinishedError` instead."""

    def get(self, key: dict, make: Callable[[Path], dict]) -> dict:
        if not self.path(key).is_file():
            raise NotFinishedError(self.path(key).name)
        return {}
