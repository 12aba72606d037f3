"""Where the project keeps its files; readers that check, and writers that leave whole files.

A file that is read may be damaged or made with bad intent. Readers compare sizes before they take memory, compare the
checksums there are, and run no pickle. What is wrong becomes one error, of the class that the caller names.
"""

import hashlib
import json
import os
import re
import reprlib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

FAST = os.environ.get("FAST", "") not in ("", "0")  # the smoke profile: less work, the same story

PROJECT = Path(os.environ.get("VIEWDIFF_NB_HOME", Path(__file__).resolve().parents[1]))
HEADS = PROJECT / "data" / "heads"  # the shipped set of synthetic people
TURNTABLE = PROJECT / "data" / "turntable"  # eight of its test people at every pose of a grid, with pictures
GPU_RESULTS = PROJECT / "data" / "results" / "gpu"  # measured elsewhere, shown beside what is measured here
CONTROL_RESULTS = PROJECT / "data" / "results" / "controls"  # of benchmarks/controls.py
RUNS = Path(os.environ.get("VIEWDIFF_NB_RUNS", PROJECT / "runs"))  # finished runs, reused; not in the repository
FIGURES = RUNS / "fast" / "figures" if FAST else PROJECT / "figures"  # what the notebooks write

PART = ".part"  # of a file that is being written
JSON_LIMIT = 2**26  # bytes of a JSON file, unless more is to be expected
CHUNK = 2**20  # numbers that are read at a time
ZIP_FOLDER = 0x10  # the attribute of an entry that is a folder, as MS-DOS has it

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxstring, _short.maxother = 2, 3, 80, 80
shorten = _short.repr  # how a value of a file looks in a message: of a long one only beginning and end


def is_text(value: object) -> bool:
    """Whether it is a text that is not empty and can be written as UTF-8, which half a character (a surrogate) cannot.

    >>> is_text("李雷"), is_text(""), is_text("\\ud800"), is_text(5)
    (True, False, False, False)
    """
    return isinstance(value, str) and value != "" and not any("\ud800" <= letter <= "\udfff" for letter in value)


def install_hint(extra: str) -> str:
    """How to install an optional part; no package index has the kit."""
    return f'pip install ".[{extra}]" in the folder of the kit'


def fingerprint(*parts: bytes) -> str:
    """The first 16 hex digits of the SHA-256 of all bytes, one part after the other."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def writable_folder(path: str | Path) -> Path:
    """Create the folder and make sure that files can be written there, before any work is lost."""
    folder = Path(path)
    probe = folder / ".write_test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error}; choose another folder") from error
    return folder


@contextmanager
def only_writer(path: str | Path, what: str, names: str = ".+") -> Iterator[Path]:
    """The folder, where no other process writes as long as the context lasts; the system ends it with the process.

    What a killed process was writing there, to files of those names (a pattern), is removed.

    Raises:
        OSError: if it cannot be written to, or another process does; what: the folder's name among the settings.
    """
    folder, unfinished = writable_folder(path), re.compile(rf"({names})\.\d+{re.escape(PART)}")
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        reason = f"another run is writing to {path}; wait for its end, or choose another {what}"
        raise OSError(reason) from None
    try:
        for left in folder.iterdir():
            if unfinished.fullmatch(left.name):
                left.unlink()
        yield folder
    finally:
        lock.release()


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write with an open file that then appears whole or not at all, also if the power fails; makes its folder.

    Raises OSError if it cannot be written (a full disk); an older file stays, and nothing else.
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
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__  # torch's writer raises an error of its own on top of the disk's
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"cannot write {path}: {cause.strerror}; older files are whole") from error
        raise


def write_text(path: str | Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_safetensors(path: str | Path, weights: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Tensors, with texts in the header; any program that reads safetensors can read them."""
    weights = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    write_atomically(path, lambda file: file.write(safetensors.torch.save(weights, header)))


