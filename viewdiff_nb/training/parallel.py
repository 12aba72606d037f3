"""One process or several: what the training loop asks of the machines it runs on.

Several processes hold a copy of the model each. All of them draw the same batches; each predicts its share, and the
predictions are gathered before the loss is taken. So a batch means the same, in every loss, on any number of
processes: `batch_size` counts the samples of all of them together.
"""

import multiprocessing.connection
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException

from ..paths import install_hint
from .config import TrainConfig, choose_device
from .interrupt import StopRequest, TrainingInterrupted, at_prompt


class OneProcess:
    """The usual case: nothing to share."""

    count, rank = 1, 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def launch(self, function: Callable, *arguments: Any) -> Any:
        """function(self, *arguments)."""
        return function(self, *arguments)

    def share(self, model: nn.Module, group: int) -> nn.Module:
        """The model to call in training."""
        return model

    def accumulating(self, model: nn.Module, more: bool) -> AbstractContextManager:
        """Around the backward pass of a batch; more: whether others follow before the optimiser steps."""
        return nullcontext()

    def from_first(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        return value

    def wait(self) -> None:
        """Until all processes are here."""


class SeveralProcesses:
    """The same through Lightning Fabric: started by torchrun, or here, in a notebook too."""

    def __init__(self, config: TrainConfig) -> None:
        try:
            from lightning_fabric import Fabric
        except ImportError as error:
            hint = install_hint("multi-gpu")
            raise ImportError(f"training on several devices needs Lightning Fabric: {hint}") from error
        kind = choose_device(config.device).type
        if started_by_torchrun():
            strategy, devices = "ddp", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            nodes = int(os.environ["WORLD_SIZE"]) // devices
        else:
            strategy, devices, nodes = "ddp_notebook" if at_prompt() else "ddp_spawn", config.devices, 1
        if kind == "cuda" and devices > torch.cuda.device_count():
            raise ValueError(f"{devices} devices were asked for, and this machine has {torch.cuda.device_count()} GPUs")
        self.fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy=strategy)
        self.started_here = strategy != "ddp"

    @property
    def count(self) -> int:
        return self.fabric.world_size

    @property
    def rank(self) -> int:
        return self.fabric.global_rank

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    def launch(self, function: Callable, *arguments: Any) -> Any:
        """function(self, *arguments) in every process; returns the first one's result, its tensors on the CPU.

        What a process raises is raised here.
        """
        if not self.started_here:
            self.fabric.launch()
            return function(self, *arguments)
        with tempfile.TemporaryDirectory() as folder, _ForwardedSignals() as stop:
            path = Path(folder) / "result"  # a model is too much for the pipe between processes
            try:
                self.fabric.launch(_work, partial(function, self, *arguments), path)
            except ProcessException:
                if stop.asked and not path.exists():
                    raise KeyboardInterrupt from None  # it came before the training began
                if not path.exists():  # a process was killed
                    raise
            result = torch.load(path, map_location="cpu", weights_only=False)  # on the CPU: free to fork
        if isinstance(result, BaseException):
            raise result
        return result

    def share(self, model: nn.Module, group: int) -> nn.Module:
        return Shared(self.fabric, model, group)

    def accumulating(self, model: "Shared", more: bool) -> AbstractContextManager:
        return self.fabric.no_backward_sync(model.replica, enabled=more)

    def from_first(self, value: Any) -> Any:
        return self.fabric.broadcast(value)

    def wait(self) -> None:
        self.fabric.barrier()


class Shared(nn.Module):
    """A model that predicts this process's share of a batch and returns the predictions of all.

    Each process takes the loss of the whole batch, so each has the whole gradient of the predictions; gathering sums
    it over processes, and averaging the parameters' gradients divides by their number again.

    Args:
        fabric: of the process.
        model: the same in every process.
        group: samples that must stay together, the n_views of a person.
    """

    def __init__(self, fabric: Any, model: nn.Module, group: int = 1) -> None:
        super().__init__()
        self.fabric, self.group = fabric, group
        self.replica = fabric.setup_module(model)

    def forward(self, src: Tensor, return_residual: bool = True, **conditions: Tensor) -> Tensor:
        size = -(-len(src) // (self.group * self.fabric.world_size)) * self.group
        rows = torch.arange(size * self.fabric.world_size, device=src.device) % len(src)  # the end is filled up
        mine = rows.view(-1, size)[self.fabric.global_rank]
        predicted = self.replica(src[mine], return_residual=return_residual,
                                 **{name: value[mine] for name, value in conditions.items()})  # fmt: skip
        gathered = self.fabric.all_gather(predicted, sync_grads=torch.is_grad_enabled())
        return gathered.flatten(0, 1)[: len(src)]


def connect(config: TrainConfig) -> OneProcess | SeveralProcesses:
    """The processes that a run trains in.

    Raises:
        ImportError: if several are wanted and Lightning Fabric is not installed.
        ValueError: if the devices are not there, or a CUDA graph is wanted where there is none.
    """
    if config.devices > 1 or started_by_torchrun():
        if config.use_cuda_graph:
            raise ValueError("use_cuda_graph is for one process, and this run has several; give --no-use_cuda_graph")
        return SeveralProcesses(config)
    return OneProcess(config.one_device())


def with_cuda_graph(config: TrainConfig) -> TrainConfig:
    """The config with use_cuda_graph where this process can record: on one GPU, in the main thread.

    To be asked where a run is trained, which may be on another machine than the one that describes it.
    """
    alone = config.devices == config.gradient_accumulation_steps == 1 and not started_by_torchrun()
    if not alone or threading.current_thread() is not threading.main_thread():
        return config
    return replace(config, use_cuda_graph=choose_device(config.device).type == "cuda")


def started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is the one that tells the user, in a run that torchrun started or in any other."""
    return int(os.environ.get("RANK", "0")) == 0


class _ForwardedSignals(StopRequest):
    """Within this context an interrupt of this process, which only waits, is one of the processes that it started."""

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)


def _end_with_parent() -> None:
    """End this process when the one that started it ends, even if that was killed."""

    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _work(fabric: Any, call: Callable[[], Any], path: Path) -> None:
    """In a process that was started here: leave the call's result, or what it raised, in a file."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a terminal's Ctrl-C reaches the first process alone, which forwards it
    _end_with_parent()
    try:
        result = call()
    except TrainingInterrupted as error:  # in all processes at the same step
        result = error
    except Exception as error:
        if not path.exists():  # else another process failed first, and this one misses it
            torch.save(error, path)
        raise
    if fabric.global_rank == 0:
        torch.save(result, path)
    fabric.barrier()  # a process that ends while another still listens to it aborts
    torch.distributed.destroy_process_group()
