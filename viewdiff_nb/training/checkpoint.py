"""Checkpoints that survive a crash while they are written, and are checked when they are read."""

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = "viewdiff_nb checkpoint 1"


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message names it."""


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values; the old file stays whole until the new one is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; nothing but tensors and plain values is unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated, or not a checkpoint of this kit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is truncated or no checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this kit (no '{FORMAT}' in it)")
    return content


def load_base_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a base model, from a checkpoint of the kit or a bare state dict.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no base model {path}; train one first, or correct base_model_path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is truncated or holds no weights: {error}") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds no state dict of a model")
    return state
