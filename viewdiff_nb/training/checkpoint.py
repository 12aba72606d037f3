"""Checkpoints that survive a crash while they are written, and are checked when they are read.

A checkpoint is a file of `torch.save`. Weights alone travel as safetensors, with the model's config in their header.
"""

import errno
import json
import os
import shutil
import warnings
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
TYPES = {  # of what a checkpoint may hold; the rest is checked by those who load it
    **dict.fromkeys(("model", "optimizer", "scheduler", "scaler", "config"), dict),
    **dict.fromkeys(("epoch", "batch", "steps", "stale"), int),
    **dict.fromkeys(("seconds", "best"), float | int),
    **dict.fromkeys(("generator", "trace", "torch_rng"), Tensor),
    **dict.fromkeys(("order", "cuda_rng"), Tensor | None),
    "data": dict | str,
    "history": list,
}


PLAIN = ("epoch", "batch", "steps", "seconds", "history", "best", "stale")
STATEFUL = ("model", "optimizer", "scaler")
OF_A_RUN = (*PLAIN, *STATEFUL, "generator", "torch_rng", "trace", "config", "data")
"""What a run needs to go on; a checkpoint of a model alone has less."""


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message names it."""


class DamagedCheckpoint(UserWarning):
    """A file that is no usable checkpoint was passed over, since there is an older one."""


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values; the old file stays whole until the new one is complete.

    Raises:
        OSError: if it cannot be written, a full disk for example; nothing is left behind.
    """
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def keep_previous(folder: Path) -> None:
    """Make room for a new `LAST`: the one that is there becomes `PREVIOUS`, so there is always a whole one."""
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)


def save_weights(path: str | Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """A state dict as safetensors, its config as JSON in the header; any program that reads safetensors can."""
    write_safetensors(path, weights, {"format": FORMAT, "config": json.dumps(config)})


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; nothing but tensors and plain values is unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated, damaged, or not a checkpoint of this kit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    content = read_torch(path, CheckpointError, device)
    _check_content(path, content)
    return content


def _check_content(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of the kit (no '{FORMAT}' in it)")
    for name, kind in TYPES.items():
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool)):
            raise CheckpointError(f"{path} is damaged: {name} is {type(content[name]).__name__} in it")
    if not all(isinstance(row, dict) for row in content.get("history", ())):
        raise CheckpointError(f"{path} is damaged: its history has rows that name no values")


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of a folder whose run has come furthest, whatever the files' times are.

    Files that are damaged, or that no run can go on from, are named and passed over. None if there is no file at all.

    Raises:
        CheckpointError: if there are some, and none can be used.
    """
    found, refused = [], []
    for path in Path(folder).glob("*.pth"):
        try:
            found.append((*progress(path), path))
        except CheckpointError as error:
            refused.append(str(error))
    for *_, path in sorted(found, reverse=True):
        try:
            load_checkpoint(path)  # all of it, while a look at the progress leaves out the tensors
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for reason in sorted(refused):
            warnings.warn(f"passed over {reason}", DamagedCheckpoint, stacklevel=3)
        return path
    if refused:
        raise CheckpointError(f"no checkpoint in {folder} can be used: {'; '.join(sorted(refused))}")
    return None


def progress(path: Path) -> tuple[int, int, int]:
    """Finished epochs, batches of the next one, and steps: how far the run of a checkpoint has come.

    Raises:
        CheckpointError: if it is damaged, or no run can go on from it.
    """
    content = read_torch(path, CheckpointError, mmap=True)
    _check_content(path, content)
    check_run(path, content)
    return content["epoch"], content["batch"], content["steps"]


def check_run(source: str | Path, content: dict[str, Any]) -> None:
    """
    Raises:
        CheckpointError: if content lacks what a run needs to go on.
    """
    if missing := sorted(set(OF_A_RUN) - set(content)):
        raise CheckpointError(
            f"{source} holds weights, but no training run to go on with (no {', '.join(missing)}); "
            "give it as base_model_path"
        )


def load_base_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a base model, from safetensors, a checkpoint of the kit or a bare state dict.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no base model {path}; train one first, or correct base_model_path")
    if path.suffix == ".safetensors":
        content, _ = read_safetensors(path, CheckpointError)
    else:
        content = read_torch(path, CheckpointError)
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(map(_is_weight, state, state.values())):
        raise CheckpointError(f"{path} holds no state dict of a model")
    if sum(value.nbytes for value in state.values()) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its weights would be larger than the file")
    if lost := [name for name, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{path} holds weights that are not finite: {shorten(lost[0])}; take an earlier one")
    return state


def _is_weight(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.is_floating_point()
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def load_config(path: str | Path) -> dict[str, Any]:
    """The config that a checkpoint, or a safetensors file of `save_weights`, was trained with: plain values by name.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        config = load_checkpoint(path).get("config")
    else:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        _, header = read_safetensors(path, CheckpointError)
        if header.get("format") != FORMAT:
            raise CheckpointError(f"{path} was not written by this version of the kit (no '{FORMAT}' in its header)")
        config = parse_json(header.get("config", "null"), f"the config in {path}", CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds weights without the config of a training run")
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}  # as JSON has
    for name, value in config.items():
        if not all(map(_is_plain, (name, *value) if isinstance(value, tuple) else (name, value))):
            raise CheckpointError(f"the config in {path} is damaged: {shorten(name)} is {shorten(value)}")
    return config


