"""What comes of training: predictions and their worth, the result of a run, how it ended, and what to try then."""

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.metrics import COUNTS, FAR, can_tell, recognition_by_yaw
from viewdiff_nb.modules.lora import evaluation_mode
from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D, fuse_views
from viewdiff_nb.training.batches import FaceBatch, feed, move_if_it_fits, padded_groups, view_groups
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.losses import Loss

SHOWN = 3  # offenders that a message names
MUCH_PRIOR_LOSS = 0.1  # where preserved predictions have moved by about a tenth of their length


@dataclass
class TrainResult:
    """history: one row per epoch. train_seconds: spent in training steps, without validation.

    stopped: why the run ended. checkpoint: the newest one, to resume from; None if there is none.
    advice: what the history suggests to try, in sentences; also given as warnings.
    """

    model: EnhancedTransformerDecoderOnly3D
    history: pd.DataFrame
    train_seconds: float
    steps: int
    stopped: Literal["finished", "early", "interrupted", "diverged"]
    checkpoint: Path | None
    advice: list[str] = field(default_factory=list)


class TrainingInterrupted(KeyboardInterrupt):
    """An interrupt ended a run that a program had started: its next line must not take the model for a trained one.

    result: of the run so far.
    """

    def __init__(self, result: TrainResult) -> None:
        super().__init__(f"training was interrupted; the last checkpoint is {result.checkpoint}")
        self.result = result

    def __reduce__(self) -> tuple:  # pickles between processes
        return TrainingInterrupted, (self.result,)


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number; the message says where, why and what to try.

    result: of the run so far, its model at the last state that was good.
    """

    def __init__(self, message: str, result: TrainResult | None = None) -> None:
        super().__init__(message)
        self.result = result


class TrainingAdvice(UserWarning):
    """A run ended in a way that the guide's questions know, and something else is worth trying."""


class StopRequest:
    """Within this context an interrupt only sets `asked`: Ctrl-C, the kernel's stop button, SIGTERM, and SIGHUP.

    A second one is an interrupt as usual. Outside the main thread, where signals cannot be caught, nothing changes.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.asked = False
        self.to_end = False  # the process, not only the run
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            heeded = [
                number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
            ]  # as by nohup
            self._handlers = {number: signal.signal(number, self._ask) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self.to_end = True, number != signal.SIGINT or not at_prompt()


def at_prompt() -> bool:
    """Whether somebody types the code that runs: in a notebook, or in the interpreter."""
    return hasattr(sys, "ps1")


def find_cause(model: nn.Module, batch: FaceBatch, loss_of: Callable[[FaceBatch], Tensor]) -> str:
    """Why a batch has no finite loss, or gradient: its data, or the first module whose output is not finite.

    Runs the batch forward and backward once more; leaves no gradient behind.
    """
    for name, values in batch._asdict().items():
        if values is None:  # poses are exact
            continue
        bad = ~values.reshape(len(values), -1).isfinite().all(1)
        if bad.any():
            example = int(bad.nonzero()[0])
            return f"its data: {name} is not finite in {int(bad.sum())} of {len(bad)} samples, e.g. sample {example}"
    not_finite: list[str] = []

    def watch(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            not_finite.append(name)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(partial(watch, name)))
        loss = loss_of(batch)
    found = []
    if not_finite:
        found.append(f"the output of {not_finite[0]} is the first that is not finite")
    elif not loss.isfinite():
        found.append("all modules' outputs are finite, the loss of them is not")
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    if lost := [name for name, norm in norms.items() if not norm < float("inf")]:
        named = ", ".join(lost[:SHOWN]) + (" ..." if len(lost) > SHOWN else "")
        found.append(f"no finite gradient in {len(lost)} of {len(norms)} parameters: {named}")
    elif norms:
        norm, name = max((norm, name) for name, norm in norms.items())
        found.append(f"the largest gradient is {norm:.2g} in {name}")
    return "; ".join(found)


def diverged(what: str, config: TrainConfig, epoch: int, result: TrainResult) -> TrainingDiverged:
    """The error that says what is not finite, what to try, and that the model is at the end of an epoch again."""
    tries = {
        f"lower lr ({config.lr:g})": True,
        f"lora_lr ({config.lora_lr:g})": config.use_lora_attention or config.use_projection_layer,
        f"clip_norm ({config.clip_norm:g})": True,
        "switch use_amp off": config.use_amp,
    }
    kept = f"; {result.checkpoint} is the last checkpoint" if result.checkpoint else ""
    good = f"The model is again what it was after epoch {epoch}{kept}"
    return TrainingDiverged(f"{what}. Try: {_join(', or ', tries)}. {good}", result)


@contextmanager
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """Turns running out of memory into a `MemoryError` that says which settings take it."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        coarser, voxels = max(4, config.voxel_resolution // 2), config.voxel_resolution
        windows = 2 * config.gradient_accumulation_steps
        no_graph = " and --no-use_cuda_graph" if config.use_cuda_graph else ""
        tries = {
            f"voxel_resolution {coarser} instead of {voxels}": config.use_projection_layer and voxels > 4,
            f"batch_size {max(1, config.batch_size // 2)} with gradient_accumulation_steps {windows}{no_graph}, "
            "which is the same to the optimiser": True,
            "use_amp": not config.use_amp,
        }
        raise MemoryError(f"a training step does not fit in memory; try {_join(', or ', tries)} ({error})") from error


