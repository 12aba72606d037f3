"""Arrays of samples on disk: checked when opened, and read whole or only the rows asked for."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**20  # numbers that are read at a time


class FaceDataError(ValueError):
    """A face set that cannot be used; the message names the file and the row."""


class DiskRows:
    """Rows of a .npy file that stay there; indexing reads those asked for into a float32 tensor.

    Args:
        path: of an array (N, ...) of floats of any width.
        rows: (M,) int64, which rows of the file are meant, in which order; by default all.
        steps: functions applied, one after the other, to what is read.
    """

    def __init__(self, path: Path, rows: np.ndarray | None = None, steps: tuple[Callable, ...] = ()) -> None:
        self.path, self.steps = path, steps
        self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        self.rows = np.arange(len(self.array)) if rows is None else rows

    device, dtype = torch.device("cpu"), torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice | int) -> Tensor:
        """Read the rows of an index or a mask."""
        values = torch.from_numpy(np.array(self.array[self.rows[_plain(index)]], np.float32))
        for step in self.steps:
            values = step(values)
        return values

    def pick(self, index: Tensor | slice) -> "DiskRows":
        """Only the rows of an index or a mask, not yet read."""
        return DiskRows(self.path, self.rows[_plain(index)], self.steps)

    def then(self, step: Callable[[Tensor], Tensor]) -> "DiskRows":
        """The same rows, step being applied to what is read; it keeps the shape."""
        return DiskRows(self.path, self.rows, (*self.steps, step))

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """All rows in the memory of a device, read in chunks."""
        values = torch.empty(self.shape, device=device)
        for part in chunks(self.shape):
            values[part] = self[part].to(device)
        return values

    def __reduce__(self):
        return DiskRows, (self.path, self.rows, self.steps)  # a worker opens the file itself


def _plain(index: Tensor | slice | int) -> np.ndarray | slice | int:
    return index.cpu().numpy() if isinstance(index, Tensor) else index


def chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices over the first dimension with about `CHUNK` numbers each."""
    size = max(1, CHUNK // max(1, int(np.prod(shape[1:]))))
    return (slice(start, min(start + size, shape[0])) for start in range(0, shape[0], size))


def load_rows(
    path: Path, shape: tuple[int | None, ...], mmap: bool = False, nonzero: bool = False
) -> Tensor | DiskRows:
    """A float array that is finite as float32; pickles are refused.

    Args:
        shape: the one wanted; None stands for any length.
        mmap: leave the rows on disk.
        nonzero: refuse rows (embeddings) of length zero.

    Raises:
        FaceDataError: naming the file and, where there is one, the row.
    """
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FaceDataError(f"{path}: not a readable .npy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise FaceDataError(f"{path}: must hold floats, got {getattr(array, 'dtype', type(array).__name__)}")
    if len(array.shape) != len(shape) or any(w not in (None, n) for n, w in zip(array.shape, shape, strict=True)):
        wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
        raise FaceDataError(f"{path}: shape is {array.shape}, must be {wanted}")
    finite, zero = np.ones(len(array), bool), np.zeros(len(array), bool)
    for part in chunks(array.shape):
        with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinite and is reported
            values = np.asarray(array[part], np.float32).reshape(part.stop - part.start, -1)
            finite[part] = np.isfinite(values).all(1)
            zero[part] = np.linalg.norm(values, axis=1) == 0
    if not finite.all():
        raise FaceDataError(f"{path}: row {int(finite.argmin())}: not finite ({int((~finite).sum())} such rows)")
    if nonzero and zero.any():
        raise FaceDataError(f"{path}: row {int(zero.argmax())}: the embedding is zero")
    return DiskRows(path) if mmap else torch.from_numpy(array.astype(np.float32, copy=False))
