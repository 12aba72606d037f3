"""Speed and memory of a training step, all configurations side by side in one run."""

import os
import platform
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.files import GPU_RESULTS
from viewdiff_nb.studies.adaptation import ADAPTATIONS, COMMON
from viewdiff_nb.training.batches import take
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import WARMUP, GraphedFunction, choose_device, set_capturable
from viewdiff_nb.training.losses import Objective, build_optimizer


class TrainingStep:
    """One optimiser step of a configuration on a fixed batch, without data loading.

    Args:
        config: of the run; what its base model was trained to does not matter here.
        faces: on the device; the batch is its first views, over again if they are too few.
        batch_size: B.
        amp: mixed precision: False; True, with the dtype that training would take; or a dtype. float16 brings a
            gradient scaler.
        model: to train instead of the one that config describes.
    """

    def __init__(
        self,
        config: TrainConfig,
        faces: FaceViews,
        batch_size: int,
        amp: bool | torch.dtype,
        model: nn.Module | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.device = faces.device
        self.allocated_before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        if model is None:
            model = build_model(config, faces.feature_dim)
            nn.init.normal_(model.output.weight, std=0.02)  # zero in a new model: no gradient would pass it
            if config.use_lora_attention:
                model.freeze_base()
        self.model = model.to(self.device).train()
        self.optimizer = build_optimizer(self.model, config)
        self.trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        index = torch.arange(batch_size, device=self.device) % len(faces)
        self.batch = take(faces, index)
        base = kept = None
        if config.use_prior_preservation:
            base = build_model(config, faces.feature_dim, base=True).to(self.device)
            kept = faces.where(index)
        config = replace(config, use_amp=bool(amp), batch_size=batch_size)
        self.objective = Objective(config, self.model, faces.front, self.device, base, kept)
        if isinstance(amp, torch.dtype):
            self.objective.amp_dtype = amp
        scaled = self.objective.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.prior_rows = self.objective.draw(batch_size, self.generator)  # written over by every draw

    def forward(self) -> Tensor:
        return self.objective(self.batch, kept=self.prior_rows).loss

    def draw(self) -> None:
        """Draw the next prior samples, which is no part of the work on the device."""
        if self.prior_rows is not None:
            self.prior_rows.copy_(self.objective.draw(len(self.batch.person), self.generator))

    def __call__(self) -> None:
        self.draw()
        self.work()

    def work(self) -> None:
        """Forward, backward, clipping and the optimiser."""
        self.scaler.scale(self.forward()).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def compile(self, **options) -> None:
        """Let torch.compile make one program of model and loss; it is compiled in the next step."""
        self.forward = torch.compile(self.forward, dynamic=False, **options)

    def memory(self) -> int:
        """Bytes of a training step.

        On a GPU the peak that was allocated while it ran, beyond what was there before it was built. On a
        CPU the tensors that must exist at once: weights, gradients, optimiser state, and activations kept
        for the backward pass.
        """
        if self.device.type == "cuda":
            self()
            torch.cuda.reset_peak_memory_stats(self.device)
            self()
            return torch.cuda.max_memory_allocated(self.device) - self.allocated_before
        self()  # so that the optimiser has its state
        states = [v for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        return (
            self._weights() + _nbytes(self.trainable) + sum(v.numel() * v.element_size() for v in states) + self._kept()
        )

    def traffic(self) -> int:
        """Bytes that a step moves at least, 2 W + 2 A + 5 G + 6 T.

        W: all weights, read by the forward and by the backward pass. A: what the forward pass keeps for the backward
        pass, written once and read once. G: gradients, written, read for their norm, read and written by clipping,
        read by the optimiser. T: trainable weights; AdamW reads and writes them and their two moments. Tensors that
        live within one pass only are left out, and so is what is rendered again in the backward pass.
        """
        trainable = _nbytes(self.trainable)  # gradients have the weights' dtype
        return 2 * self._weights() + 2 * self._kept() + (5 + 6) * trainable

    def operations(self) -> int:
        """Floating-point operations of the matrix products and convolutions of a step."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()

    def _weights(self) -> int:
        """Bytes of all weights, with prior preservation the teacher's, too."""
        return _nbytes((self.objective.task or self.model).parameters())

    def _kept(self) -> int:
        """Bytes that a forward pass keeps for the backward pass, beside the weights."""
        own = {p.untyped_storage().data_ptr() for p in (self.objective.task or self.model).parameters()}
        kept: dict[int, int] = {}
        alive = []  # or a storage that is freed within the forward pass would give its address to another

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.forward()
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(kept.values())


def _nbytes(parameters) -> int:
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}.values())


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
        self.captured = GraphedFunction(step.work, self.device, warmup)
        for _ in range(warmup):
            self()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.captured.record()
        self.peak = torch.cuda.max_memory_allocated(self.device) - step.allocated_before

    def __call__(self) -> None:
        self.step.draw()
        self.captured()

    def memory(self) -> int:
        """Bytes: the peak that was allocated during the recording, beyond what was there before the step was built."""
        return self.peak


