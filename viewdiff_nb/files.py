"""Files that are read with care and written as a whole.

What is read may be damaged, or made by somebody who means harm. So a reader compares sizes with the file before it
takes memory, checks the checksums there are, and runs no pickle. Whatever is wrong becomes one error, of the class that
the caller names, which says which file it is and what is the matter with it.
"""

import json
import math
import os
import pickle
import re
import reprlib
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

PART = ".part"  # of a file that is being written
JSON_LIMIT = 2**26  # bytes of a JSON file, unless more is to be expected
NPY_HEADER_LIMIT = 2**12  # bytes; arrays of floats have about 100
PICKLE_LIMIT = 2**25  # bytes of what a checkpoint holds beside tensors; 10,000 epochs of history take one
ZIP_FOLDER = 0x10  # the attribute of an entry that is a folder, as MS-DOS has it
NPY_HEADER = re.compile(r"\{'descr': '([^']*)', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\),? ?\}\s*")
FLOATS = re.compile("[<>=|]f[248]")

# What torch and safetensors raise for bytes that nobody has written: they interpret them, and check little.
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
    struct.error,
    OSError,
    EOFError,
    MemoryError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
)

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxstring, _short.maxother = 2, 3, 80, 80


def shorten(value: object) -> str:
    """How a value of a file looks in a message: its repr, of long ones only beginning and end."""
    return _short.repr(value)


def is_text(value: object) -> bool:
    """Whether it is a text that is not empty and can be written as UTF-8, which half a character (a surrogate) cannot.

    >>> is_text("李雷"), is_text(""), is_text("\\ud800"), is_text(5)
    (True, False, False, False)
    """
    return isinstance(value, str) and value != "" and not any("\ud800" <= letter <= "\udfff" for letter in value)


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file that appears whole or not at all, also if the power fails; its folder is made if need be.

    Args:
        write: called with the open file.

    Raises:
        OSError: if it cannot be written, a full disk for example; what was there before stays, and nothing else.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__  # torch's writer raises an error of its own on top of the disk's
        if cause is not None:
            raise OSError(cause.errno, f"cannot write {path}: {cause.strerror}; older files are whole") from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """A UTF-8 text file that appears whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_safetensors(path: str | Path, weights: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Tensors, with texts in the header; any program that reads safetensors can read them."""
    weights = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    write_atomically(path, lambda file: file.write(safetensors.torch.save(weights, header)))


def read_bytes(path: str | Path, error: type[ValueError], limit: int | None = None) -> bytes:
    """A file of at most limit bytes.

    Raises:
        FileNotFoundError: if there is none.
        error: if it is larger, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise error(f"{path}: has {size} bytes; such a file needs {limit} at most")
            return file.read(size)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem


def read_json(path: str | Path, error: type[ValueError], limit: int = JSON_LIMIT) -> Any:
    """What a JSON file in UTF-8 of at most limit bytes says; see `parse_json`."""
    return parse_json(read_bytes(path, error, limit), path, error)


def parse_json(text: str | bytes, source: str | Path, error: type[ValueError]) -> Any:
    """What a JSON text says. Python limits its nesting (to about 1,000 levels) and its numbers (to 4,300 digits).

    Args:
        source: what messages call it.

    Raises:
        error: if it is no JSON in UTF-8, or an object in it names a key twice.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_object)
    except RecursionError as problem:
        raise error(f"{source}: not valid JSON: too deeply nested") from problem
    except ValueError as problem:
        raise error(f"{source}: not valid JSON: {_reason(problem)}") from problem


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shorten(key)} comes twice in an object")
    return content