def _is_plain(value: object) -> bool:
    """Whether messages may show it: no container, no endless text or number."""
    if isinstance(value, str):
        return len(value) < 2**12
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def check_space(folder: Path, wanted: int) -> None:
    """
    Args:
        wanted: bytes that a run will write to folder.

    Raises:
        OSError: if the disk has less.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 1e9:.2f} GB free, and the checkpoints of this run need "
            f"about {wanted / 1e9:.2f} GB; make room, choose another save_dir or raise save_every",
        )


# ---- Models before and after training: built for a run, and loaded from what a run has left.


def prepare_model(config: TrainConfig, feature_dim: int) -> tuple[EnhancedTransformerDecoderOnly3D, nn.Module | None]:
    """The model of a run, and the frozen base if prior preservation needs one; seeded by config.seed.

    Without a base there is nothing worth freezing: LoRA layers then train their random W as well.
    """
    with OwnRandomness(config.seed):
        model, base = build_model(config, feature_dim), build_model(config, feature_dim, base=True)
    if not config.base_model_path:
        model.requires_grad_(True)
    else:
        state = load_base_weights(config.base_model_path)
        model.load_base(state)
        if config.use_prior_preservation:
            if extra := sorted(set(state) - set(base.state_dict())):
                raise ValueError(
                    f"prior preservation needs a plain base; {config.base_model_path} is adapted already "
                    f"({len(extra)} parameters more, e.g. {extra[0]})"
                )
            base.load_base(state)
        if config.freezes_base:
            for name in state:  # all of the base; of an adapted one the adapters, too
                model.get_parameter(name).requires_grad_(False)
    return model, base if config.use_prior_preservation else None


def load_model(path: str | Path, device: torch.device | str = "cpu") -> EnhancedTransformerDecoderOnly3D:
    """A trained model from a checkpoint of `train`, or from its best_model_enhanced.safetensors; in evaluation mode.

    Raises:
        FileNotFoundError, CheckpointError: if there is no such file, or it was not written by `train`.
    """
    config, weights = load_train_config(path), load_base_weights(path)
    try:
        if config.num_layers > len(weights):
            raise ValueError(f"its config asks for {config.num_layers} layers, and it has {len(weights)} weights")
        if "output.weight" not in weights or weights["output.weight"].ndim != 2:
            raise ValueError("no matrix output.weight, which every transformer of this kit has")
        width = len(weights["output.weight"])
        with torch.device("meta"):  # which takes no memory: the config may describe a model far larger than the file
            wanted = build_model(config, width).state_dict()
        if foreign := sorted(wanted.keys() ^ weights.keys()):
            raise ValueError(f"{len(foreign)} parameters are either missing or unknown, e.g. {shorten(foreign[0])}")
        for name, value in wanted.items():
            if value.shape != weights[name].shape:
                raise ValueError(f"{name} is {tuple(weights[name].shape)} and should be {tuple(value.shape)}")
        model = build_model(config, width)
        model.load_state_dict(weights)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{path} holds no model of its config: {error}") from error
    return model.to(device).eval()


def load_train_config(path: str | Path) -> TrainConfig:
    """`load_config` as the `TrainConfig` that it was.

    Raises:
        FileNotFoundError, CheckpointError: as `load_config`, and if it is no config of this version.
    """
    config = load_config(path)
    if unknown := sorted(config.keys() - {field.name for field in fields(TrainConfig)}):
        raise CheckpointError(f"{path} was written by another version of the kit: it has {', '.join(unknown)}")
    try:
        return TrainConfig(**config)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"the config in {path} is damaged: {error}") from error


def find_checkpoint(resume: str | None, save_dir: str | None) -> Path | None:
    """The file that --resume means: itself, the newest of a folder, or with "auto" the newest in save_dir, if any.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        CheckpointError: if it cannot be used; the message names one beside it that can.
    """
    if resume is None or (resume == "auto" and save_dir is None):
        return None
    path = Path(save_dir if resume == "auto" else resume)
    if resume == "auto" or path.is_dir():
        newest = newest_checkpoint(path)
        if newest is None and resume != "auto":
            raise FileNotFoundError(f"there is no checkpoint in {path} to resume from")
        return newest
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        try:
            other = newest_checkpoint(path.parent)
        except CheckpointError:  # none of them is any better
            raise error from None
        raise CheckpointError(f"{error}" + f"; {other} can be resumed" * (other is not None)) from error
    return path


def build_model(config: TrainConfig, feature_dim: int, base: bool = False) -> EnhancedTransformerDecoderOnly3D:
    """The model of a run (or, with base=True, the plain model it adapts), randomly initialised."""
    options = {name: getattr(config, name) for name in ARCHITECTURE}
    if base:
        options |= {name: False for name in ARCHITECTURE if name.startswith("use_")}
    return EnhancedTransformerDecoderOnly3D(**options, feature_dim=feature_dim)
