"""Everything that a training run is made of while it runs, so that a resumed one goes on bit for bit."""

import hashlib
import logging
import math
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm.auto import tqdm

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.files import PART, writable_folder
from viewdiff_nb.training import checkpoint
from viewdiff_nb.training.checkpoint import BEST, BEST_WEIGHTS, LAST, PLAIN, STATEFUL, CheckpointError, check_run
from viewdiff_nb.training.config import ARCHITECTURE, MONITORED, TrainConfig
from viewdiff_nb.training.devices import CPU, generator

TRACE = ("loss", "grad_norm", "prior_loss")  # of every batch; the norm only where a window of batches ends
WITHIN_EPOCH = ("batch_size", "gradient_accumulation_steps", "n_views", "mixup", "paired_views", "seed")
"""Settings that say which batches an epoch has: they may change between epochs, but not within one."""
ELSEWHERE = (
    "data_dir",
    "val_people",
    "test_people",
    "split_seed",
    "split_file",
    "min_yaw",
    "max_yaw",
    "base_model_path",
    "num_workers",
    "device",
    "devices",
    "save_dir",
    "log_dir",
    "save_every",
    "save_minutes",
    "resume",
)
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
            "generator": self.generator.get_state(),
            "order": self.order,
            "trace": self.trace,
            "torch_rng": generator(CPU).get_state(),
            "cuda_rng": generator(device).get_state() if device.type == "cuda" else None,
            "config": self.config.to_dict(),
            "data": self.data,
        }

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
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
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
                raise CheckpointError(
                    f"{source} holds another model: {name} is {before} in it and {now} here; leave "
                    "what is in the checkpoint as it is"
                )
        data = state["data"] if isinstance(state["data"], dict) else {"train": state["data"]}  # of earlier versions
        if data.get("train") != self.data["train"]:
            raise CheckpointError(
                f"{source} was trained on other people or views; resume with its data_dir, split and "
                "yaw range, or give it as base_model_path to a new run"
            )
        if data.get("base", self.data["base"]) != self.data["base"]:
            raise CheckpointError(
                f"{source} has another base model than base_model_path, "
                f"{self.config.base_model_path}; resume with the one it began with"
            )
        batches = len(state["trace"]), len(self.trace)
        if state["batch"] and batches[0] != batches[1]:
            raise CheckpointError(
                f"{source} was saved within an epoch of {batches[0]} batches, and here it has "
                f"{batches[1]}; keep batch_size and n_views, or take a checkpoint of a whole "
                "epoch"
            )
        if state["batch"] and (other := [name for name in WITHIN_EPOCH if name in changed]):
            before, now = changed[other[0]]
            raise CheckpointError(
                f"{source} was saved within an epoch, and {other[0]} was {before} and is {now} here; "
                "keep it, or take a checkpoint of a whole epoch"
            )

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


# ---- The folder in which a run keeps its checkpoints: one run at a time, and no file of another run lost.


LOCK = ".lock"  # the system releases it when its process ends, however it ends
OWN = re.compile(r"(best_model|last|previous|checkpoint_epoch_\d+)_enhanced\.(pth|safetensors)")
OWN_PART = re.compile(OWN.pattern + r"\.\d+" + re.escape(PART))


told = logging.getLogger(__name__)