def read_npy(
    path: str | Path, error: type[ValueError], shape: tuple[int | None, ...] | None = None, mmap: bool = False
) -> np.ndarray:
    """A .npy file of floats of 2, 4 or 8 bytes.

    Args:
        shape: the one wanted; None stands for any length.
        mmap: leave the numbers on disk.

    Raises:
        FileNotFoundError: if there is none.
        error: if it is something else, of another shape, or longer or shorter than its shape says.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
                raise error(f"{path}: not a readable .npy array: does not begin like one")
            length = int.from_bytes(file.read(2 if start[6] == 1 else 4), "little")
            header = file.read(min(length, NPY_HEADER_LIMIT)).decode("latin-1")
            found = NPY_HEADER.fullmatch(header)
            if not found:
                raise error(f"{path}: not a readable .npy array: its header is {shorten(header)}")
            kind, fortran, lengths = found.groups()
            if not FLOATS.fullmatch(kind):
                raise error(f"{path}: must hold floats, got {shorten(kind)}")
            dtype, order = np.dtype(kind), "F" if fortran == "True" else "C"
            size = tuple(map(int, re.findall("[0-9]+", lengths)))
            if shape and (len(size) != len(shape) or any(w not in (None, n) for n, w in zip(size, shape, strict=True))):
                wanted = ", ".join("any" if n is None else str(n) for n in shape)
                raise error(f"{path}: shape is {shorten(size)}, must be ({wanted})")
            offset, end = file.tell(), os.fstat(file.fileno()).st_size
            if any(n > end for n in size) or end - offset != math.prod(size) * dtype.itemsize:
                raise error(
                    f"{path}: not a readable .npy array: truncated or damaged, since {end - offset} bytes "
                    f"are no {dtype} numbers of shape {shorten(size)}"
                )
            if mmap:
                return np.memmap(path, dtype, "r", offset, size, order)
            return np.fromfile(file, dtype, math.prod(size)).reshape(size, order=order)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem


def read_torch(
    path: str | Path, error: type[ValueError], device: torch.device | str = "cpu", mmap: bool = False
) -> Any:
    """What `torch.save` wrote (since torch 1.6, a zip archive): only tensors and plain values, checksums compared.

    Torch writes checksums and does not look at them.

    Args:
        device: where to put tensors.
        mmap: leave tensors on disk, their checksums not compared: a quick look at the rest.

    Raises:
        FileNotFoundError: if there is none.
        error: if it is truncated, damaged or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise error(f"{path} is no checkpoint: torch.save does not compress")
            if any(entry.is_dir() or entry.external_attr & ZIP_FOLDER for entry in entries):
                raise error(f"{path} is damaged: an entry says that it is a folder, and torch would read nothing of it")
            if sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
                raise error(f"{path} is truncated or damaged: its entries are larger than the file")
            pickled = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if sum(entry.file_size for entry in pickled) > PICKLE_LIMIT:
                raise error(f"{path} is no checkpoint: beside tensors it holds more than {PICKLE_LIMIT} bytes")
            for entry in pickled if mmap else entries:
                with archive.open(entry) as content:
                    while content.read(2**20):  # at the end the checksum is compared
                        pass
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except (error, FileNotFoundError):
        raise
    except UNREADABLE as problem:
        raise error(f"{path} is truncated, damaged or no checkpoint: {_reason(problem)}") from problem


def read_safetensors(path: str | Path, error: type[ValueError]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and the texts in its header.

    Raises:
        FileNotFoundError: if there is none.
        error: if it is truncated, damaged or something else, or has two tensors of one name.
    """
    content = read_bytes(path, error)
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 + length:
        raise error(f"{path} is truncated, damaged or no safetensors file: it ends within its header")
    header = parse_json(content[8 : 8 + length], f"{path} is damaged or no safetensors file: its header", error)
    try:
        return safetensors.torch.load(content), header.get("__metadata__") or {}
    except UNREADABLE as problem:
        raise error(f"{path} is truncated, damaged or no safetensors file: {_reason(problem)}") from problem


def _reason(problem: BaseException) -> str:
    """What a library says, in short; torch goes on to advise against its own safeguard."""
    return re.split(r"\n|\. |; ", str(problem))[0][:200] or type(problem).__name__


# ---- Where the project keeps things, whatever the working directory is.


FAST = os.environ.get("FAST", "") not in ("", "0")  # the smoke profile: less work, the same story

PROJECT = Path(os.environ.get("VIEWDIFF_NB_HOME", Path(__file__).resolve().parents[1]))
HEADS = PROJECT / "data" / "heads"  # the shipped set of synthetic people
TURNTABLE = PROJECT / "data" / "turntable"  # eight of its test people at every pose of a grid, with pictures
GPU_RESULTS = PROJECT / "data" / "results" / "gpu"  # measured elsewhere, shown beside what is measured here
RUNS = Path(os.environ.get("VIEWDIFF_NB_RUNS", PROJECT / "runs"))  # finished runs, reused; not in the repository
FIGURES = RUNS / "fast" / "figures" if FAST else PROJECT / "figures"  # what the notebooks write


def writable_folder(path: str | Path) -> Path:
    """Create the folder and make sure that files can be written there, before any work is lost."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error}; choose another folder") from error
    return folder


def install_hint(extra: str) -> str:
    """How to install an optional part; no package index has the kit."""
    return f'pip install ".[{extra}]" in the folder of the kit'


CHUNK = 2**20  # numbers that are read at a time


class DiskRows:
    """Rows of a .npy file that stay there; indexing reads those asked for into a float32 tensor.

    Args:
        path: of an array (N, ...) of floats of any width.
        rows: (M,) int64, which rows of the file are meant, in which order; by default all.
        steps: functions applied, one after the other, to what is read.
    """

    def __init__(self, path: Path, rows: np.ndarray | None = None, steps: tuple[Callable, ...] = ()) -> None:
        self.path, self.steps = path, steps
        self.array = read_npy(path, ValueError, mmap=True)
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