def advise(result: TrainResult, config: TrainConfig) -> None:
    """Give the advice of a run that ended as it should, as warnings of the line that called `train`, too."""
    if result.stopped in ("finished", "early"):
        result.advice = advice(result.history, config)
    for sentence in result.advice:
        warnings.warn(sentence, TrainingAdvice, stacklevel=3)


def advice(history: pd.DataFrame, config: TrainConfig) -> list[str]:
    """What the history of a finished run suggests, in sentences; nothing if all is well.

    Args:
        history: of the run, with a row for epoch 0, before training, if a base was adapted.
    """
    return [*_lora_advice(history, config), *_prior_advice(history[history["epoch"] > 0], config)]


def _lora_advice(history: pd.DataFrame, config: TrainConfig) -> Iterator[str]:
    start, end = history.iloc[0], history.iloc[-1]
    adapted = config.use_lora_attention and config.base_model_path and start["epoch"] == 0
    if adapted and end.get("val_rank1", 1.0) < start["val_rank1"]:
        tries = {
            f"raise rank from {config.rank} to 8 or 16": config.rank < 8,
            f"raise lora_alpha from {config.lora_alpha:g} to the rank, {config.rank}": config.lora_alpha < config.rank,
            f"raise lora_lr from {config.lora_lr:g} to 1e-3 or more": config.lora_lr < 1e-3,
            f"lower lora_lr from {config.lora_lr:g} to 1e-2 or less": config.lora_lr > 1e-2,
            f"a loss that tells people apart instead of {config.loss}, e.g. two-way": config.loss in ("mse", "cosine"),
            f"train for more than {config.epochs} epochs": True,
        }
        yield (
            f"after LoRA training rank-1 is {end['val_rank1']:.3f} on validation people, below the base model's "
            f"{start['val_rank1']:.3f}; {_join('; ', tries)}"
        )


def _prior_advice(trained: pd.DataFrame, config: TrainConfig) -> Iterator[str]:
    if not config.use_prior_preservation or len(trained) < 2:
        return
    first, last, weight = trained["prior_loss"].iloc[0], trained["prior_loss"].iloc[-1], config.lambda_prior
    task = (trained["train_loss"] - weight * trained["prior_loss"]).tolist()
    if min(task[1:]) >= task[0]:
        tries = {
            f"lambda_prior={weight:g} holds the model at its base, lower it to 0.05-0.1": weight > 0.1,
            f"raise lora_lr ({config.lora_lr:g}) or epochs ({config.epochs})": True,
            "check that base_model_path is the model you mean to keep": True,
        }
        yield (
            f"the task loss did not fall ({task[0]:.3g} to {task[-1]:.3g}) beside a prior loss of {last:.3g}: "
            f"{_join('; ', tries)}"
        )
    elif last > max(first, MUCH_PRIOR_LOSS):
        yield (
            f"the prior loss rose from {first:.3g} to {last:.3g}: it starts near 0, because the model starts as its "
            f"base, and rises while it learns something else; raise lambda_prior ({weight:g}) to keep more"
        )


def _join(separator: str, tries: dict[str, bool]) -> str:
    """What is worth trying."""
    return separator.join(text for text, applies in tries.items() if applies)


