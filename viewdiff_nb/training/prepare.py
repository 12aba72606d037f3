"""Models before and after training: built for a run, and loaded from what a run has left."""

from pathlib import Path

import torch
from torch import nn

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
    config, weights = load_config(path), load_base_weights(path)
    model = TrainConfig(**config).build_model(weights["output.weight"].shape[0])
    model.load_state_dict(weights)
    return model.to(device).eval()


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