class RunFolder:
    """A context for as long as the run lasts.

    A new run leaves nothing of an earlier one to be written over: what the folder holds of that is put aside, into a
    folder within. So does one that goes on from elsewhere, from an epoch that is not the last, or to another goal; it
    takes its best model so far along.

    Args:
        path: save_dir; None if nothing is to be kept.
        state: of the run.
        resumed: the checkpoint that it goes on from.
        same_goal: whether the best model so far is judged as the next ones are.
        base: the file of the model that is adapted.
        wanted: bytes that the run will write.
    """

    def __init__(
        self,
        path: str | None,
        state: TrainingState,
        resumed: Path | None,
        same_goal: bool,
        base: str | None,
        wanted: int,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.newest = resumed  # the newest checkpoint of the run, wherever it is
        self.state, self.same_goal, self.wanted = state, same_goal, wanted
        self.base = None if base is None else Path(base)

    def __enter__(self) -> "RunFolder":
        """
        Raises:
            OSError: if the folder cannot be written to, another run is writing to it, or its disk is too full.
            ValueError: if the base model is a file that this run would write over.
        """
        if self.path is None:
            return self
        writable_folder(self.path)
        self.lock = FileLock(self.path / LOCK)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            what = f"another run is writing to {self.path}; wait for its end, or choose another save_dir"
            raise OSError(what) from None
        try:
            self._prepare()
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self.lock.release()

    def _prepare(self) -> None:
        for part in self._files(OWN_PART):  # of a run that was killed while it wrote
            part.unlink()
        checkpoint.check_space(self.path, self.wanted)
        earlier = self._files(OWN)
        if self.base is not None and self.base.resolve() in {path.resolve() for path in earlier}:
            raise ValueError(
                f"base_model_path {self.base} is a file that runs write in save_dir {self.path}; choose "
                "another save_dir"
            )
        if self.newest is not None and self.newest.parent.resolve() == self.path.resolve():
            self.newest = self.path / self.newest.name  # however it was spelt
        if not self._goes_on_here(earlier):
            best = self._best_so_far()
            self._put_aside(earlier)
            self._keep_best(best)

    def _files(self, names: re.Pattern) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if names.fullmatch(path.name))

    def _goes_on_here(self, earlier: list[Path]) -> bool:
        """Whether the folder's files are those of the run that is resumed, and none is from after its checkpoint."""
        if self.newest not in earlier or not self.same_goal:
            return False
        here = self.state.epoch, self.state.batch
        try:
            return all(checkpoint.progress(path)[:2] <= here for path in earlier if path.suffix == ".pth")
        except CheckpointError:  # what is damaged is put aside
            return False

    def _best_so_far(self) -> dict[str, Any] | None:
        """The best model of the run that goes on, as its checkpoint; None if it is not beside the run's own."""
        path = self.newest and self.newest.parent / BEST
        if path is None or not path.is_file():
            return None
        try:
            found = checkpoint.load_checkpoint(path)
        except CheckpointError:
            return None
        return found if found.get("best") == self.state.best else None

    def _put_aside(self, earlier: list[Path]) -> None:
        """Move the files into a folder within, but for the checkpoint that the run goes on from: a run that is killed
        now finds it here again."""
        others = [path for path in earlier if path != self.newest]
        if not others:
            return
        aside = next(path for n in count(1) if not (path := self.path / f"earlier_run_{n}").exists())
        aside.mkdir()
        if self.newest in earlier:
            shutil.copyfile(self.newest, aside / self.newest.name)
        for path in others:
            path.rename(aside / path.name)
        told.warning(f"{self.path} holds an earlier run; its files are in {aside.name} there now")

    def _keep_best(self, best: dict[str, Any] | None) -> None:
        """Begin the folder with the best model of a run that goes on, or have it looked for anew."""
        state = self.state
        if self.newest is None or math.isnan(state.best):
            return
        if best is not None:
            checkpoint.save_checkpoint(self.path / BEST, best)
            checkpoint.save_weights(self.path / BEST_WEIGHTS, best["model"], best["config"])
        elif state.stale == 0 and state.batch == 0 and state.config.monitor in state.history[-1]:
            self.save_best()  # it is the state that the run goes on from
        else:
            told.warning(f"the best model up to {self.newest} is not beside it; it is looked for anew")
            state.forget_best()

    def save(self, name: str) -> None:
        """Keep the state of the run."""
        if self.path is not None:
            checkpoint.save_checkpoint(self.path / name, self.state.state_dict())
            self.newest = self.path / name

    def save_last(self) -> None:
        """Keep the state of the run beside the one before, so that there is always a whole one."""
        if self.path is not None:
            checkpoint.keep_previous(self.path)
            self.save(LAST)

    def save_best(self) -> None:
        """Keep the state of the run as its best, and the model's weights for whoever reads safetensors."""
        if self.path is not None:
            self.save(BEST)
            weights, config = self.state.model.state_dict(), self.state.config.to_dict()
            checkpoint.save_weights(self.path / BEST_WEIGHTS, weights, config)


# ---- What is seen of a run while it runs: a progress bar with loss and rate, and TensorBoard under the guide's names.


EPOCH_TAGS = {
    "Epoch/TrainLoss": "train_loss",
    "Epoch/PriorLoss": "prior_loss",
    "Epoch/ValLoss": "val_loss",
    "Epoch/ValCosineSim": "val_cosine",
    "Epoch/ValRank1": "val_rank1",
    "Epoch/ValTAR": "val_tar",
}


class TrainingLog:
    """
    Args:
        log_dir: of the event files; None for none.
        epochs, batches: of the run, and of an epoch.
        done: batches that an earlier run did.
        progress: whether to show a bar.
    """

    def __init__(self, log_dir: str | None, epochs: int, batches: int, done: int, progress: bool) -> None:
        self.writer, self.batches, self.epochs = None, batches, epochs
        if log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # here, for it takes a second

            self.writer = SummaryWriter(str(writable_folder(log_dir)))
        self.bar = tqdm(
            total=epochs * batches,
            initial=done,
            unit="batch",
            dynamic_ncols=True,
            disable=not progress or sys.stderr is None,
        )
        self.shown: dict[str, str] = {}

    def batch(self, epoch: int, count: int) -> None:
        """count batches more; epoch: the one they belong to, from 1."""
        self.bar.set_description(f"epoch {epoch}/{self.epochs}", refresh=False)
        self.bar.update(count)

    def show(self, **values: float) -> None:
        """Numbers at the end of the bar, until they are shown anew."""
        self.shown |= {name: f"{value:.3g}" for name, value in values.items()}
        self.bar.set_postfix(self.shown)

    def losses(self, first: int, losses: Sequence[float], rates: Sequence[float]) -> None:
        """Losses and learning rates of an epoch's batches; first: the number of its first batch in the run."""
        if self.writer is None:
            return
        for i, (loss, rate) in enumerate(zip(losses, rates, strict=True), first):
            self.writer.add_scalar("Train/Loss", loss, i)
            self.writer.add_scalar("Train/LearningRate", rate, i)

    def epoch(self, row: dict[str, float]) -> None:
        """A row of the history."""
        self.show(**{name: row[name] for name in ("train_loss", "val_rank1") if name in row})
        if self.writer is None:
            return
        for tag, key in EPOCH_TAGS.items():
            if key in row:
                self.writer.add_scalar(tag, row[key], row["epoch"])
        self.writer.flush()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
