"""Arrays of samples on disk: checked when opened, and read whole or only the rows asked for."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import read_npy

CHUNK = 2**20  # numbers that are read at a time
NORMS = (1e-6, 1e6)  # of an embedding: far from 1e-12, below which F.normalize gives no unit vectors, and from 1e19,
# above which squares are infinite in float32; recognisers give 1, or some tens


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
        self.array = read_npy(path, FaceDataError, mmap=True)
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
    path: Path, shape: tuple[int | None, ...], mmap: bool = False, embeddings: bool = False
) -> Tensor | DiskRows:
    """A float array that is finite as float32; pickles are refused.

    Args:
        shape: the one wanted; None stands for any length.
        mmap: leave the rows on disk.
        embeddings: refuse vectors along the last dimension whose length is outside of `NORMS`.

    Raises:
        FileNotFoundError: if there is no such file.
        FaceDataError: naming the file and, where there is one, the row.
    """
    array = read_npy(path, FaceDataError, shape, mmap)
    finite, usable = np.ones(len(array), bool), np.ones(len(array), bool)
    for part in chunks(array.shape):
        with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinite and is reported
            values = np.asarray(array[part], np.float32)
            finite[part] = np.isfinite(values).reshape(len(values), -1).all(1)
            if embeddings:
                norms = np.linalg.norm(values, axis=-1).reshape(len(values), -1)
                usable[part] = ((norms >= NORMS[0]) & (norms <= NORMS[1])).all(1)
    if not finite.all():
        raise FaceDataError(f"{path}: row {int(finite.argmin())}: not finite ({int((~finite).sum())} such rows)")
    if not usable.all():
        row = int(usable.argmin())
        norms = np.linalg.norm(np.asarray(array[row], np.float64), axis=-1).ravel()
        worst = norms.min() if norms.min() < NORMS[0] else norms.max()
        raise FaceDataError(f"{path}: row {row}: the embedding has length {worst:.3g} ({int((~usable).sum())} such "
                            f"rows); float32 calculates with {NORMS[0]:g} to {NORMS[1]:g}. Scale all embeddings alike")
    return DiskRows(path) if mmap else torch.from_numpy(array.astype(np.float32, copy=False))
