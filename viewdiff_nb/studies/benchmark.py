"""Speed and memory of a training step, all configurations side by side in one run."""

import os
import platform
import time
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor, nn

from ..faces.views import FaceViews
from ..training.batches import take
from ..training.config import TrainConfig, choose_device
from ..training.objective import Objective
from ..training.optimiser import build_optimizer
from .adaptation import ADAPTATIONS, COMMON


class TrainingStep:
    """One optimiser step of a configuration on a fixed batch, without data loading."""

    def __init__(self, config: TrainConfig, faces: FaceViews, batch_size: int, amp: bool) -> None:
        torch.manual_seed(config.seed)
        self.device = faces.device
        self.allocated_before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self.model = config.build_model(faces.feature_dim).to(self.device).train()
        if config.use_lora_attention:
            self.model.freeze_base()
        self.optimizer = build_optimizer(self.model, config)
        self.trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        index = torch.arange(batch_size, device=self.device) % len(faces)
        self.batch = take(faces, index)
        base = kept = None
        if config.use_prior_preservation:
            base = config.build_model(faces.feature_dim, base=True).to(self.device)
            kept = faces.where(index)
        config = replace(config, use_amp=amp, batch_size=batch_size)
        self.objective = Objective(config, self.model, faces.front, self.device, base, kept)
        self.generator = torch.Generator().manual_seed(config.seed)

    def forward(self) -> Tensor:
        return self.objective(self.batch, None, self.generator).loss

    def __call__(self) -> None:
        self.forward().backward()
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

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
        parameters = (self.objective.task or self.model).parameters()  # with prior preservation the teacher's, too
        weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.forward()
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        gradients = sum(p.numel() * p.element_size() for p in self.trainable)
        states = [v for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        return (sum(weights.values()) + gradients + sum(v.numel() * v.element_size() for v in states)
                + sum(kept.values()))  # fmt: skip


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
            runs, memory = {}, {}
            for name in names:
                changes = {k: v for k, v in ADAPTATIONS[name].items() if k not in ("freeze_base", "min_yaw")}
                if changes.get("use_prior_preservation"):
                    changes["base_model_path"] = "built here"
                runs[name] = TrainingStep(replace(COMMON, **changes), faces, batch_size, use_amp)
                memory[name] = runs[name].memory()
            times: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(rounds):
                for name, run in runs.items():
                    times[name].append(_seconds(run, steps))
            for name in names:
                ms = 1e3 * torch.tensor(times[name])
                low, median, high = ms.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
                rows.append({"batch_size": batch_size, "amp": use_amp, "name": name, "ms": median, "ms_low": low,
                             "ms_high": high, "memory_mb": memory[name] / 1e6})  # fmt: skip
    table = pd.DataFrame(rows)
    first = table[table["name"] == names[0]].set_index(["batch_size", "amp"])
    same = pd.MultiIndex.from_frame(table[["batch_size", "amp"]])
    table["speed"] = first["ms"].reindex(same).to_numpy() / table["ms"]
    table["memory"] = table["memory_mb"] / first["memory_mb"].reindex(same).to_numpy()
    return table


def _seconds(run: TrainingStep, steps: int) -> float:
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