@contextmanager
def _refusing(what: str, error: type[ValueError]) -> Iterator[None]:
    """Make one error, which begins with what, of the many kinds that numpy, torch and safetensors raise."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as problem:
        # of torch's messages the first sentence, for the next advises against its own safeguard
        reason = re.split(r"\n|\. |; ", str(problem))[0][:200] or type(problem).__name__
        nested = isinstance(problem, RecursionError)
        raise error(f"{what}: {'too deeply nested' if nested else reason}") from problem


def read_bytes(path: str | Path, error: type[ValueError], limit: int | None = None) -> bytes:
    """A file of at most limit bytes; raises, as all readers do, FileNotFoundError or error."""
    with _refusing(f"{path}: cannot be read", error), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise ValueError(f"has {size} bytes, and such a file needs {limit} at most")
        return file.read(size)


def read_json(path: str | Path, error: type[ValueError], limit: int = JSON_LIMIT) -> Any:
    """What a JSON file of at most limit bytes says."""
    return parse_json(read_bytes(path, error, limit), path, error)


def parse_json(text: bytes | str, source: str | Path, error: type[ValueError]) -> Any:
    """What a JSON text in UTF-8 says, in which no object names a key twice; source is its name in messages."""
    with _refusing(f"{source}: not valid JSON", error):
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shorten(key)} comes twice in an object")
    return content


def read_npy(
    path: str | Path, error: type[ValueError], shape: tuple[int | None, ...] | None = None, mmap: bool = False
) -> np.ndarray:
    """A .npy file of floats of 2, 4 or 8 bytes, left on disk if mmap; in shape, None stands for any length."""
    held = os.stat(path).st_size
    with _refusing(f"{path}: not a readable .npy array", error):
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # takes no memory, whatever the header says
        if not isinstance(array, np.memmap):
            array.close()
            raise ValueError("it is an archive of several")
        if held - array.offset != array.nbytes:
            raise ValueError(f"{held - array.offset} bytes are no {array.dtype} numbers of shape {array.shape}")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise error(f"{path}: must hold floats, got {shorten(array.dtype.str)}")
    if shape and (len(shape) != array.ndim or any(w not in (None, n) for n, w in zip(array.shape, shape, strict=True))):
        lengths = ", ".join("any" if n is None else str(n) for n in shape)
        raise error(f"{path}: shape is {array.shape}, must be ({lengths})")
    return array if mmap else np.array(array)


def read_torch(
    path: str | Path, error: type[ValueError], device: torch.device | str = "cpu", mmap: bool = False
) -> Any:
    """What `torch.save` wrote (since torch 1.6, a zip archive), if it is only tensors and plain values.

    Compares the checksums that torch writes and does not look at; with mmap, a quick look, not those of tensors.
    """
    with _refusing(f"{path} is truncated, damaged or no checkpoint", error):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("torch.save does not compress")
            if any(entry.is_dir() or entry.external_attr & ZIP_FOLDER for entry in entries):
                raise ValueError("an entry says that it is a folder, and torch would read nothing of it")
            if sum(entry.file_size for entry in entries) > os.stat(path).st_size:
                raise ValueError("its entries are larger than the file")
            for entry in entries:
                if not mmap or entry.filename.endswith("data.pkl"):
                    with archive.open(entry) as content:
                        while content.read(2**20):  # at the end the checksum is compared
                            pass
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)


def read_safetensors(path: str | Path, error: type[ValueError]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, each name once, and the texts in its header."""
    what = f"{path} is truncated, damaged or no safetensors file"
    content = read_bytes(path, error)
    end = 8 + int.from_bytes(content[:8], "little")
    header = parse_json(content[8:end], f"{what}: its header", error)
    with _refusing(what, error):
        return safetensors.torch.load(content), header.get("__metadata__") or {}


class DiskRows:
    """Rows of a .npy file of floats (N, ...) that stay there; indexing reads those asked for into a float32 tensor.

    Args:
        rows: (M,) int64, which rows of the file are meant, in which order; by default all.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, path: Path, rows: np.ndarray | None = None) -> None:
        self.path = path
        self.array = read_npy(path, ValueError, mmap=True)
        self.rows = np.arange(len(self.array)) if rows is None else rows
        self.shape = (len(self.rows), *self.array.shape[1:])

    def __reduce__(self) -> tuple[type["DiskRows"], tuple]:
        return DiskRows, (self.path, self.rows)  # a worker opens the file itself

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice | int) -> Tensor:
        """Read the rows of an index or a mask."""
        return torch.from_numpy(np.array(self.array[self._rows_of(index)], np.float32))

    def _rows_of(self, index: Tensor | slice | int) -> np.ndarray:
        return self.rows[index.cpu().numpy() if isinstance(index, Tensor) else index]

    def pick(self, index: Tensor | slice) -> "DiskRows":
        """Only the rows of an index or a mask, not yet read."""
        return DiskRows(self.path, self._rows_of(index))

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """All rows in the memory of a device, read in chunks."""
        values = torch.empty(self.shape, device=device)
        for part in chunks(self.shape):
            values[part] = self[part].to(device)
        return values


def chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices over the first dimension with about `CHUNK` numbers each."""
    size = max(1, CHUNK // max(1, int(np.prod(shape[1:]))))
    return (slice(start, min(start + size, shape[0])) for start in range(0, shape[0], size))
