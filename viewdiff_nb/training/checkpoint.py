"""Checkpoints that survive a crash while they are written, and are checked when they are read.

A checkpoint is a file of `torch.save`, a zip archive, with the CRC-32 of everything in it. Torch does not look at
these when it reads; this module does. Weights alone travel as safetensors, with the model's config in their header.
"""

import errno
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

FORMAT = "viewdiff_nb checkpoint 2"
LAST, PREVIOUS = "last_enhanced.pth", "previous_enhanced.pth"
BEST, BEST_WEIGHTS = "best_model_enhanced.pth", "best_model_enhanced.safetensors"
PERIODIC = "checkpoint_epoch_{}_enhanced.pth"
PART = ".part"  # of a file that is being written


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message names it."""


class DamagedCheckpoint(UserWarning):
    """A file that is no usable checkpoint was passed over, since there is an older one."""


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values; the old file stays whole until the new one is complete.

    Raises:
        OSError: if it cannot be written, a full disk for example; nothing is left behind.
    """
    _write_atomically(Path(path), lambda file: torch.save({"format": FORMAT, **content}, file))


def keep_previous(folder: Path) -> None:
    """Make room for a new `LAST`: the one that is there becomes `PREVIOUS`, so there is always a whole one."""
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)


def save_weights(path: str | Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """A state dict as safetensors, its config as JSON in the header; any program that reads safetensors can."""
    weights = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    header = {"format": FORMAT, "config": json.dumps(config)}
    _write_atomically(Path(path), lambda file: file.write(to_safetensors(weights, header)))


def _write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
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


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; nothing but tensors and plain values is unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated, damaged, or not a checkpoint of this kit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    content = _read(path, device)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of the kit (no '{FORMAT}' in it)")
    return content


def _read(path: Path, device: torch.device | str) -> Any:
    try:
        if zipfile.is_zipfile(path):  # other torch files have no checksums; weights_only guards them all the same
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise CheckpointError(f"{path} is damaged: the checksum of {damaged} in it does not fit")
        return torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError,
            zipfile.BadZipFile) as error:  # fmt: skip
        reason = str(error).split("\n")[0].split(". ")[0]  # torch goes on to advise against its own safeguard
        raise CheckpointError(f"{path} is truncated, damaged or no checkpoint: {reason}") from error


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of a folder that was written last; damaged and foreign files are named and passed over.

    None if there is no checkpoint at all.

    Raises:
        CheckpointError: if there are some, and none can be used.
    """
    refused = []
    for path in sorted(Path(folder).glob("*.pth"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            warnings.warn(f"passed over {reason}", DamagedCheckpoint, stacklevel=3)
        return path
    if refused:
        raise CheckpointError(f"no checkpoint in {folder} can be used: {'; '.join(refused)}")
    return None


def progress(path: Path) -> tuple[int, int] | None:
    """Finished epochs, and batches of the next one: how far the run of a checkpoint has come; None if it is damaged."""
    try:
        content = load_checkpoint(path)
    except CheckpointError:
        return None
    return content["epoch"], content["batch"]


def load_base_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a base model, from safetensors, a checkpoint of the kit or a bare state dict.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no base model {path}; train one first, or correct base_model_path")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated, damaged or no safetensors file: {error}") from error
    content = _read(path, "cpu")
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds no state dict of a model")
    return state


def load_config(path: str | Path) -> dict[str, Any]:
    """The config that a checkpoint, or a safetensors file of `save_weights`, was trained with.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        content = load_checkpoint(path)
        if "config" not in content:
            raise CheckpointError(f"{path} holds weights without the config of a training run")
        return content["config"]
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated, damaged or no safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of the kit (no '{FORMAT}' in its header)")
    return json.loads(header["config"])


def check_space(folder: Path, wanted: int) -> None:
    """
    Args:
        wanted: bytes that a run will write to folder.

    Raises:
        OSError: if the disk has less.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(errno.ENOSPC, f"{folder} has {free / 1e9:.2f} GB free, and the checkpoints of this run need "
                      f"about {wanted / 1e9:.2f} GB; make room, choose another save_dir or raise save_every")
