"""What a training run is made of while it runs: its state, the folder that it writes to, and what is seen of it."""

import errno
import logging
import math
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.files import fingerprint, only_writer, writable_folder
from viewdiff_nb.training import checkpoint
from viewdiff_nb.training.checkpoint import BEST, BEST_WEIGHTS, LAST, PREVIOUS, CheckpointError
from viewdiff_nb.training.config import ARCHITECTURE, MONITORED, TrainConfig
from viewdiff_nb.training.devices import CPU, generator

# Settings that may change between epochs, but not within one, since they say which batches it has.
WITHIN_EPOCH = {"batch_size", "gradient_accumulation_steps", "n_views", "mixup", "paired_views", "seed"}
# Settings that may change without a word: what they lead to is compared itself, or they change no weight.
SILENT = {"data_dir", "val_people", "test_people", "split_seed", "split_file", "min_yaw", "max_yaw", "base_model_path"}
SILENT |= {"num_workers", "device", "devices", "save_dir", "log_dir", "save_every", "save_minutes", "resume"}

OWN_FILES = re.compile(r"(best_model|last|previous|checkpoint_epoch_\d+)_enhanced\.(pth|safetensors)")
EPOCH_TAGS = {
    "Epoch/TrainLoss": "train_loss",
    "Epoch/PriorLoss": "prior_loss",
    "Epoch/ValLoss": "val_loss",
    "Epoch/ValCosineSim": "val_cosine",
    "Epoch/ValRank1": "val_rank1",
    "Epoch/ValTAR": "val_tar",
}

log = logging.getLogger(__name__)


def data_fingerprint(faces: FaceViews) -> str:
    """A hash of whom a set shows and how often, without reading the embeddings."""
    about = repr((faces.names, faces.feature_dim, len(faces)))
    return fingerprint(about.encode(), faces.angles.cpu().numpy().tobytes())


class Resumption(NamedTuple):
    differences: str  # what a run does otherwise than the one that wrote the checkpoint, in words
    same_goal: bool  # whether the best value so far is judged as the next ones are

    def __str__(self) -> str:
        return self.differences


