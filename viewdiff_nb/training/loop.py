"""The training loop: one, used by the command line, the notebooks and the studies."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.training.batches import (
    FaceBatch,
    Mixup,
    count_batches,
    draw_epoch,
    feed,
    move_if_it_fits,
    views_to_train,
)
from viewdiff_nb.training.checkpoint import PERIODIC, file_fingerprint, find_checkpoint, load_checkpoint, prepare_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import GraphedFunction, connect, manual_seed, set_capturable
from viewdiff_nb.training.losses import LOSSES, Objective, build_optimizer, compiled, set_rates, warmup_cosine
from viewdiff_nb.training.result import (
    StopRequest,
    TrainingDiverged,
    TrainingInterrupted,
    TrainResult,
    advise,
    check_people,
    diverged,
    evaluate,
    find_cause,
    memory_advice,
)
from viewdiff_nb.training.run_state import RunFolder, TrainingLog, TrainingState, data_fingerprint

logger = logging.getLogger(__name__)
CHECK_EVERY = 1.0  # seconds; a check of the loss waits for the device


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

    An interrupt (Ctrl-C, a notebook's stop button) ends the run after the step it is in, with a checkpoint in save_dir.
    In a notebook the result says so, and resume goes on from there; in a program it is raised.

    Args:
        train_faces, val_faces: different people; of train_faces the views within the config's yaw range are used.
        model: to train instead of the one that config describes (a baseline, say).
        on_epoch: called with the history so far after every epoch, by the first process.
        stop: set its `asked` from another thread to interrupt the run; with one process only.

    Raises:
        ValueError, CheckpointError, OSError: before the first step, if data and config disagree, the checkpoint cannot
            be resumed, or a folder cannot be written to or its disk is too full.
        TrainingDiverged: if the loss is not finite; its result has the model at its last good state.
        TrainingInterrupted: a KeyboardInterrupt, with the result so far.
        MemoryError: if a step does not fit in memory, with what to try.
    """
    check_people(config, train_faces, val_faces, model)
    if model is not None and (config.base_model_path or config.use_prior_preservation):
        raise ValueError("a given model is trained as it is: leave out base_model_path and use_prior_preservation")
    with memory_advice(config):
        run = _Run(config, train_faces, val_faces, model, on_epoch, progress, stop or StopRequest())
        try:
            result = run.run()
        finally:
            run.graph = run.state.optimizer.found_inf = None  # type: ignore[attr-defined] # free the GPU's memory
    advise(result, config)
    return result


