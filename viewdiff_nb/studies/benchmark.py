"""Speed and memory of a training step, all configurations side by side in one run."""

import os
import platform
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.files import GPU_RESULTS
from viewdiff_nb.studies.adaptation import ADAPTATIONS, COMMON
from viewdiff_nb.training.batches import take
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import choose_device
from viewdiff_nb.training.losses import Objective, build_optimizer

Name = TypeVar("Name", bound=Hashable)


class TrainingStep:
    """One optimiser step of a configuration on a fixed batch, without data loading.

    Args:
        config: of the run; what its base model was trained to does not matter here.
        faces: on the device; the batch is its first views, over again if they are too few.
        batch_size: B.
        amp: mixed precision.
        model: to train instead of the one that config describes.
    """

    def __init__(
        self, config: TrainConfig, faces: FaceViews, batch_size: int, amp: bool, model: nn.Module | None = None
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
        base = prior_faces = None
        if config.use_prior_preservation:
            base = build_model(config, faces.feature_dim, base=True).to(self.device)
            prior_faces = faces.where(index)
        config = replace(config, use_amp=amp, batch_size=batch_size)
        self.objective = Objective(config, self.model, faces.front, self.device, base, prior_faces)
        scaled = self.objective.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.generator = torch.Generator().manual_seed(config.seed)

    def __call__(self) -> None:
        self.learn(self.draw_prior())

    def draw_prior(self) -> Tensor | None:
        """The next rows of prior samples; drawn on the CPU, which is no part of the work on the device."""
        return self.objective.draw(len(self.batch.person), self.generator)

    def loss(self, prior_rows: Tensor | None) -> Tensor:
        return self.objective(self.batch, kept=prior_rows).loss

    def learn(self, prior_rows: Tensor | None) -> Tensor:
        """Forward, backward, clipping and the optimiser; returns the loss before."""
        loss = self.loss(prior_rows)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def memory(self) -> int:
        """Bytes. On a GPU the peak that was allocated, beyond what was there before the step was built. On a CPU the
        tensors that must exist at once: weights, gradients, optimiser state, and what the backward pass needs.
        """
        self()  # so that the optimiser has its state
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self()
            return torch.cuda.max_memory_allocated(self.device) - self.allocated_before
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        state_bytes = sum(value.nbytes for value in states if torch.is_tensor(value))
        return self.weight_bytes() + storage_bytes(self.trainable) + state_bytes + self.kept_bytes()

    def weight_bytes(self) -> int:
        """Of all weights, with prior preservation the teacher's, too."""
        return storage_bytes((self.objective.task or self.model).parameters())

    def kept_bytes(self) -> int:
        """What a forward pass keeps for the backward pass, beside the weights."""
        weights = {p.untyped_storage().data_ptr() for p in (self.objective.task or self.model).parameters()}
        kept: list[Tensor] = []  # alive until the end, so that no address is given to two of them

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss(self.draw_prior())
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return storage_bytes(kept)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors lie in, what several share counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass
class Timing:
    """What `side_by_side` found out about one step. seconds: of a step, one mean per round. memory: bytes."""

    memory: int
    seconds: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """ms (median over rounds), ms_low and ms_high (quartiles), memory_mb."""
        low, median, high = (1e3 * torch.tensor(self.seconds)).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        return {"ms": median, "ms_low": low, "ms_high": high, "memory_mb": self.memory / 1e6}


def side_by_side(makers: Mapping[Name, Callable[[], TrainingStep]], rounds: int, steps: int) -> dict[Name, Timing]:
    """Time of steps that take turns, so that a machine that gets slower for a while slows all of them.

    Args:
        makers: each builds a step, on one and the same device.
        steps: of a round.
    """
    runs: dict[Name, TrainingStep] = {}
    found: dict[Name, Timing] = {}
    for name, make in makers.items():
        runs[name] = make()
        found[name] = Timing(runs[name].memory())
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].seconds.append(seconds_of(run, steps))
    return found


def seconds_of(run: TrainingStep, steps: int) -> float:
    """Mean time of a step."""
    wait = torch.cuda.synchronize if run.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        run()
    wait()
    return (time.perf_counter() - started) / steps


def speed_and_memory(
    faces: FaceViews, batch_sizes: Sequence[int] = (32, 128), rounds: int = 7, steps: int = 3
) -> pd.DataFrame:
    """Time and memory of `ADAPTATIONS` at every batch size and precision, measured by `side_by_side` on this machine.

    Returns:
        one row per (batch_size, amp, name): ms (median over rounds of the mean of steps), ms_low and
        ms_high (quartiles), memory_mb, and speed and memory relative to the first name.
    """
    faces = faces.to(choose_device())
    rows = []
    for batch_size, amp in product(batch_sizes, (False, True)):
        makers = {name: partial(TrainingStep, step_config(name), faces, batch_size, amp) for name in ADAPTATIONS}
        for name, timing in side_by_side(makers, rounds, steps).items():
            rows.append({"batch_size": batch_size, "amp": amp, "name": name, **timing.row()})
    table = pd.DataFrame(rows)
    first = table.groupby(["batch_size", "amp"])[["ms", "memory_mb"]].transform("first")
    return table.assign(speed=first["ms"] / table["ms"], memory=table["memory_mb"] / first["memory_mb"])


def step_config(name: str) -> TrainConfig:
    """The configuration of one of `ADAPTATIONS`, as `TrainingStep` takes it: with a base that is built, not loaded."""
    changes = {k: v for k, v in ADAPTATIONS[name].items() if k not in ("freeze_base", "min_yaw")}
    if changes.get("use_prior_preservation"):
        changes["base_model_path"] = "built here"
    return replace(COMMON, **changes)


def machine(device: str = "auto") -> str:
    """The machine in words, to stand beside what was measured on it."""
    chosen = choose_device(device)
    where = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{_cpu()}, {os.cpu_count()} cores"
    return f"{where}; torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


MODES = ("eager", "graph")  # of the steps measured on a GPU; a CUDA graph replays a whole step


def speed_on_both(measured: pd.DataFrame, batch_size: int, folder: Path = GPU_RESULTS) -> pd.DataFrame:
    """Milliseconds of a mixed-precision step on both machines, and the speed against the first configuration.

    One row per configuration of measured (by `speed_and_memory`) that was measured on the GPU, too.
    """
    here = measured[(measured["batch_size"] == batch_size) & measured["amp"]].set_index("name")["ms"]
    stored = pd.read_csv(folder / "speed.csv")
    stored = stored[(stored["batch_size"] == batch_size) & (stored["precision"] == "bf16") & stored["mode"].isin(MODES)]
    there = stored.pivot(index="name", columns="mode", values="ms").reindex(here.index).dropna(how="all")
    table = {}
    for name, ms in {"here": here[there.index], **{f"GPU, {mode}": there[mode] for mode in MODES}}.items():
        table[f"{name}, ms"] = [f"{value:.3g}" for value in ms]
        table[f"{name}, speed"] = [f"{ms.iloc[0] / value:.2f}x" for value in ms]
    return pd.DataFrame(table, index=there.index.rename("configuration"))