@dataclass
class TrainingState:
    """All that a checkpoint must hold for a resumed run to go on bit for bit."""

    config: TrainConfig
    data: dict[str, str]  # fingerprints of its people ("train", "val") and its base model ("base")
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator
    trace: Tensor  # (batches, 3) of the epoch that runs: loss, gradient norm where a window ends, prior loss
    epoch: int = 0  # how many are finished
    batch: int = 0  # how many of the epoch that runs are finished
    steps: int = 0
    seconds: float = 0.0
    order: Tensor | None = None  # state of the generator before it drew the batches of the epoch that runs
    history: list[dict[str, float]] = field(default_factory=list)
    best: float = math.nan  # value of what is monitored
    stale: int = 0  # validations since the best one

    def finish_epoch(self) -> None:
        self.epoch, self.batch, self.order = self.epoch + 1, 0, None
        self.trace.zero_()

    def judge(self, row: dict[str, float]) -> bool:
        """Count a validation; whether it is the best so far."""
        value = row[self.config.monitor]
        sign = -1 if MONITORED[self.config.monitor] is min else 1
        if math.isnan(self.best) or sign * value > sign * self.best:
            self.best, self.stale = value, 0
            return True
        self.stale += 1
        return False

    def forget_best(self) -> None:
        self.best, self.stale = math.nan, 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain values."""
        device = self.trace.device
        return {
            **{name: getattr(self, name) for name in checkpoint.PROGRESS},
            **{name: getattr(self, name).state_dict() for name in checkpoint.STATE_DICTS},
            "generator": self.generator.get_state(),
            "order": self.order,
            "trace": self.trace,
            "torch_rng": generator(CPU).get_state(),
            "cuda_rng": generator(device).get_state() if device.type == "cuda" else None,
            "config": self.config.to_dict(),
            "data": self.data,
        }

    def load_state_dict(self, state: dict[str, Any], source: str) -> Resumption:
        """Go on from a checkpoint, with the settings of this run's config; CheckpointError if it does not fit this run.

        Where the best value so far is no measure for what is monitored here, it is forgotten. source: for messages.
        """
        checkpoint.check_run(source, state)
        theirs, mine = state["config"], self.config.to_dict()
        changed = {name: (theirs[name], mine[name]) for name in mine if theirs.get(name, mine[name]) != mine[name]}
        data = state["data"] if isinstance(state["data"], dict) else {"train": state["data"]}  # as earlier versions had
        for reason in self._contradictions(state, data, changed):
            raise CheckpointError(f"{source} {reason}")
        settings = [dict(group) for group in self.optimizer.param_groups]
        try:
            for name in checkpoint.STATE_DICTS:
                if state[name] or name != "scaler":  # which has no state where none was needed
                    getattr(self, name).load_state_dict(state[name])
            if "seed" not in changed:  # else what is drawn from here on is the new seed's
                self._load_generators(state)
            if state["batch"]:
                self.trace.copy_(state["trace"])
                self.order = state["order"].cpu()
                torch.Generator().set_state(self.order)  # which fails for what is no state
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(f"{source} does not fit the model that is trained here: {error}") from error
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        for name in checkpoint.PROGRESS:
            setattr(self, name, state[name])
        other_loss = self.config.monitor == "val_loss" and "loss" in changed
        other_people = data.get("val", self.data["val"]) != self.data["val"]
        words = [f"{name} {now} instead of {before}" for name, (before, now) in changed.items() if name not in SILENT]
        other_goal = "monitor" in changed or other_loss or other_people
        if other_goal:
            self.forget_best()
            words.append("the best model is looked for anew")
        return Resumption(", ".join(words), not other_goal)

    def _load_generators(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
        generator(CPU).set_state(state["torch_rng"].cpu())
        if self.trace.device.type == "cuda" and state["cuda_rng"] is not None:
            generator(self.trace.device).set_state(state["cuda_rng"].cpu())

    def _contradictions(self, state: dict[str, Any], data: dict[str, str], changed: dict[str, tuple]) -> Iterator[str]:
        """Why this run cannot go on from state: another model, people, base, or batches within an epoch."""
        for name, (before, now) in changed.items():
            if name in ARCHITECTURE and name != "dropout":
                yield f"holds another model: {name} is {before} in it and {now} here; leave what is in the checkpoint"
        if data.get("train") != self.data["train"]:
            remedy = "resume with its data_dir, split and yaw range, or give it as base_model_path to a new run"
            yield f"was trained on other people or views; {remedy}"
        if data.get("base", self.data["base"]) != self.data["base"]:
            path = self.config.base_model_path
            yield f"has another base model than base_model_path, {path}; resume with the one it began with"
        if not state["batch"]:
            return
        before, now = len(state["trace"]), len(self.trace)
        if not 0 <= state["batch"] < before:
            yield f"is damaged: it was saved after batch {state['batch']} of {before}"
        whole = "take a checkpoint of a whole epoch"
        if before != now:
            remedy = f"keep batch_size and n_views, or {whole}"
            yield f"was saved within an epoch of {before} batches, and here it has {now}; {remedy}"
        for name, (before, now) in changed.items():
            if name in WITHIN_EPOCH:
                yield f"was saved within an epoch, and {name} was {before} and is {now} here; keep it, or {whole}"


@dataclass
class RunFolder:
    """A context for as long as the run lasts: no other run writes to its folder, and no file of another one is lost.

    What an earlier run left is put aside, into a folder within. So are the files of a run that goes on from elsewhere,
    from an epoch that is not its last, or to another goal; its best model so far goes along.
    """

    path: str | None  # save_dir; None if nothing is to be kept
    state: TrainingState
    newest: Path | None  # checkpoint of the run, wherever it is; at first the one that it goes on from
    same_goal: bool  # whether the best model so far is judged as the next ones are
    base: str | None  # file of the model that is adapted
    wanted: int  # bytes that the run will write

    def __enter__(self) -> "RunFolder":
        """OSError if the folder cannot be written to, is another run's, or has no room; ValueError if base is in it."""
        if self.path is None:
            return self
        with ExitStack() as stack:
            self.folder = stack.enter_context(only_writer(self.path, "save_dir", OWN_FILES.pattern))
            self._prepare()
            self.until_the_end = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self.until_the_end.close()

    def _prepare(self) -> None:
        if (free := shutil.disk_usage(self.folder).free) < self.wanted:
            what = f"the checkpoints of this run need about {self.wanted / 1e9:.2f} GB"
            remedy = "make room, choose another save_dir or raise save_every"
            raise OSError(errno.ENOSPC, f"{self.path} has {free / 1e9:.2f} GB free, and {what}; {remedy}")
        earlier = sorted(path for path in self.folder.iterdir() if OWN_FILES.fullmatch(path.name))
        if self.base and Path(self.base).resolve() in {path.resolve() for path in earlier}:
            what = f"base_model_path {self.base} is a file that runs write in save_dir {self.path}"
            raise ValueError(f"{what}; choose another save_dir")
        if self.newest and self.newest.parent.resolve() == self.folder.resolve():
            self.newest = self.folder / self.newest.name  # however it was spelt
        if not self._goes_on_here(earlier):
            best = self._best_so_far()
            self._put_aside(earlier)
            if best:
                self._write_best(best)
            elif not math.isnan(self.state.best):
                log.warning(f"the best model up to {self.newest} is not beside it; it is looked for anew")
                self.state.forget_best()

    def _goes_on_here(self, earlier: list[Path]) -> bool:
        """Whether the folder's files are those of the run that is resumed, and none is from after its checkpoint."""
        here = self.state.epoch, self.state.batch
        if self.newest not in earlier or not self.same_goal:
            return False
        try:
            return all(checkpoint.progress(path)[:2] <= here for path in earlier if path.suffix == ".pth")
        except (CheckpointError, FileNotFoundError):  # what is damaged, or no file, is put aside
            return False

    def _best_so_far(self) -> dict[str, Any] | None:
        """The checkpoint of the best model of the run that goes on; None if it has none, or it is lost."""
        state = self.state
        if self.newest is None or math.isnan(state.best):
            return None
        with suppress(FileNotFoundError, CheckpointError):
            found = checkpoint.load_checkpoint(self.newest.parent / BEST)
            if found.get("best") == state.best:
                return found
        just_found = state.stale == 0 and state.batch == 0 and state.config.monitor in state.history[-1]
        return state.state_dict() if just_found else None

    def _put_aside(self, earlier: list[Path]) -> None:
        """Move the files into a folder within. What the run goes on from stays, too, in case that it is killed now."""
        if not set(earlier) - {self.newest}:
            return
        aside = next(path for n in count(1) if not (path := self.folder / f"earlier_run_{n}").exists())
        aside.mkdir()
        for path in earlier:
            put = shutil.copyfile if path == self.newest else shutil.move
            put(path, aside / path.name)
        log.warning(f"{self.path} holds an earlier run; its files are in {aside.name} there now")

    def save(self, name: str) -> None:
        """Keep the state of the run."""
        if self.path is not None:
            checkpoint.save_checkpoint(self.folder / name, self.state.state_dict())
            self.newest = self.folder / name

    def save_last(self) -> None:
        """Keep the state of the run beside the one before, so that there is always a whole one."""
        if self.path is not None and (self.folder / LAST).exists():
            (self.folder / LAST).replace(self.folder / PREVIOUS)
        self.save(LAST)

    def save_best(self) -> None:
        """Keep the state of the run as its best."""
        if self.path is not None:
            self._write_best(self.state.state_dict())
            self.newest = self.folder / BEST

    def _write_best(self, content: dict[str, Any]) -> None:
        """A checkpoint, and the model's weights for whoever reads safetensors."""
        checkpoint.save_checkpoint(self.folder / BEST, content)
        checkpoint.save_weights(self.folder / BEST_WEIGHTS, content["model"], content["config"])


