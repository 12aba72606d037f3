"""Everything that a training run is made of while it runs, so that a resumed one goes on bit for bit."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..faces.views import FaceViews
from .checkpoint import PLAIN, STATEFUL, CheckpointError, check_run
from .config import ARCHITECTURE, MONITORED, TrainConfig
from .randomness import CPU, generator

TRACE = ("loss", "grad_norm", "prior_loss")  # of every batch; the norm only where a window of batches ends
WITHIN_EPOCH = ("batch_size", "gradient_accumulation_steps", "n_views", "mixup", "paired_views", "seed")
"""Settings that say which batches an epoch has: they may change between epochs, but not within one."""
ELSEWHERE = ("data_dir", "val_people", "test_people", "split_seed", "split_file", "min_yaw", "max_yaw",
             "base_model_path", "num_workers", "device", "devices", "save_dir", "log_dir", "save_every", "save_minutes",
             "resume")  # fmt: skip
"""Settings that may change silently: what they lead to is compared itself, or they change no weight."""


class Resumption(NamedTuple):
    """What a run that goes on from a checkpoint does otherwise than the one that wrote it.

    changed: {setting: (its value in the checkpoint, its value here)} of those that act on the training.
    same_goal: whether the best value so far is judged as the next ones are.
    """

    changed: dict[str, tuple[Any, Any]]
    same_goal: bool

    def __str__(self) -> str:
        words = [f"{name} {now} instead of {before}" for name, (before, now) in self.changed.items()]
        if not self.same_goal:
            words.append("the best model is looked for anew")
        return ", ".join(words)


@dataclass
class TrainingState:
    """
    config: of the run. data: fingerprints of its training people, validation people and base model, by name.
    epoch: finished epochs. batch: finished batches of the one that runs.
    order: state of the generator at the start of the epoch that runs; it drew the order of its batches.
    trace: (batches, 3) of the epoch that runs, see `TRACE`.
    best, stale: the best value of what is monitored, and validations since then.
    """

    config: TrainConfig
    data: dict[str, str]
    model: nn.Module
    optimizer: torch.optim.Optimizer
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

    def judge(self, row: dict[str, float]) -> bool:
        """Count a validation; whether it is the best so far."""
        value = row[self.config.monitor]
        sign = -1 if MONITORED[self.config.monitor] is min else 1
        better = math.isnan(self.best) or sign * value > sign * self.best
        self.best, self.stale = (value, 0) if better else (self.best, self.stale + 1)
        return better

    def forget_best(self) -> None:
        self.best, self.stale = math.nan, 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain values."""
        device = self.trace.device
        return {
            **{name: getattr(self, name) for name in PLAIN},
            **{name: getattr(self, name).state_dict() for name in STATEFUL},
            "generator": self.generator.get_state(), "order": self.order, "trace": self.trace,
            "torch_rng": generator(CPU).get_state(),
            "cuda_rng": generator(device).get_state() if device.type == "cuda" else None,
            "config": self.config.to_dict(), "data": self.data,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], source: str) -> Resumption:
        """Go on from a checkpoint. Settings are those of this run's config; the rest is the checkpoint's.

        Where the best value so far is no measure for what is monitored here, it is forgotten.

        Args:
            source: where state is from, for messages.

        Raises:
            CheckpointError: if state is no training run, or one of another model, other people or another base, or it
                was saved within an epoch that has other batches here.
        """
        check_run(source, state)
        mine, theirs = self.config.to_dict(), state["config"]
        changed = {name: (theirs[name], mine[name]) for name in mine if theirs.get(name, mine[name]) != mine[name]}
        self._refuse(state, changed, source)
        settings = [{name: value for name, value in group.items() if name != "params"}
                    for group in self.optimizer.param_groups]  # fmt: skip
        try:
            for name in STATEFUL:
                if state[name]:  # a scaler has no state where none was needed
                    getattr(self, name).load_state_dict(state[name])
            if "seed" not in changed:  # else what is drawn from here on is the new seed's
                self._restore_generators(state)
            if state["batch"]:
                self.trace.copy_(state["trace"])
                self.order = state["order"].cpu()
                torch.Generator().set_state(self.order)  # which fails for what is no state
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(f"{source} does not fit the model that is trained here: {error}") from error
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        for name in PLAIN:
            setattr(self, name, state[name])
        same_goal = self._same_goal(state, changed)
        if not same_goal:
            self.forget_best()
        return Resumption({name: values for name, values in changed.items() if name not in ELSEWHERE}, same_goal)

    def _restore_generators(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
        generator(CPU).set_state(state["torch_rng"].cpu())
        if self.trace.device.type == "cuda" and state["cuda_rng"] is not None:
            generator(self.trace.device).set_state(state["cuda_rng"].cpu())

    def _refuse(self, state: dict[str, Any], changed: dict[str, tuple[Any, Any]], source: str) -> None:
        """
        Raises:
            CheckpointError: see `load_state_dict`.
        """
        for name in ARCHITECTURE:
            if name in changed and name != "dropout":
                before, now = changed[name]
                raise CheckpointError(f"{source} holds another model: {name} is {before} in it and {now} here; leave "
                                      "what is in the checkpoint as it is")  # fmt: skip
        data = state["data"] if isinstance(state["data"], dict) else {"train": state["data"]}  # of earlier versions
        if data.get("train") != self.data["train"]:
            raise CheckpointError(f"{source} was trained on other people or views; resume with its data_dir, split and "
                                  "yaw range, or give it as base_model_path to a new run")  # fmt: skip
        if data.get("base", self.data["base"]) != self.data["base"]:
            raise CheckpointError(f"{source} has another base model than base_model_path, "
                                  f"{self.config.base_model_path}; resume with the one it began with")  # fmt: skip
        batches = len(state["trace"]), len(self.trace)
        if state["batch"] and batches[0] != batches[1]:
            raise CheckpointError(f"{source} was saved within an epoch of {batches[0]} batches, and here it has "
                                  f"{batches[1]}; keep batch_size and n_views, or take a checkpoint of a whole "
                                  "epoch")  # fmt: skip
        if state["batch"] and (other := [name for name in WITHIN_EPOCH if name in changed]):
            before, now = changed[other[0]]
            raise CheckpointError(f"{source} was saved within an epoch, and {other[0]} was {before} and is {now} here; "
                                  "keep it, or take a checkpoint of a whole epoch")  # fmt: skip

    def _same_goal(self, state: dict[str, Any], changed: Iterable[str]) -> bool:
        """Whether values of what is monitored mean the same in a checkpoint and here."""
        val = state["data"].get("val") if isinstance(state["data"], dict) else None
        other_loss = self.config.monitor == "val_loss" and "loss" in changed
        return "monitor" not in changed and not other_loss and val in (None, self.data["val"])


def data_fingerprint(faces: FaceViews) -> str:
    """A hash of whom a set shows and how often, without reading the embeddings."""
    digest = hashlib.sha256(repr((faces.names, faces.feature_dim, len(faces))).encode())
    digest.update(faces.angles.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def file_fingerprint(path: str | Path | None) -> str:
    """A hash of a file's bytes; empty for no file."""
    if path is None:
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