@dataclass
class Timing:
    """What `side_by_side` found out about one step.

    seconds: of a step, one mean per round. memory: bytes. error: why there are none.
    """

    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    error: str = ""

    def row(self) -> dict:
        """ms (median over rounds), ms_low and ms_high (quartiles), memory_mb; without times if there is an error."""
        if self.error:
            return {"error": self.error}
        ms = 1e3 * torch.tensor(self.seconds)
        low, median, high = ms.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        return {"ms": median, "ms_low": low, "ms_high": high, "memory_mb": self.memory / 1e6}


def side_by_side(
    makers: dict[Hashable, Callable[[], TrainingStep | CapturedStep]],
    rounds: int,
    steps: int | None = None,
    seconds: float = float("inf"),
) -> dict[Hashable, Timing]:
    """Time of steps that take turns, so that a machine that gets slower for a while slows all of them.

    A step that cannot be built or run, for want of memory say, has its error as its result; the others go on.

    Args:
        makers: each builds a step, on one and the same device.
        rounds: at most.
        steps: of a round; None for as many as take a thirtieth of a second.
        seconds: no further round begins after that, but the third.
    """
    runs, found = {}, {name: Timing() for name in makers}

    def attempt(name: Hashable, action: Callable) -> None:
        try:
            action()
        except Exception as error:
            runs.pop(name, None)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the failed one held
            found[name].error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]

    def build(name: Hashable) -> None:
        run = makers[name]()
        found[name].memory = run.memory()
        counts[name] = steps or max(1, min(30, round(1 / 30 / _seconds(run, 1))))
        runs[name] = run

    counts: dict[Hashable, int] = {}
    for name in makers:
        attempt(name, lambda name=name: build(name))
    started = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - started > seconds:
            break
        for name in list(runs):
            attempt(name, lambda name=name: found[name].seconds.append(_seconds(runs[name], counts[name])))
    return found


def speed_and_memory(
    faces: FaceViews,
    names: tuple[str, ...] = tuple(ADAPTATIONS),
    batch_sizes: tuple[int, ...] = (32, 128),
    amp: tuple[bool, ...] = (False, True),
    rounds: int = 7,
    steps: int = 3,
    device: str = "auto",
) -> pd.DataFrame:
    """Time and memory of every configuration, batch size and precision.

    The configurations take turns, so that a machine that gets slower for a while slows all of them.

    Returns:
        one row per (batch_size, amp, name): ms (median over rounds of the mean of steps), ms_low and
        ms_high (quartiles), memory_mb, and speed and memory relative to the first name.
    """
    faces = faces.to(choose_device(device))
    rows = []
    for batch_size in batch_sizes:
        for use_amp in amp:
            makers = {name: partial(TrainingStep, step_config(name), faces, batch_size, use_amp) for name in names}
            for name, timing in side_by_side(makers, rounds, steps).items():
                if timing.error:
                    raise RuntimeError(f"{name}, batch {batch_size}: {timing.error}")
                rows.append({"batch_size": batch_size, "amp": use_amp, "name": name} | timing.row())
    table = pd.DataFrame(rows)
    first = table[table["name"] == names[0]].set_index(["batch_size", "amp"])
    same = pd.MultiIndex.from_frame(table[["batch_size", "amp"]])
    table["speed"] = first["ms"].reindex(same).to_numpy() / table["ms"]
    table["memory"] = table["memory_mb"] / first["memory_mb"].reindex(same).to_numpy()
    return table