def predict(model: nn.Module, faces: FaceViews, batch_size: int = 1024) -> Tensor:
    """Predicted frontal embeddings of all side views, in evaluation mode, on the device of faces.

    They are (M, D), or as wide as the model's own answers (`Summed` gives several embeddings beside each other). With
    cross-view attention, a person's views are seen in random groups of n_views; the last one may be smaller.
    """
    home = faces.device
    device = next(iter((*model.parameters(), *model.buffers())), faces.src).device
    faces = move_if_it_fits(faces, device)
    out = torch.empty(0, faces.feature_dim)
    with evaluation_mode(model):
        if (n_views := views_fused(model)) == 1:
            rows = torch.arange(len(faces), device=faces.device).split(batch_size)
            for index, batch in zip(rows, feed(faces, rows, device), strict=True):
                found = model(batch.src, **batch.conditions(), return_residual=False).float()
                out = out if len(out) else found.new_empty(len(faces), found.shape[1])
                out[index] = found
        else:
            out = torch.empty(faces.src.shape, device=device)
            groups, mask = padded_groups(faces.person, n_views, torch.Generator().manual_seed(0))
            size = max(1, batch_size // n_views) * n_views
            rows, masks = groups.flatten().split(size), mask.flatten().to(device).split(size)
            for index, is_view, batch in zip(rows, masks, feed(faces, rows, device), strict=True):
                predicted = model(batch.src, **batch.conditions(), return_residual=False, view_mask=is_view)
                out[index.to(device)[is_view]] = predicted[is_view].float()
    return out.to(home)


def views_fused(model: nn.Module | TrainConfig) -> int:
    """How many views of a person make one prediction that is scored: several with cross-view attention."""
    if isinstance(model, TrainConfig):
        return model.n_views if model.use_cross_view else 1
    return 1 if getattr(model, "cross_view", None) is None else int(getattr(model, "n_views", 1))


def probes_to_score(model: nn.Module | TrainConfig, faces: FaceViews) -> int:
    """How many predictions `evaluate` scores of a model, or of the one that a config describes."""
    return int((torch.bincount(faces.person) // views_fused(model)).sum())


def check_people(config: TrainConfig, train_faces: FaceViews, val_faces: FaceViews, model: nn.Module | None) -> None:
    """
    Raises:
        ValueError: if people are in both sets, widths differ, too few validate for what is monitored, or a front is
            not finite.
    """
    if overlap := set(train_faces.names) & set(val_faces.names):
        raise ValueError(f"{len(overlap)} people are in both training and validation, e.g. {min(overlap)!r}")
    if (width := val_faces.feature_dim) != train_faces.feature_dim:
        raise ValueError(f"training embeddings are {train_faces.feature_dim} wide, those to validate with {width}")
    people, probes = len(val_faces.names), probes_to_score(config if model is None else model, val_faces)
    found = f"{people} validation people with {probes} predictions"
    if people < 2 or not probes:
        raise ValueError(f"validation needs 2 people or more, with views enough to be scored; got {found}")
    if not (finite := val_faces.front.isfinite().all(1)).all():
        raise ValueError(f"the frontal embedding of {val_faces.names[int(finite.int().argmin())]!r} is not finite")
    impostors = probes * (people - 1)
    if config.monitor == "val_tar" and not can_tell(impostors):
        raise ValueError(
            f"{found} make {impostors} impostor pairs, too few for a false accept rate of {FAR:g}; raise val_people, "
            "or monitor something else"
        )


@torch.no_grad()
def evaluate(model: nn.Module, faces: FaceViews, loss: Loss, batch_size: int = 1024) -> dict[str, float]:
    """val_loss and, each as val_..., all rates of `recognition_by_yaw`, over all side views of faces.

    With cross-view attention over the fused predictions of whole groups, which is what it is trained for.

    Raises:
        TrainingDiverged: if a prediction is not finite.
    """
    predicted, person, yaw = predict(model, faces), faces.person, faces.abs_yaw
    if not predicted.isfinite().all():
        raise TrainingDiverged("the validation people's predictions are not finite")
    if (n_views := views_fused(model)) > 1:
        groups = view_groups(person, n_views, torch.Generator().manual_seed(0))  # the groups of predict
        predicted = fuse_views(predicted[groups.flatten()], n_views)
        person, yaw = person[groups[:, 0]], yaw[groups].mean(1)
    parts = zip(predicted.split(batch_size), person.split(batch_size), strict=True)
    values = torch.cat([loss(part, faces.front, owners) for part, owners in parts])
    rates = recognition_by_yaw(predicted, faces.front, person, yaw)["all"]
    return {"val_loss": values.mean().item()} | {f"val_{n}": rate for n, rate in rates.items() if n not in COUNTS}
