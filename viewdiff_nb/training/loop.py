"""The training loop: one, used by the command line, the notebooks and the studies."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.files import writable_folder
from viewdiff_nb.metrics import FAR, NotFiniteError, can_tell
from viewdiff_nb.training.batches import (
    FaceBatch,
    Mixup,
    count_batches,
    draw_epoch,
    feed,
    move_if_it_fits,
    views_to_train,
)
from viewdiff_nb.training.checkpoint import PERIODIC, find_checkpoint, load_checkpoint, prepare_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import (
    GraphedFunction,
    Processes,
    connect,
    manual_seed,
    set_capturable,
)
from viewdiff_nb.training.evaluation import evaluate, probes_to_score
from viewdiff_nb.training.losses import LOSSES, Objective, build_optimizer, set_rates, warmup_cosine
from viewdiff_nb.training.result import (
    StopRequest,
    TrainingAdvice,
    TrainingDiverged,
    TrainingInterrupted,
    TrainResult,
    advice,
    divergence_advice,
    find_cause,
    memory_advice,
)
from viewdiff_nb.training.run_state import (
    TRACE,
    RunFolder,
    TrainingLog,
    TrainingState,
    data_fingerprint,
    file_fingerprint,
)

told = logging.getLogger(__name__)
LOOK = 1.0  # seconds between looks at the loss; each waits for the device


def train(
    config: TrainConfig,
    train_faces: FaceViews,
    val_faces: FaceViews,
    model: nn.Module | None = None,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
    progress: bool = True,
    stop: StopRequest | None = None,
) -> TrainResult:
    """Train as config says.

    An interrupt (Ctrl-C, a notebook's stop button) ends the run after the step it is in, with a checkpoint if there
    is a save_dir. In a notebook the result says so, and resume goes on from there; in a program, whose next line would
    take the model for a trained one, it is raised.

    Args:
        train_faces, val_faces: different people; of train_faces the views within the config's yaw
            range are used. They lie on the device as a whole if they fit (see `move_if_it_fits`).
        model: to train instead of the one that config describes (a baseline, say).
        on_epoch: called with the history so far after every epoch, by the first process.
        stop: set its `asked` from another thread to interrupt the run; with one process only.

    Raises:
        TrainingDiverged: if the loss is not finite; its result has the model at its last good state.
        ValueError: if there is nothing to train, or data and config disagree.
        CheckpointError: if config.resume cannot be resumed.
        TrainingInterrupted: a KeyboardInterrupt, with the result so far.
        MemoryError: if a step does not fit in memory, with what to try.
        OSError: if a folder cannot be written to, or its disk is too full.
    """
    if overlap := set(train_faces.names) & set(val_faces.names):
        raise ValueError(f"{len(overlap)} people are in both training and validation, e.g. {min(overlap)!r}")
    probes, people = probes_to_score(config if model is None else model, val_faces), len(val_faces.names)
    if people < 2 or not probes:
        raise ValueError(
            f"validation needs 2 people or more, with views enough to be scored; got {people} with {probes} predictions"
        )
    impostors = probes * (people - 1)
    if config.monitor == "val_tar" and not can_tell(impostors):
        raise ValueError(
            f"{people} validation people with {probes} predictions make {impostors} impostor pairs, too "
            f"few for a false accept rate of {FAR:g}; raise val_people, or monitor something "
            "else"
        )
    if model is not None and (config.base_model_path or config.use_prior_preservation):
        raise ValueError(
            "a model given to train() is trained as it is: base_model_path and prior preservation are "
            "for models that the config builds"
        )
    processes = connect(config)
    result = _train(processes, config, train_faces, val_faces, model, on_epoch, progress, stop or StopRequest())
    if result.stopped in ("finished", "early"):
        result.advice = advice(result.history, config)
    for sentence in result.advice:
        warnings.warn(sentence, TrainingAdvice, stacklevel=2)
    return result


def _train(machines: Processes, config: TrainConfig, *arguments) -> TrainResult:
    with memory_advice(config):
        run = _Run(machines, config, *arguments)
        try:
            return run.run()
        finally:
            run.captured = run.state.optimizer.found_inf = None


class _Run:
    """One training run in one process: `run` is the loop, in the order in which things happen."""

    def __init__(
        self,
        machines: Processes,
        config: TrainConfig,
        train_faces: FaceViews,
        val_faces: FaceViews,
        model: nn.Module | None,
        on_epoch: Callable[[pd.DataFrame], None] | None,
        progress: bool,
        stop: StopRequest,
    ) -> None:
        self.machines, self.config, self.on_epoch, self.stop = machines, config, on_epoch, stop
        self.device, self.first = machines.device, machines.rank == 0
        self.progress = progress and self.first

        faces, self.val_faces = move_if_it_fits(train_faces, self.device), move_if_it_fits(val_faces, self.device)
        self.faces = views_to_train(faces, config)
        self.mixup = Mixup(self.faces) if config.mixup else None
        self.batches, self.window = count_batches(self.faces, config), config.gradient_accumulation_steps
        self.windows = math.ceil(self.batches / self.window)  # of an epoch; each ends with a step of the optimiser

        base = prior_faces = None
        if model is None:
            model, base = prepare_model(config, faces.feature_dim)
        model.to(self.device)
        optimizer = build_optimizer(model, config)
        set_capturable(optimizer, self.device, config.use_cuda_graph)
        self.trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.schedule = warmup_cosine(config.warmup, config.epochs * self.windows)
        self.forward = machines.share(model, config.views_together)
        if base:
            base, prior_faces = base.to(self.device), faces.where(faces.abs_yaw < config.prior_max_yaw).in_memory()
            prior_faces = prior_faces.to(self.device)
        front = self.faces.front.to(self.device)
        self.objective = Objective(config, self.forward, front, self.device, base, prior_faces)
        scaled = self.objective.amp_dtype is torch.float16
        data = {
            "train": data_fingerprint(self.faces),
            "val": data_fingerprint(self.val_faces),
            "base": file_fingerprint(config.base_model_path),
        }
        self.state = TrainingState(
            config,
            data,
            model,
            optimizer,
            torch.amp.GradScaler(self.device.type, enabled=scaled),
            torch.Generator().manual_seed(config.seed),
            trace=torch.zeros(self.batches, len(TRACE), device=self.device),
        )

        manual_seed(config.seed)  # dropout
        checkpoint = find_checkpoint(config.resume, config.save_dir)
        same_goal = self._resume(checkpoint) if checkpoint else True
        self.folder = RunFolder(
            config.save_dir if self.first else None,
            self.state,
            checkpoint,
            same_goal,
            config.base_model_path,
            self._bytes_to_write(),
        )
        self.captured: GraphedFunction | None = None  # while it runs: both know each other, and hold memory of the GPU
        optimizer.zero_grad(set_to_none=True)  # what a model that was given may have of earlier steps
        self.good = [p.detach().clone() for p in self.trainable]  # after the last epoch that ended well
        self.saved_at = self.looked_at = time.monotonic()

    def _resume(self, path: Path) -> bool:
        """Go on from a checkpoint; whether its best model is still the one to beat."""
        found = self.state.load_state_dict(load_checkpoint(path, self.device), str(path))
        if self.state.epoch >= self.config.epochs:
            raise ValueError(
                f"{path} has {self.state.epoch} epochs behind it; ask for more than that (epochs is "
                f"{self.config.epochs})"
            )
        if self.first and str(found):
            told.warning(f"the run goes on from {path} with {found}")
        return found.same_goal

    def _bytes_to_write(self) -> int:
        """About what the checkpoints of this run take: best, last, previous, a part, and the periodic ones."""
        weights = sum(p.nbytes for p in self.state.model.parameters())
        whole = weights + 2 * sum(p.nbytes for p in self.trainable)  # with AdamW's two moments
        files = 4 + math.ceil((self.config.epochs - self.state.epoch) / self.config.save_every)
        return files * whole + weights

    def run(self) -> TrainResult:
        """Epochs, until they are done or something else ends the run."""
        state, config = self.state, self.config
        often = config.val_every <= config.epochs
        done = state.epoch * self.batches + state.batch
        if config.use_cuda_graph:
            self.captured = GraphedFunction(self._learn, self.device)
        log_dir = writable_folder(config.log_dir) if config.log_dir and self.first else None
        self.machines.wait()  # until all have read the checkpoint: the first may move files now
        with (
            self.folder,
            TrainingLog(log_dir, config.epochs, self.batches, done, self.progress) as self.log,
            self.stop as stop,
        ):
            state.best, state.stale = self.machines.from_first((state.best, state.stale))  # the folder may have no best
            if config.base_model_path and often and not state.history:  # where the adaptation starts from
                row = {"epoch": 0} | evaluate(state.model, self.val_faces, LOSSES[config.loss])
                state.history.append(row)
                self._tell(row)
            ended = self._ended()
            while not ended:
                whole = self._epoch(stop)
                if whole:
                    self._finish_epoch()
                ended = self._ended()
                if not ended and (not whole or self._agreed(stop.asked)):
                    if whole:  # else it was saved within the epoch
                        self._save_last()
                    ended = "interrupted"
            if ended == "early":
                self.folder.save(PERIODIC.format(state.epoch))
        result = self._result(ended)
        if self._agreed(stop.to_end):
            raise TrainingInterrupted(result)
        return result

    def _ended(self) -> Literal["early", "finished"] | None:
        """Why there is no further epoch; None if there is one."""
        if self.config.patience and self.state.stale >= self.config.patience:
            return "early"
        return "finished" if self.state.epoch == self.config.epochs else None

    def _epoch(self, stop: StopRequest) -> bool:
        """The batches of an epoch, or what is left of them; False if it was interrupted."""
        state, machines = self.state, self.machines
        self.forward.train()
        if machines.count > 1:  # each process has dropout of its own; set anew, so that no checkpoint need hold it
            torch.manual_seed(self.config.seed + 1_000_003 * (1 + state.epoch * machines.count + machines.rank))
        rows, weights = self._draw()
        started = time.perf_counter()
        left = feed(self.faces, rows[state.batch :], self.device, self.config.num_workers)
        for i, batch in enumerate(left, state.batch):
            first = i // self.window * self.window
            count = min(self.window, self.batches - first)  # the last window may be shorter
            ends = i + 1 == first + count
            if i == first:
                set_rates(state.optimizer, self.rates, self.schedule(state.epoch * self.windows + i // self.window))
            learn = self.captured or partial(self._learn, count=count, ends=ends)
            state.trace[i] = learn(*batch, *self._beside(batch, weights and weights[i]))
            if not ends:
                continue
            state.steps += 1
            state.batch = i + 1
            self.log.batch(state.epoch + 1, count)
            if machines.count > 1:
                continue  # they look, save and stop together, when the epoch ends
            now = time.monotonic()
            if now - self.looked_at >= LOOK:
                self._check(rows, weights)
                self.log.show(loss=state.trace[i, 0].item())
                self.looked_at = now
            if state.batch < self.batches and (stop.asked or now - self.saved_at >= 60 * self.config.save_minutes):
                self._check(rows, weights)
                state.seconds, started = state.seconds + time.perf_counter() - started, time.perf_counter()
                self._save_last()
                if stop.asked:
                    return False
        self._check(rows, weights)  # waits for the device
        state.seconds += time.perf_counter() - started
        return True

    def _draw(self) -> tuple[Sequence[Tensor], list[Tensor] | None]:
        """Indices and mixing weights of all batches of the epoch; the same again if it is resumed."""
        state, now = self.state, self.state.generator.get_state()
        if state.batch:
            state.generator.set_state(state.order)
        else:
            state.order = now
        drawn = draw_epoch(self.faces, self.config, self.mixup, state.generator)
        if state.batch:
            state.generator.set_state(now)
        return drawn

    def _beside(self, batch: FaceBatch, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What a batch is trained with, on the device: weights for mix-up, and rows of prior samples."""
        if weight is not None:
            weight = weight.to(self.device, non_blocking=True)
        count = len(batch.person if weight is None else weight)
        return weight, self.objective.draw(count, self.state.generator)

    def _learn(self, *tensors: Tensor | None, count: int = 1, ends: bool = True) -> Tensor:
        """A batch forward and backward, and where a window of count batches ends, the update.

        Args:
            tensors: those of the batch, and what `_beside` gives.

        Returns:
            (3,) its row of the trace.
        """
        *fields, weight, kept = tensors
        with self.machines.accumulating(self.forward, more=not ends):
            cost = self.objective(FaceBatch(*fields), weight, kept)
            self.state.scaler.scale(cost.loss / count).backward()
        loss = cost.loss.detach()
        nothing = torch.zeros_like(loss)
        return torch.stack((loss, self._update() if ends else nothing, nothing if cost.prior is None else cost.prior))

    def _update(self) -> Tensor:
        """Clip the gradient and update; returns its norm before. A gradient that is not finite changes nothing."""
        state = self.state
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trainable, self.config.clip_norm)
        if not state.scaler.is_enabled():  # which says the same to the optimiser
            state.optimizer.found_inf = (~norm.isfinite()).float()  # read by fused AdamW, on the device
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        return norm

    def _check(self, rows: Sequence[Tensor], weights: list[Tensor] | None) -> None:
        """
        Raises:
            TrainingDiverged: if a batch of this epoch had no finite loss or gradient.
        """
        state = self.state
        trace = state.trace[:, :1] if state.scaler.is_enabled() else state.trace[:, :2]  # fp16 overflows now and then
        bad = ~trace.isfinite().all(1)
        if not bad.any():
            return
        i = int(bad.float().argmax())
        [batch] = feed(self.faces, rows[i : i + 1], self.device)
        beside = self._beside(batch, weights and weights[i])
        cause = find_cause(self.forward, batch, lambda b: self.objective(b, *beside).loss)
        raise self._diverged(
            f"batch {i} of epoch {state.epoch + 1} has loss {state.trace[i, 0].item():g} and gradient "
            f"norm {state.trace[i, 1].item():g}: {cause}"
        )

    @torch.no_grad()
    def _diverged(self, what: str) -> TrainingDiverged:
        """The error, with the model as it was when all was well."""
        torch._foreach_copy_(self.trainable, self.good)
        message = (
            f"{what}. Try: {divergence_advice(self.config)}. The model is again what it was after epoch "
            f"{self.state.epoch}"
        )
        if self.folder.newest:
            message += f"; {self.folder.newest} is the last checkpoint"
        return TrainingDiverged(message, self._result("diverged"))

    @torch.no_grad()
    def _finish_epoch(self) -> None:
        """Validate, tell, and keep."""
        state, config = self.state, self.config
        loss, norm, prior = state.trace.sum(0).tolist()
        first_step = state.epoch * self.windows
        rates = [self.rates[0] * self.schedule(first_step + i) for i in range(self.windows + 1)]
        row = {
            "epoch": state.epoch + 1,
            "train_loss": loss / self.batches,
            "lr": rates[-1],
            "grad_norm": norm / self.windows,
            "seconds": state.seconds,
        }
        if self.objective.task is not None:
            row["prior_loss"] = prior / self.batches
        validated = (state.epoch + 1) % config.val_every == 0 or state.epoch + 1 == config.epochs
        if validated:
            try:
                row |= self.machines.from_first(evaluate(state.model, self.val_faces, LOSSES[config.loss]))
            except NotFiniteError as error:
                raise self._diverged(
                    f"after epoch {state.epoch + 1} the validation people's predictions are not "
                    "finite, though every loss and gradient was"
                ) from error
        best = validated and state.judge(row)
        torch._foreach_copy_(self.good, self.trainable)
        self.log.losses(
            state.epoch * self.batches,
            state.trace[:, 0].tolist(),
            [rates[i // self.window] for i in range(self.batches)],
        )
        state.finish_epoch()
        state.history.append(row)
        if best:
            self.folder.save_best()
        if state.epoch % config.save_every == 0 or state.epoch == config.epochs:
            self.folder.save(PERIODIC.format(state.epoch))
        if time.monotonic() - self.saved_at >= 60 * config.save_minutes:
            self._save_last()
        self._tell(row)

    def _tell(self, row: dict[str, float]) -> None:
        self.log.epoch(row)
        if self.on_epoch and self.machines.rank == 0:
            self.on_epoch(pd.DataFrame(self.state.history))

    def _save_last(self) -> None:
        self.saved_at = time.monotonic()
        self.folder.save_last()

    def _agreed(self, wish: bool) -> bool:
        """Whether the first process wishes it; a signal need not reach all at the same step."""
        return self.machines.from_first(wish) if self.machines.count > 1 else wish

    def _result(self, stopped: str) -> TrainResult:
        state, history = self.state, pd.DataFrame(self.state.history)
        return TrainResult(state.model, history, state.seconds, state.steps, stopped, self.folder.newest)