class TrainingLog:
    """What is seen of a run: a progress bar with loss and rate, and TensorBoard under the guide's names in log_dir.

    batches: of an epoch. done: batches that an earlier run did. Raises OSError if log_dir cannot be written to.
    """

    def __init__(self, log_dir: str | Path | None, epochs: int, batches: int, done: int, progress: bool) -> None:
        self.writer, self.epochs = None, epochs
        self.shown: dict[str, str] = {}
        if log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # here, for it takes a second

            self.writer = SummaryWriter(str(writable_folder(log_dir)))
        hide = not progress or sys.stderr is None
        self.bar = tqdm(total=epochs * batches, initial=done, unit="batch", dynamic_ncols=True, disable=hide)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

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
        if self.writer is not None:
            for i, (loss, rate) in enumerate(zip(losses, rates, strict=True), first):
                self.writer.add_scalar("Train/Loss", loss, i)
                self.writer.add_scalar("Train/LearningRate", rate, i)

    def epoch(self, row: dict[str, float]) -> None:
        """A row of the history."""
        self.show(**{name: row[name] for name in ("train_loss", "val_rank1") if name in row})
        if self.writer is not None:
            for tag, key in EPOCH_TAGS.items():
                if key in row:
                    self.writer.add_scalar(tag, row[key], row["epoch"])
            self.writer.flush()