def step_config(name: str) -> TrainConfig:
    """The configuration of one of `ADAPTATIONS`, as `TrainingStep` takes it: with a base that is built, not loaded."""
    changes = {k: v for k, v in ADAPTATIONS[name].items() if k not in ("freeze_base", "min_yaw")}
    if changes.get("use_prior_preservation"):
        changes["base_model_path"] = "built here"
    return replace(COMMON, **changes)


def _seconds(run: TrainingStep | CapturedStep, steps: int) -> float:
    wait = torch.cuda.synchronize if run.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        run()
    wait()
    return (time.perf_counter() - started) / steps


def machine(device: str = "auto") -> str:
    """The machine in words, to stand beside what was measured on it."""
    chosen = choose_device(device)
    where = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{_cpu()}, {os.cpu_count()} cores"
    return f"{where}; torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---- What was measured here, beside what was measured on a GPU (data/results/gpu).


MODES = ("eager", "graph")  # a CUDA graph replays a whole step


def recognition_on_both(
    here: Path, rate: str, where: tuple[str, ...] = ("all", "75-90"), folder: Path = GPU_RESULTS
) -> pd.DataFrame:
    """A rate of every model on both machines: "mean ± interval" here, and on the GPU with its own seeds.

    Args:
        here: folder with the table4_RATE.csv that notebook 04 wrote.
        where: yaw bins.
    """
    ours, theirs = (pd.read_csv(path / f"table4_{rate}.csv", index_col="model", dtype=str) for path in (here, folder))
    both = {}
    for name in where:
        both[f"{name}, here"], both[f"{name}, GPU"] = ours[name], theirs[name]
    return pd.DataFrame(both).reindex(ours.index).fillna("–")


def speed_on_both(measured: pd.DataFrame, batch_size: int, folder: Path = GPU_RESULTS) -> pd.DataFrame:
    """Milliseconds of a mixed-precision step on both machines, and the speed against the first configuration.

    Args:
        measured: of `benchmark.speed_and_memory`.

    Returns:
        one row per configuration of measured that was measured on the GPU, too.
    """
    here = measured[(measured["batch_size"] == batch_size) & measured["amp"]].set_index("name")["ms"]
    stored = pd.read_csv(folder / "speed.csv")
    stored = stored[(stored["batch_size"] == batch_size) & (stored["precision"] == "bf16") & stored["mode"].isin(MODES)]
    there = stored.pivot(index="name", columns="mode", values="ms").reindex(here.index).dropna(how="all")
    columns = {"here": here[there.index]} | {f"GPU, {mode}": there[mode] for mode in MODES}
    table = {}
    for name, ms in columns.items():
        table[f"{name}, ms"] = [f"{value:.3g}" for value in ms]
        table[f"{name}, speed"] = [f"{ms.iloc[0] / value:.2f}x" for value in ms]
    return pd.DataFrame(table, index=there.index.rename("configuration"))


def gpu_note(folder: Path = GPU_RESULTS) -> str:
    """Seeds, interval and machine of the rates that a GPU gave, and the machine of the steps, in words."""
    steps = pd.read_csv(folder / "speed.csv", usecols=["machine"])["machine"].iloc[0]
    return f"{(folder / 'claims.md').read_text().strip().splitlines()[-1]}; training steps: {steps}"
