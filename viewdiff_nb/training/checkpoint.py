"""Checkpoints that survive a crash while they are written, and are checked when they are read.

A checkpoint is a file of `torch.save`. Weights alone travel as safetensors, with the model's config in their header.
"""

import hashlib
import json
import warnings
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viewdiff_nb.files import parse_json, read_safetensors, read_torch, shorten, write_atomically, write_safetensors
from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.training.config import ARCHITECTURE, TrainConfig
from viewdiff_nb.training.devices import OwnRandomness

FORMAT = "viewdiff_nb checkpoint 2"
LAST, PREVIOUS = "last_enhanced.pth", "previous_enhanced.pth"
BEST, BEST_WEIGHTS = "best_model_enhanced.pth", "best_model_enhanced.safetensors"
PERIODIC = "checkpoint_epoch_{}_enhanced.pth"

# What a checkpoint may hold, and of which type.
STATE_DICTS: dict[str, Any] = dict.fromkeys(("model", "optimizer", "scaler"), dict)
PROGRESS: dict[str, Any] = {  # of a run: what it has done and found so far
    **dict.fromkeys(("epoch", "batch", "steps", "stale"), int),
    **dict.fromkeys(("seconds", "best"), float | int),
    "history": list,
}
TENSORS: dict[str, Any] = dict.fromkeys(("generator", "trace", "torch_rng"), Tensor)
NEEDED = STATE_DICTS | PROGRESS | TENSORS | {"config": dict, "data": dict | str}  # by a run to go on
TYPES = NEEDED | {"order": Tensor | None, "cuda_rng": Tensor | None}


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message names it."""


class DamagedCheckpoint(UserWarning):
    """A file that is no usable checkpoint was passed over, since there is an older one."""


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values as `write_atomically` does: the old file stays until the new one is complete."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def save_weights(path: str | Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """A state dict as safetensors, its config as JSON in the header."""
    write_safetensors(path, weights, {"format": FORMAT, "config": json.dumps(config)})


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, or `save_weights` (as model and config).

    Args:
        mmap: leave tensors on disk, where nothing checks them: a quick look at the rest.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated, damaged, or not a checkpoint of this kit; nothing but tensors and plain
            values is unpickled.
    """
    content = _read(Path(path), "checkpoint", device, mmap)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of the kit (no '{FORMAT}' in it)")
    for name, kind in TYPES.items():
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool)):
            raise CheckpointError(f"{path} is damaged: {name} is {type(content[name]).__name__} in it")
    if not all(isinstance(row, dict) for row in content.get("history", ())):
        raise CheckpointError(f"{path} is damaged: its history has rows that name no values")
    return content


def _read(path: Path, what: str, device: torch.device | str = "cpu", mmap: bool = False) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} {path}; train one first, or correct the path")
    if path.suffix != ".safetensors":
        return read_torch(path, CheckpointError, device, mmap)
    weights, header = read_safetensors(path, CheckpointError)
    content = {**header, "model": weights}
    if header.get("format") == FORMAT and "config" in header:
        content["config"] = parse_json(header["config"], f"the config in {path}", CheckpointError)
    return content


def file_fingerprint(path: str | Path) -> str:
    """A hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_run(source: str | Path, content: dict[str, Any]) -> None:
    """Raise CheckpointError if content lacks what a run needs to go on."""
    if missing := ", ".join(sorted(NEEDED.keys() - content.keys())):
        raise CheckpointError(
            f"{source} holds weights, but no training run to go on with (no {missing}); give it as base_model_path"
        )


def progress(path: Path) -> tuple[int, int, int]:
    """How far the run of a checkpoint has come: finished epochs, batches of the next one, and steps."""
    content = load_checkpoint(path, mmap=True)
    check_run(path, content)
    return content["epoch"], content["batch"], content["steps"]


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of a folder whose run has come furthest, whatever the files' times are; None if it has no file.

    Files that no run can go on from are named and passed over; CheckpointError if there is no other.
    """
    found, refused = [], []
    for path in Path(folder).glob("*.pth"):
        if not path.is_file():
            refused.append(f"{path}, which is no file")
            continue
        try:
            found.append((*progress(path), path))
        except CheckpointError as error:
            refused.append(str(error))
    for *_, path in sorted(found, reverse=True):
        try:
            load_checkpoint(path)  # the tensors, too
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for reason in sorted(refused):
            warnings.warn(f"passed over {reason}", DamagedCheckpoint, stacklevel=3)
        return path
    if refused:
        raise CheckpointError(f"no checkpoint in {folder} can be used: {'; '.join(sorted(refused))}")
    return None


