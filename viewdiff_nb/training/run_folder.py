"""The folder in which a run keeps its checkpoints: one run at a time, and no file of another run lost."""

import logging
import math
import re
import shutil
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import PART
from ..paths import writable_folder
from . import checkpoint
from .checkpoint import BEST, BEST_WEIGHTS, LAST, CheckpointError
from .state import TrainingState

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
            raise ValueError(f"base_model_path {self.base} is a file that runs write in save_dir {self.path}; choose "
                             "another save_dir")  # fmt: skip
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
