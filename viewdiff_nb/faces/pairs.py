"""Verification by pairs: which two pictures, whether they show the same person, and in which fold they are tested."""

import math
import pickle
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from viewdiff_nb.faces.crops import CROP_SIZE
from viewdiff_nb.faces.views import FaceDataError
from viewdiff_nb.files import read_bytes, shorten, write_text

FOLDS = 10
HEAD = "first,second,same,fold"


@dataclass(frozen=True, eq=False)
class Pairs:
    """N pairs. first, second: (N,) int64 rows of embeddings. same: (N,) bool. fold: (N,) int64 from 0."""

    first: Tensor
    second: Tensor
    same: Tensor
    fold: Tensor

    def __len__(self) -> int:
        return len(self.first)


def pairs_in_order(same: Tensor, folds: int = FOLDS, source: str | Path = "pairs") -> Pairs:
    """Pictures 0 and 1, 2 and 3, ...; folds of equal size in that order, as InsightFace and LFW have them.

    source: what a FaceDataError says they come from.

    >>> pairs = pairs_in_order(torch.tensor([True, False, True, False]), folds=2)
    >>> pairs.first.tolist(), pairs.second.tolist(), pairs.fold.tolist()
    ([0, 2, 4, 6], [1, 3, 5, 7], [0, 0, 1, 1])
    """
    if len(same) < folds or same.all() or not same.any():
        raise FaceDataError(
            f"{source}: verification needs same and different pairs, and {folds} pairs or more for as many folds; got "
            f"{int(same.sum())} same and {int((~same).sum())} different ones"
        )
    first = 2 * torch.arange(len(same))
    return Pairs(first, first + 1, same, torch.arange(len(same)) * folds // len(same))


def write_pairs(path: str | Path, pairs: Pairs) -> None:
    """As CSV, rows from 0, same 1 or 0; `read_pairs` reads it."""
    columns = torch.stack((pairs.first, pairs.second, pairs.same.long(), pairs.fold), 1)
    write_text(path, "\n".join([HEAD, *(",".join(map(str, row)) for row in columns.tolist())]) + "\n")


def read_pairs(path: str | Path, count: int) -> Pairs:
    """The pairs of a file of `write_pairs`, or made by hand, of count pictures.

    Raises:
        FaceDataError: naming file and line, for what is no pair of them.
    """
    lines = read_lines(path)
    if not lines or lines[0].strip() != HEAD:
        raise FaceDataError(f"{path}: line 1: must be {HEAD}")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        where = f"{path}: line {number}"
        first, second, same, fold = numbers(line, 4, where, int)
        if not (0 <= first < count and 0 <= second < count):
            raise FaceDataError(f"{where}: rows must be from 0 to {count - 1}, got {first} and {second}")
        if same not in (0, 1) or not 0 <= fold < len(lines):
            raise FaceDataError(f"{where}: same must be 1 or 0 and folds count from 0, got {same} and {fold}")
        rows.append((first, second, same, fold))
    if not rows:
        raise FaceDataError(f"{path}: holds no pair")
    first, second, same, fold = torch.tensor(rows).T
    return Pairs(first, second, same.bool(), fold)


def read_lines(path: str | Path) -> list[str]:
    """A text's lines; a FaceDataError if it is none in UTF-8."""
    try:
        return read_bytes(path, FaceDataError).decode().rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise FaceDataError(f"{path}: not a text in UTF-8: {error}") from error


Number = TypeVar("Number", int, float)


def numbers(line: str, count: int, where: str, kind: type[Number]) -> list[Number]:
    """Numbers with commas between them; where begins the FaceDataError of a line that is something else."""
    try:
        found = [kind(part) for part in line.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not all(math.isfinite(number) for number in found if kind is float):
        wanted = f"{count} {'whole ' if kind is int else ''}numbers with commas between them"
        raise FaceDataError(f"{where}: must be {wanted}, got {shorten(line.strip())}")
    return found


def read_picture_pairs(path: str | Path, images: str | Path) -> tuple[list[Path], Pairs]:
    """Pairs as CPLFW lists them: two lines a pair, each a picture's name and 1 (same) or 0.

    Returns:
        the pictures' paths in the folder images, and the pairs of them, folds in the given order.

    Raises:
        FaceDataError: naming file and line.
    """
    lines, paths, marks = read_lines(path), [], []
    for number, line in enumerate(lines, 1):
        name, _, mark = line.strip().rpartition(" ")
        where = f"{path}: line {number}"
        if not name or mark not in ("0", "1"):
            wanted = "a picture's name, a space, and 1 or 0"
            raise FaceDataError(f"{where}: must be {wanted}, got {shorten(line.strip())}")
        if not _is_within(images, name):
            raise FaceDataError(f"{where}: there is no picture {shorten(name)} in {images}")
        paths.append(Path(images) / name)
        marks.append(mark == "1")
    if len(lines) % 2:
        raise FaceDataError(f"{path}: two lines are a pair, and there are {len(lines)}")
    for number in range(0, len(lines), 2):
        if marks[number] != marks[number + 1]:
            raise FaceDataError(f"{path}: line {number + 2}: says {marks[number + 1]:d}, the line before it does not")
    return paths, pairs_in_order(torch.tensor(marks[::2], dtype=torch.bool), source=path)


def _is_within(folder: str | Path, name: str) -> bool:
    """Whether a file of this name is there, and in the folder: a list may come from anybody."""
    path = Path(name)
    try:
        return not path.is_absolute() and ".." not in path.parts and (Path(folder) / path).is_file()
    except OSError:  # a name that no file can have
        return False


class _Plain(pickle.Unpickler):
    """Reads lists, tuples, bytes, numbers and bools; anything that names a class or function is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def read_insightface_bin(path: str | Path) -> tuple[np.ndarray, Pairs]:
    """InsightFace's verification sets: a pickle of (encoded pictures, two a pair; whether a pair is the same person).

    Returns:
        (2 N, 112, 112, 3) uint8 RGB, and the pairs of them.
    """
    try:
        found = _Plain(BytesIO(read_bytes(path, FaceDataError)), encoding="bytes").load()
        encoded, same = found
        usable = len(encoded) == 2 * len(same) and all(value in (0, 1) for value in same)
        usable = usable and all(isinstance(picture, bytes) for picture in encoded)
    except Exception as error:  # a damaged pickle raises whatever it likes
        if isinstance(error, FaceDataError | FileNotFoundError):
            raise
        raise FaceDataError(f"{path}: no verification set of InsightFace: {error}") from error
    if not usable:
        raise FaceDataError(
            f"{path}: must hold encoded pictures, two for each of {len(same)} pairs, which are same or not"
        )
    pairs = pairs_in_order(torch.tensor([bool(value) for value in same], dtype=torch.bool), source=path)
    crops = [open_crop(BytesIO(picture), f"{path}: picture {i}") for i, picture in enumerate(encoded)]
    return np.stack(crops), pairs


def open_crop(file: Path | BytesIO, name: str) -> np.ndarray:
    """(112, 112, 3) uint8 RGB of an aligned crop; name begins the FaceDataError of what is none."""
    try:
        with Image.open(file) as picture:
            crop = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FaceDataError(f"{name}: cannot be read: {error}") from error
    if crop.shape != (CROP_SIZE, CROP_SIZE, 3):
        raise FaceDataError(f"{name}: an aligned crop has {CROP_SIZE} x {CROP_SIZE} pixels, got {crop.shape[:2]}")
    return crop