class _Run:
    """One training run in one process: `run` is the loop, in the order in which things happen."""

    def __init__(
        self,
        config: TrainConfig,
        train_faces: FaceViews,
        val_faces: FaceViews,
        model: nn.Module | None,
        on_epoch: Callable[[pd.DataFrame], None] | None,
        progress: bool,
        stop: StopRequest,
    ) -> None:
        self.config, self.on_epoch, self.stop = config, on_epoch, stop
        self.processes = connect(config)
        self.device, self.is_first = self.processes.device, self.processes.rank == 0
        self.progress = progress and self.is_first
        all_faces = move_if_it_fits(train_faces, self.device)
        self.faces = views_to_train(all_faces, config)
        self.val_faces = move_if_it_fits(val_faces, self.device)
        self.mixup = Mixup(self.faces) if config.mixup else None
        self.batches, self.window = count_batches(self.faces, config), config.gradient_accumulation_steps
        self.windows = math.ceil(self.batches / self.window)  # of an epoch; each ends with a step of the optimiser

        self._build(model, all_faces)
        manual_seed(config.seed)  # dropout
        self._resume()
        self.state.optimizer.zero_grad(set_to_none=True)  # what a model that was given may have of earlier steps
        self.good = [p.detach().clone() for p in self.trainable]  # after the last epoch that ended well
        self.save_at, self.check_at = time.monotonic() + 60 * config.save_minutes, time.monotonic() + CHECK_EVERY

    def _build(self, model: nn.Module | None, all_faces: FaceViews) -> None:
        """What learns: the model, its objective and its optimiser, in their first state."""
        config, base, prior_faces = self.config, None, None
        if model is None:
            model, base = prepare_model(config, self.faces.feature_dim)
        model.to(self.device)
        optimizer = build_optimizer(model, config)
        set_capturable(optimizer, self.device, config.use_cuda_graph)
        self.trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.schedule = warmup_cosine(config.warmup, config.epochs * self.windows)
        self.forward = self.processes.share(model, config.views_together)
        if base is not None:
            base = base.to(self.device)
            prior_faces = all_faces.where(all_faces.abs_yaw < config.prior_max_yaw).in_memory().to(self.device)
        front = self.faces.front.to(self.device)
        self.objective = Objective(config, self.forward, front, self.device, base, prior_faces)
        self.cost = compiled(self.objective) if config.use_compile else self.objective
        self.graph = None
        if config.use_cuda_graph:
            self.graph = GraphedFunction(lambda *t: self._learn(FaceBatch(*t[:5]), *t[5:]), self.device)
        data = {"train": data_fingerprint(self.faces), "val": data_fingerprint(self.val_faces)}
        data["base"] = file_fingerprint(config.base_model_path) if config.base_model_path else ""
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.objective.amp_dtype is torch.float16)
        generator = torch.Generator().manual_seed(config.seed)
        trace = torch.zeros(self.batches, 3, device=self.device)  # loss, gradient norm and prior loss of each batch
        self.state = TrainingState(config, data, model, optimizer, scaler, generator, trace)

    def _resume(self) -> None:
        """Go on from a checkpoint, if there is one; and where the run's own will lie."""
        config, state, same_goal = self.config, self.state, True
        if path := find_checkpoint(config.resume, config.save_dir):
            resumed = state.load_state_dict(load_checkpoint(path, self.device), str(path))
            same_goal = resumed.same_goal
            if state.epoch >= config.epochs:
                raise ValueError(f"{path} has {state.epoch} epochs behind it; ask for more, not for {config.epochs}")
            if self.is_first and str(resumed):
                logger.warning(f"the run goes on from {path} with {resumed}")
        weights = sum(p.nbytes for p in state.model.parameters())
        checkpoint = weights + 2 * sum(p.nbytes for p in self.trainable)  # with AdamW's two moments
        files = 4 + math.ceil((config.epochs - state.epoch) / config.save_every)  # best, last, previous, a part
        save_dir, size = config.save_dir if self.is_first else None, files * checkpoint + weights
        self.folder = RunFolder(save_dir, state, path, same_goal, config.base_model_path, size)

    def run(self) -> TrainResult:
        """Epochs, until they are done or something else ends the run."""
        state, config = self.state, self.config
        log_dir = config.log_dir if self.is_first else None
        done = state.epoch * self.batches + state.batch
        self.log = TrainingLog(log_dir, config.epochs, self.batches, done, self.progress)
        self.processes.wait()  # until all have read the checkpoint: the first may move files now
        with self.log, self.folder, self.stop:
            best = state.best, state.stale  # forgotten if the first process finds no best model in the folder
            state.best, state.stale = self.processes.from_first(best)
            if config.base_model_path and not state.history and config.val_every <= config.epochs:
                state.history.append({"epoch": 0} | self._validate(0))  # where the adaptation starts from
                self._report(state.history[0])
            while not (ended := self._ended()):
                self._train_epoch()
                if state.batch == self.batches:
                    self._finish_epoch()
            if ended == "interrupted":
                self._save_last()
            elif ended == "early":
                self.folder.save(PERIODIC.format(state.epoch))
        result = self._result(ended)
        if self.processes.from_first(self.stop.to_end):
            raise TrainingInterrupted(result)
        return result

    def _ended(self) -> Literal["finished", "early", "interrupted"] | None:
        """Why no further step follows; None if one does. A signal need not reach all processes at the same step."""
        if self.config.patience and self.state.stale >= self.config.patience:
            return "early"
        if self.state.epoch == self.config.epochs:
            return "finished"
        return "interrupted" if self.processes.from_first(self.stop.asked) else None

    def _train_epoch(self) -> None:
        """The windows of an epoch, or what is left of them, unless it is interrupted."""
        state, processes = self.state, self.processes
        self.forward.train()
        if processes.count > 1:  # each process has dropout of its own; set anew, so that no checkpoint need hold it
            torch.manual_seed(self.config.seed + 1_000_003 * (1 + state.epoch * processes.count + processes.rank))
        self._draw()
        batches = feed(self.faces, self.rows[state.batch :], self.device, self.config.num_workers)
        started = time.perf_counter()
        while state.batch < self.batches:
            self._step(batches)
            if processes.count > 1:
                continue  # they check, save and stop together, when the epoch ends
            if time.monotonic() >= self.check_at:
                self._check()
                self.log.show(loss=state.trace[state.batch - 1, 0].item())
            if self.stop.asked:
                break
            if time.monotonic() >= self.save_at and state.batch < self.batches:
                self._check()
                state.seconds, started = state.seconds + time.perf_counter() - started, time.perf_counter()
                self._save_last()
        self._check()  # waits for the device
        state.seconds += time.perf_counter() - started

    def _draw(self) -> None:
        """Indices and mixing weights of all batches of the epoch; the same again if it is resumed."""
        state, now = self.state, self.state.generator.get_state()
        start = now if state.order is None else state.order
        state.generator.set_state(start)
        self.rows, self.weights = draw_epoch(self.faces, self.config, self.mixup, state.generator)
        if state.order is not None:
            state.generator.set_state(now)
        state.order = start

    def _step(self, batches: Iterator[FaceBatch]) -> None:
        """A window of batches, and the update at its end."""
        state, first = self.state, self.state.batch
        count = min(self.window, self.batches - first)  # the last window may be shorter
        factor = self.schedule(state.epoch * self.windows + first // self.window)
        set_rates(state.optimizer, [factor * rate for rate in self.rates])
        for i in range(first, first + count):
            batch = next(batches)
            weight, kept = self._companions(i, batch)
            if self.graph is not None:
                state.trace[i] = self.graph(*batch, weight, kept)
            else:
                state.trace[i] = self._learn(batch, weight, kept, count, is_last=i + 1 == first + count)
        state.steps += 1
        state.batch += count
        self.log.batch(state.epoch + 1, count)

    def _companions(self, i: int, batch: FaceBatch) -> tuple[Tensor | None, Tensor | None]:
        """What batch i is trained with, on the device: weights for mix-up, and rows of prior samples."""
        weight = self.weights[i].to(self.device, non_blocking=True) if self.weights else None
        count = len(batch.person if weight is None else weight)
        return weight, self.objective.draw(count, self.state.generator)

    def _learn(
        self, batch: FaceBatch, weight: Tensor | None, kept: Tensor | None, count: int = 1, is_last: bool = True
    ) -> Tensor:
        """Gradients of a batch, and after the last one of a window of count the update: (3,), its row of the trace."""
        cost = self.cost(batch, weight, kept)
        self.state.scaler.scale(cost.loss / count).backward()
        norm = self._update() if is_last else torch.zeros_like(cost.prior)
        return torch.stack((cost.loss.detach(), norm, cost.prior))

    def _update(self) -> Tensor:
        """Clip the gradient and update; returns its norm before. A gradient that is not finite changes nothing."""
        state = self.state
        self.processes.add_up(self.trainable)
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trainable, self.config.clip_norm)
        if not state.scaler.is_enabled():  # which would do this itself
            state.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined] # fused AdamW reads it
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        return norm

    def _check(self) -> None:
        """Raise TrainingDiverged if a batch of this epoch had no finite loss or gradient."""
        state, self.check_at = self.state, time.monotonic() + CHECK_EVERY
        trace = state.trace[:, :1] if state.scaler.is_enabled() else state.trace[:, :2]  # fp16 overflows now and then
        bad = ~trace.isfinite().all(1)
        if not bad.any():
            return
        i = int(bad.float().argmax())
        [batch] = feed(self.faces, self.rows[i : i + 1], self.device)
        companions = self._companions(i, batch)
        cause = find_cause(self.forward, batch, lambda b: self.objective(b, *companions).loss)
        loss, norm, _ = state.trace[i].tolist()
        raise self._diverged(
            f"batch {i} of epoch {state.epoch + 1} has loss {loss:g} and gradient norm {norm:g}: {cause}"
        )

    @torch.no_grad()
    def _diverged(self, what: str) -> TrainingDiverged:
        """The error, with the model as it was when all was well."""
        torch._foreach_copy_(self.trainable, self.good)
        return diverged(what, self.config, self.state.epoch, self._result("diverged"))

    def _validate(self, epoch: int) -> dict[str, float]:
        """What the model is worth after an epoch; 0: before the first."""
        try:
            return self.processes.from_first(evaluate(self.state.model, self.val_faces, LOSSES[self.config.loss]))
        except TrainingDiverged as error:
            what = f"after epoch {epoch} {error}, though every loss and gradient was" if epoch else str(error)
            raise self._diverged(what) from error

    @torch.no_grad()
    def _finish_epoch(self) -> None:
        """Validate, keep, and report."""
        state, config, epoch = self.state, self.config, self.state.epoch + 1
        loss, norm, prior = state.trace.sum(0).tolist()
        rates = [self.rates[0] * self.schedule(state.epoch * self.windows + i) for i in range(self.windows + 1)]
        row = {
            "epoch": epoch,
            "train_loss": loss / self.batches,
            "lr": rates[-1],
            "grad_norm": norm / self.windows,
            "seconds": state.seconds,
        }
        if self.objective.task is not None:
            row["prior_loss"] = prior / self.batches
        is_best = False
        if epoch % config.val_every == 0 or epoch == config.epochs:
            row |= self._validate(epoch)
            is_best = state.judge(row)
        torch._foreach_copy_(self.good, self.trainable)
        losses, rates = state.trace[:, 0].tolist(), [rates[i // self.window] for i in range(self.batches)]
        self.log.losses(state.epoch * self.batches, losses, rates)
        state.finish_epoch()
        state.history.append(row)
        if is_best:
            self.folder.save_best()
        if epoch % config.save_every == 0 or epoch == config.epochs:
            self.folder.save(PERIODIC.format(epoch))
        if time.monotonic() >= self.save_at:
            self._save_last()
        self._report(row)

    def _report(self, row: dict[str, float]) -> None:
        self.log.epoch(row)
        if self.on_epoch and self.is_first:
            self.on_epoch(pd.DataFrame(self.state.history))

    def _save_last(self) -> None:
        self.folder.save_last()
        self.save_at = time.monotonic() + 60 * self.config.save_minutes

    def _result(self, stopped: Literal["finished", "early", "interrupted", "diverged"]) -> TrainResult:
        state, history = self.state, pd.DataFrame(self.state.history)
        numbers = history, state.seconds, state.steps
        return TrainResult(state.model, *numbers, stopped, self.folder.newest)  # type: ignore[arg-type] # or a baseline
