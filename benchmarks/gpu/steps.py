"""Training steps as the GPU benchmarks take them: compiled, as one CUDA graph, their operations and bytes counted."""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.studies.benchmark import Timing, TrainingStep, seconds_of, storage_bytes
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import WARMUP, GraphedFunction, set_capturable


class CountedStep(TrainingStep):
    """A step whose precision is chosen and whose work is counted.

    Args:
        amp: the dtype of mixed precision, or None; float16 brings a gradient scaler.
    """

    def __init__(
        self,
        config: TrainConfig,
        faces: FaceViews,
        batch_size: int,
        amp: torch.dtype | None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(config, faces, batch_size, amp is not None, model)
        self.objective.amp_dtype = amp
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp is torch.float16)

    def compile(self, **options) -> None:
        """Let torch.compile make one program of model and loss; it is compiled in the next step."""
        self.loss = torch.compile(self.loss, dynamic=False, **options)

    def traffic(self) -> int:
        """Bytes that a step moves at least, 2 W + 2 A + 5 G + 6 T.

        W: all weights, read by the forward and by the backward pass. A: what the forward pass keeps for the backward
        pass, written once and read once. G: gradients, written, read for their norm, read and written by clipping,
        read by the optimiser. T: trainable weights; AdamW reads and writes them and their two moments. Tensors that
        live within one pass only are left out, and so is what is rendered again in the backward pass.
        """
        trainable = storage_bytes(self.trainable)  # gradients have the weights' dtype
        return 2 * self.weight_bytes() + 2 * self.kept_bytes() + (5 + 6) * trainable

    def operations(self) -> int:
        """Floating-point operations of the matrix products and convolutions of a step."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()


class CapturedStep:
    """A training step as one CUDA graph, as the trainer does it with use_cuda_graph.

    Another batch is trained on by copying it into `step.batch`, another learning rate by writing to the tensors
    group["lr"] of the optimiser. `warmup` steps are done eagerly first, and they are training steps; the recording
    itself computes nothing.

    Args:
        step: to record; it is no longer called by itself.
        warmup: at least one, so that the optimiser's state exists.
    """

    def __init__(self, step: TrainingStep, warmup: int = WARMUP) -> None:
        self.step, self.device = step, step.device
        set_capturable(step.optimizer, self.device, True)
        self.captured = GraphedFunction(step.learn, self.device, warmup)
        for _ in range(warmup):
            rows = step.draw_prior()
            self.captured(rows)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.captured.record(rows)  # no step, so nothing is drawn for it
        self.peak = torch.cuda.max_memory_allocated(self.device) - step.allocated_before

    def __call__(self) -> None:
        self.captured(self.step.draw_prior())

    def memory(self) -> int:
        """Bytes: the peak that was allocated during the recording, beyond what was there before the step was built."""
        return self.peak


class Attempt(Timing):
    """What `attempt_side_by_side` found out about one step. error: why it has no times."""

    error: str = ""

    def row(self) -> dict:
        return {"error": self.error} if self.error else super().row()


def attempt_side_by_side(
    makers: dict[Hashable, Callable[[], TrainingStep | CapturedStep]], rounds: int, seconds: float = float("inf")
) -> dict[Hashable, Attempt]:
    """As `side_by_side`, with as many steps in a round as take a thirtieth of a second.

    A step that cannot be built or run, for want of memory say, has its error as its result; the others go on.

    Args:
        rounds: at most.
        seconds: no further round begins after that, but the third.
    """
    runs: dict[Hashable, TrainingStep | CapturedStep] = {}
    steps: dict[Hashable, int] = {}
    found = {name: Attempt(memory=0) for name in makers}

    @contextmanager
    def errors_noted(name: Hashable) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            runs.pop(name, None)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the failed one held
            found[name].error = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]

    for name, make in makers.items():
        with errors_noted(name):
            runs[name] = make()
            found[name].memory = runs[name].memory()
            steps[name] = max(1, min(30, round(1 / 30 / seconds_of(runs[name], 1))))
    started = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - started > seconds:
            break
        for name in list(runs):
            with errors_noted(name):
                found[name].seconds.append(seconds_of(runs[name], steps[name]))
    return found