def find_checkpoint(resume: str | None, save_dir: str | None) -> Path | None:
    """The file that --resume means: itself, the newest of a folder, or with "auto" the newest in save_dir, if any.

    Raises as `load_checkpoint`, and names one beside it that can be used.
    """
    folder = save_dir if resume == "auto" else resume
    if resume is None or folder is None:
        return None
    path = Path(folder)
    if resume == "auto" or path.is_dir():
        newest = newest_checkpoint(path)
        if newest is None and resume != "auto":
            raise FileNotFoundError(f"there is no checkpoint in {path} to resume from")
        return newest
    try:
        content = load_checkpoint(path)
        if path.suffix == ".safetensors":  # weights for other programs, in which there never is a run
            check_run(path, content)
    except CheckpointError as error:
        other = None
        with suppress(CheckpointError):  # where none beside it is any better
            other = newest_checkpoint(path.parent)
        raise CheckpointError(f"{error}; {other} can be resumed" if other else str(error)) from error
    return path


def load_base_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a base model, from safetensors, a checkpoint of the kit or a bare state dict; raises as
    `load_checkpoint`."""
    path = Path(path)
    content = _read(path, "base model")
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(map(_is_weight, state, state.values())):
        raise CheckpointError(f"{path} holds no state dict of a model")
    if sum(value.nbytes for value in state.values()) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its weights would be larger than the file")
    if lost := [name for name, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{path} holds weights that are not finite: {shorten(lost[0])}; take an earlier one")
    return state


def _is_weight(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout is torch.strided and value.device.type == "cpu" and value.is_floating_point()


def load_train_config(path: str | Path) -> TrainConfig:
    """The config that the model of a checkpoint was trained with; raises as `load_checkpoint`."""
    content = load_checkpoint(path, mmap=True)
    if "config" not in content:
        raise CheckpointError(f"{path} holds weights without the config of a training run")
    return parse_config(path, content["config"])


def parse_config(path: str | Path, content: Any) -> TrainConfig:
    """The config of a file, from what `TrainConfig.to_dict` left there; CheckpointError if it is none."""
    if not isinstance(content, dict):
        raise CheckpointError(f"the config in {path} is damaged: it is {type(content).__name__}")
    config: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in content.items()}
    if unknown := config.keys() - {field.name for field in fields(TrainConfig)}:
        raise CheckpointError(f"{path} was written by another version of the kit: it has {shorten(unknown)}")
    try:
        return TrainConfig(**config)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"the config in {path} is damaged: {str(error)[:300]}") from error


def load_model(path: str | Path, device: torch.device | str = "cpu") -> EnhancedTransformerDecoderOnly3D:
    """A trained model from a checkpoint of `train`, or from its best_model_enhanced.safetensors; in evaluation mode.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`, and if weights and config do not fit.
    """
    return build_trained(path, load_train_config(path), load_base_weights(path)).to(device)


def build_trained(
    path: str | Path, config: TrainConfig, weights: dict[str, Tensor]
) -> EnhancedTransformerDecoderOnly3D:
    """The model of a file's config and weights, in evaluation mode; CheckpointError if they do not fit."""
    try:
        if config.num_layers > len(weights):
            raise ValueError(f"its config asks for {config.num_layers} layers, and it has {len(weights)} weights")
        if "output.weight" not in weights:
            raise ValueError("no matrix output.weight, which every transformer of this kit has")
        width = len(weights["output.weight"])
        with torch.device("meta"):  # which takes no memory: the config may describe a model far larger than the file
            build_model(config, width).load_state_dict(weights, assign=True)
        model = build_model(config, width)
        model.load_state_dict(weights)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{path} holds no model of its config: {str(error)[:300]}") from error
    return model.eval()


def build_model(config: TrainConfig, feature_dim: int, base: bool = False) -> EnhancedTransformerDecoderOnly3D:
    """The model of a run (or, with base=True, the plain model it adapts), randomly initialised."""
    options = {name: getattr(config, name) for name in ARCHITECTURE}
    if base:
        options |= {name: False for name in ARCHITECTURE if name.startswith("use_")}
    return EnhancedTransformerDecoderOnly3D(**options, feature_dim=feature_dim)


def prepare_model(config: TrainConfig, feature_dim: int) -> tuple[EnhancedTransformerDecoderOnly3D, nn.Module | None]:
    """The model of a run, and the frozen base if prior preservation needs one; seeded by config.seed.

    Without a base there is nothing worth freezing: LoRA layers then train their random W as well.
    """
    with OwnRandomness(config.seed):
        model, base = build_model(config, feature_dim), build_model(config, feature_dim, base=True)
    if not config.base_model_path:
        return model.requires_grad_(True), None
    state = load_base_weights(config.base_model_path)
    model.load_base(state)
    if config.freezes_base:
        for name in state:  # all of the base; of an adapted one the adapters, too
            model.get_parameter(name).requires_grad_(False)
    if not config.use_prior_preservation:
        return model, None
    if extra := sorted(set(state) - set(base.state_dict())):
        raise ValueError(
            f"prior preservation needs a plain base; {config.base_model_path} is adapted already "
            f"({len(extra)} parameters more, e.g. {extra[0]})"
        )
    base.load_base(state)
    return model, base
