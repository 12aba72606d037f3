"""Models before and after training: built for a run, and loaded from what a run has left."""

from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from ..files import shorten
from ..modules.transformer import EnhancedTransformerDecoderOnly3D
from .checkpoint import CheckpointError, load_base_weights, load_checkpoint, load_config, newest_checkpoint
from .config import TrainConfig
from .randomness import OwnRandomness


def prepare_model(config: TrainConfig, feature_dim: int) -> tuple[EnhancedTransformerDecoderOnly3D, nn.Module | None]:
    """The model of a run, and the frozen base if prior preservation needs one; seeded by config.seed.

    Without a base there is nothing worth freezing: LoRA layers then train their random W as well.
    """
    with OwnRandomness(config.seed):
        model, base = config.build_model(feature_dim), config.build_model(feature_dim, base=True)
    if not config.base_model_path:
        model.requires_grad_(True)
    else:
        state = load_base_weights(config.base_model_path)
        model.load_base(state)
        if config.use_prior_preservation:
            if extra := sorted(set(state) - set(base.state_dict())):
                raise ValueError(f"prior preservation needs a plain base; {config.base_model_path} is adapted already "
                                 f"({len(extra)} parameters more, e.g. {extra[0]})")  # fmt: skip
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
            wanted = config.build_model(width).state_dict()
        if foreign := sorted(wanted.keys() ^ weights.keys()):
            raise ValueError(f"{len(foreign)} parameters are either missing or unknown, e.g. {shorten(foreign[0])}")
        for name, value in wanted.items():
            if value.shape != weights[name].shape:
                raise ValueError(f"{name} is {tuple(weights[name].shape)} and should be {tuple(value.shape)}")
        model = config.build_model(width)
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
