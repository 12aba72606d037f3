"""Stopping between two steps, so that the notebook, or the next run, can go on from there."""

import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.training.batches import FaceBatch
from viewdiff_nb.training.config import TrainConfig


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


if TYPE_CHECKING:
    import pandas as pd

    pass


class TrainingInterrupted(KeyboardInterrupt):
    """An interrupt ended a run that a program had started: its next line must not take the model for a trained one.

    result: of the run so far.
    """

    def __init__(self, result: "TrainResult") -> None:
        super().__init__(f"training was interrupted; the last checkpoint is {result.checkpoint}")
        self.result = result

    def __reduce__(self) -> tuple:  # between processes
        return TrainingInterrupted, (self.result,)


class StopRequest:
    """Within this context an interrupt is a wish, and `asked` becomes true: Ctrl-C, the kernel's stop button, SIGTERM,
    and where there is such a thing the end of the terminal (SIGHUP).

    A second one is an interrupt as usual. Outside the main thread, where signals cannot be caught, nothing changes.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.asked = False
        self.to_end = False  # the process, not only the run
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup
            self._before = {number: signal.signal(number, self._ask) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self.to_end = True, number != signal.SIGINT or not at_prompt()


def at_prompt() -> bool:
    """Whether somebody types the code that runs: in a notebook, or in the interpreter."""
    return hasattr(sys, "ps1")


# ---- What went wrong in a training run, and what to try: the guide's questions, asked by the run itself.


SHOWN = 3  # offenders that a message names
MUCH_PRIOR_LOSS = 0.1  # where preserved predictions have moved by about a tenth of their length


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number; the message says where, why and what to try.

    result: of the run so far, its model at the last state that was good.
    """

    def __init__(self, message: str, result: "TrainResult | None" = None) -> None:
        super().__init__(message)
        self.result = result


class TrainingAdvice(UserWarning):
    """A run ended in a way that the guide's questions know, and something else is worth trying."""


def find_cause(model: nn.Module, batch: FaceBatch, loss_of: Callable[[FaceBatch], Tensor]) -> str:
    """Why a batch has no finite loss, or gradient: its data, or the first module whose output is not finite.

    Runs the batch forward and backward once more; leaves no gradient behind.
    """
    for name, values in zip(FaceBatch._fields, batch, strict=True):
        bad = ~values.flatten(1).isfinite().all(1) if values.is_floating_point() else torch.zeros(1)
        if bad.any():
            return (
                f"its data: {name} is not finite in {int(bad.sum())} of {len(bad)} samples, e.g. sample "
                f"{int(bad.nonzero()[0])}"
            )
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        loss = loss_of(batch)
    finally:
        for handle in handles:
            handle.remove()
    where = [f"the output of {found[0]} is the first that is not finite"] if found else []
    if not where and not loss.isfinite():
        where = ["all modules' outputs are finite, the loss of them is not"]
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    bad = [name for name, norm in norms.items() if not norm < float("inf")]
    if bad:
        named = f"{', '.join(bad[:SHOWN])}{' ...' * (len(bad) > SHOWN)}"
        where.append(f"no finite gradient in {len(bad)} of {len(norms)} parameters: {named}")
    elif norms:
        largest = max(norms, key=norms.get)
        where.append(f"the largest gradient is {norms[largest]:.2g} in {largest}")
    return "; ".join(where)


def divergence_advice(config: TrainConfig) -> str:
    rates = f"lower lr ({config.lr:g})"
    if config.use_lora_attention or config.use_projection_layer:
        rates += f" or lora_lr ({config.lora_lr:g})"
    tries = [rates, f"or clip_norm ({config.clip_norm:g})"]
    if config.use_amp:
        tries.append("switch use_amp off")
    return ", ".join(tries)


@contextmanager
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """Turns running out of memory into a `MemoryError` that says which settings take it."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        tries = []
        if config.use_projection_layer and config.voxel_resolution > 4:
            smaller = max(4, config.voxel_resolution // 2)
            tries.append(f"voxel_resolution {smaller} instead of {config.voxel_resolution}")
        windows = 2 * config.gradient_accumulation_steps
        without = " and --no-use_cuda_graph" if config.use_cuda_graph else ""
        smaller = max(1, config.batch_size // 2)
        tries.append(
            f"batch_size {smaller} with gradient_accumulation_steps {windows}{without}, "
            "which is the same to the optimiser"
        )
        if not config.use_amp:
            tries.append("use_amp")
        raise MemoryError(f"a training step does not fit in memory; try {', or '.join(tries)} ({error})") from error


def advice(history: "pd.DataFrame", config: TrainConfig) -> list[str]:
    """What the history of a finished run suggests, in sentences; nothing if all is well.

    Args:
        history: of the run, with a row for epoch 0, before training, if a base was adapted.
    """
    said = []
    began, ended = history.iloc[0], history.iloc[-1]
    adapted = config.use_lora_attention and config.base_model_path is not None
    if adapted and began["epoch"] == 0 and ended.get("val_rank1", 1.0) < began["val_rank1"]:
        tries = []
        if config.rank < 8:
            tries.append(f"raise rank from {config.rank} to 8 or 16")
        if config.lora_alpha < config.rank:
            tries.append(f"raise lora_alpha from {config.lora_alpha:g} to the rank, {config.rank}")
        if config.lora_lr < 1e-3:
            tries.append(f"raise lora_lr from {config.lora_lr:g} to 1e-3 or more")
        elif config.lora_lr > 1e-2:
            tries.append(f"lower lora_lr from {config.lora_lr:g} to 1e-2 or less")
        if config.loss in ("mse", "cosine"):
            tries.append(f"a loss that tells people apart instead of {config.loss}, e.g. two-way")
        tries.append(f"train for more than {config.epochs} epochs")
        said.append(
            f"after LoRA training rank-1 is {ended['val_rank1']:.3f} on validation people, below the base "
            f"model's {began['val_rank1']:.3f}; {'; '.join(tries)}"
        )
    trained = history[history["epoch"] > 0]
    if config.use_prior_preservation and len(trained) > 1:
        first, last = trained.iloc[0], trained.iloc[-1]
        task = (trained["train_loss"] - config.lambda_prior * trained["prior_loss"]).tolist()
        if min(task[1:]) >= task[0]:
            said.append(
                f"the task loss did not fall ({task[0]:.3g} to {task[-1]:.3g}) beside a prior loss of "
                f"{last['prior_loss']:.3g}: "
                + (
                    f"lambda_prior={config.lambda_prior:g} holds the model at its base, lower it to 0.05-0.1; "
                    * (config.lambda_prior > 0.1)
                )
                + f"raise lora_lr ({config.lora_lr:g}) or epochs ({config.epochs}), and check that "
                "base_model_path is the model you mean to keep"
            )
        elif last["prior_loss"] > max(first["prior_loss"], MUCH_PRIOR_LOSS):
            said.append(
                f"the prior loss rose from {first['prior_loss']:.3g} to {last['prior_loss']:.3g}: it starts "
                "near 0, because the model starts as its base, and rises while the model learns something "
                f"else; raise lambda_prior ({config.lambda_prior:g}) to keep more"
            )
    return said
