"""Everything that a training run is made of while it runs, so that a resumed one goes on bit for bit."""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..faces.views import FaceViews
from .checkpoint import CheckpointError
from .config import ARCHITECTURE, MONITORED, TrainConfig
from .randomness import CPU, generator

TRACE = ("loss", "grad_norm", "prior_loss")  # of every batch; the norm only where a window of batches ends
PLAIN = ("epoch", "batch", "steps", "seconds", "history", "best", "stale")


@dataclass
class TrainingState:
    """
    epoch: finished epochs. batch: finished batches of the one that runs.
    order: state of the generator at the start of the epoch that runs; it drew the order of its batches.
    trace: (batches, 3) of the epoch that runs, see `TRACE`.
    best, stale: the best value of what is monitored, and validations since then.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    generator: torch.Generator
    trace: Tensor
    epoch: int = 0
    batch: int = 0
    steps: int = 0
    seconds: float = 0.0
    order: Tensor | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    best: float = math.nan
    stale: int = 0

    def finish_epoch(self) -> None:
        self.epoch, self.batch, self.order = self.epoch + 1, 0, None
        self.trace.zero_()

    def judge(self, row: dict[str, float], monitor: str) -> bool:
        """Count a validation; whether it is the best so far."""
        value = row[monitor]
        better = math.isnan(self.best) or MONITORED[monitor](value, self.best) == value != self.best
        self.best, self.stale = (value, 0) if better else (self.best, self.stale + 1)
        return better

    def state_dict(self, config: TrainConfig, data: str) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain values."""
        device = self.trace.device
        return {
            **{name: getattr(self, name) for name in PLAIN},
            **{name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler", "scaler")},
            "generator": self.generator.get_state(), "order": self.order, "trace": self.trace,
            "torch_rng": generator(CPU).get_state(),
            "cuda_rng": generator(device).get_state() if device.type == "cuda" else None,
            "config": config.to_dict(), "data": data,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], config: TrainConfig, data: str, source: str) -> None:
        """
        Args:
            source: where state is from, for messages.

        Raises:
            CheckpointError: if state is no training run, or one of another model or other people.
        """
        if missing := {*PLAIN, "model", "optimizer", "scheduler", "scaler", "generator", "torch_rng"} - set(state):
            raise CheckpointError(f"{source} holds weights, but no training run to go on with "
                                  f"(no {', '.join(sorted(missing))}); give it as base_model_path")  # fmt: skip
        mine, theirs = config.to_dict(), state["config"]
        if changed := [name for name in ARCHITECTURE if name != "dropout" and mine[name] != theirs[name]]:
            raise CheckpointError(f"{source} holds another model: {changed[0]} is {theirs[changed[0]]} in it and "
                                  f"{mine[changed[0]]} here; leave what is in the checkpoint as it is")  # fmt: skip
        if state["data"] != data:
            raise CheckpointError(f"{source} was trained on other people or views; resume with its data_dir, split and "
                                  "yaw range, or give it as base_model_path to a new run")  # fmt: skip
        if state["batch"] and len(state["trace"]) != len(self.trace):
            raise CheckpointError(f"{source} was saved within an epoch of {len(state['trace'])} batches, and here it "
                                  f"has {len(self.trace)}; keep batch_size and n_views, or take a checkpoint of a "
                                  "whole epoch")  # fmt: skip
        try:
            for name in ("model", "optimizer", "scheduler", "scaler"):
                getattr(self, name).load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{source} does not fit the model that is trained here: {error}") from error
        for name in PLAIN:
            setattr(self, name, state[name])
        if self.batch:
            self.trace.copy_(state["trace"])
            self.order = state["order"].cpu()
        self.generator.set_state(state["generator"].cpu())
        generator(CPU).set_state(state["torch_rng"].cpu())
        if self.trace.device.type == "cuda" and state["cuda_rng"] is not None:
            generator(self.trace.device).set_state(state["cuda_rng"].cpu())


def data_fingerprint(faces: FaceViews) -> str:
    """A hash of whom a set shows and how often, without reading the embeddings."""
    digest = hashlib.sha256(repr((faces.names, faces.feature_dim, len(faces))).encode())
    digest.update(faces.angles.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
