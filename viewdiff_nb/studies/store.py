"""Finished results of studies, kept so that a second run only does what is missing."""

import ast
import functools
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from viewdiff_nb.faces.splits import Split
from viewdiff_nb.files import RUNS, read_json, write_text

PACKAGE = Path(__file__).parents[1]
RESULT_CODE = (
    "faces/geometry.py",
    "faces/splits.py",
    "faces/views.py",
    "metrics.py",
    "modules/*.py",
    "training/*.py",
    "studies/ablation.py",
    "studies/adaptation.py",
    "studies/forgetting.py",
    "studies/significance.py",
)
"""What trains and scores; the rest of the package draws, tells, or makes faces, whose tensors are in the key."""


class DamagedResult(UserWarning):
    """A stored result that cannot be read, and is made again."""


class _Unreadable(ValueError):
    pass


class Store:
    """Finished results, one JSON file per key: config, data, the code that makes the result, and torch's version.

    Training times are those of the machine, and of its load, on which a result was made.
    """

    def __init__(self, split: Split, folder: Path = RUNS) -> None:
        self.folder = folder / "study"
        self.data = fingerprint(split)

    def path(self, key: dict) -> Path:
        made_by = {"data": self.data, "code": code_fingerprint(), "torch": torch.__version__}
        text = json.dumps(key | made_by, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def get(self, key: dict, make: Callable[[Path], dict]) -> dict:
        """The stored result of key, or make(path), stored; make may put further files beside path."""
        if (found := self.find(key)) is not None:
            return found
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"key": key} | make(path)))
        return read_json(path, _Unreadable)

    def find(self, key: dict) -> dict | None:
        """The stored result of key; None if there is none, or (with a warning) if its file is damaged."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            found = read_json(path, _Unreadable)
            if not isinstance(found, dict) or found.get("key") != json.loads(json.dumps(key)):
                raise _Unreadable(f"{path}: is not the result of its key")
        except _Unreadable as error:
            warnings.warn(f"{error}; the result is made again", DamagedResult, stacklevel=3)
            return None
        return found

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


@functools.cache
def code_fingerprint(package: Path = PACKAGE) -> str:
    """A hash of what `RESULT_CODE` does; comments, docstrings and the layout of the lines are no part of it."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in RESULT_CODE for path in package.glob(pattern)):
        tree = _WithoutTexts().visit(ast.parse(path.read_text(encoding="utf-8")))
        digest.update(f"{path.relative_to(package).as_posix()} {ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


class _WithoutTexts(ast.NodeTransformer):
    """Removes statements that are nothing but a text, as docstrings are."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


class NotFinishedError(LookupError):
    """The result asked for is not stored."""


class FinishedStore(Store):
    """Tells whether a result is stored: `get` makes nothing, and raises `NotFinishedError` instead."""

    def get(self, key: dict, make: Callable[[Path], dict]) -> dict:
        if self.find(key) is None:
            raise NotFinishedError(self.path(key).name)
        return {}
