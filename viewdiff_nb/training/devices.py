"""One process or several: what the training loop asks of the machines it runs on.

Several processes hold a copy of the model each. All of them draw the same batches; each predicts its share, and the
predictions are gathered before the loss is taken. So a batch means the same, in every loss, on any number of
processes: `batch_size` counts the samples of all of them together.
"""

import multiprocessing.connection
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException
from torch.nn import init
from torch.overrides import TorchFunctionMode

from viewdiff_nb.files import install_hint
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.result import StopRequest, TrainingInterrupted, at_prompt


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
        predicted = self.replica(
            src[mine], return_residual=return_residual, **{name: value[mine] for name, value in conditions.items()}
        )
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
    return OneProcess(one_device(config))


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


# ---- A training step as one CUDA graph: one launch instead of several hundred.
# Steps of small models on small batches wait for the processor, which launches their kernels one by one (docs/gpu.md). A
# graph is recorded once and replayed: the same kernels in the same order, dropout drawn from the same generator.
# https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

WARMUP = 3  # calls in which lazily made things come to be: the optimiser's state, the libraries' workspaces


class GraphedFunction:
    """A function of tensors that is replayed as a CUDA graph, one for each set of shapes it is called with.

    The first calls with new shapes run the function as it is; then it is recorded, which computes nothing. Arguments
    are copied to where the recording reads them. A result is to be read before the next call, which may write over it.

    The function must not wait for the device, and whatever changes from call to call must be among its arguments or
    in tensors that are changed in place.

    Args:
        function: of tensors, or None in their place, to a tensor or None.
        device: a GPU.
        warmup: calls before the recording.

    Raises:
        RuntimeError: from a call, if the function cannot be recorded.
    """

    def __init__(self, function: Callable[..., Tensor | None], device: torch.device, warmup: int = WARMUP) -> None:
        self.function, self.warmup = function, warmup
        self.device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
        self.pool = torch.cuda.graph_pool_handle()  # of all graphs: only one runs at a time
        self.calls: dict[Hashable, int] = {}
        self.recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Sequence[Tensor], Tensor | None]] = {}

    def __call__(self, *arguments: Tensor | None) -> Tensor | None:
        shapes = _shapes(arguments)
        if shapes not in self.recorded:
            done = self.calls[shapes] = self.calls.get(shapes, 0) + 1
            if done <= self.warmup:
                return self._aside(arguments)
            self.record(*arguments)
        graph, buffers, result = self.recorded[shapes]
        for buffer, argument in zip(buffers, arguments, strict=True):
            if buffer is not None:
                buffer.copy_(argument)
        graph.replay()
        return result

    def record(self, *arguments: Tensor | None) -> None:
        """Record the function for arguments of these shapes. Computes nothing."""
        buffers = [None if a is None else a.clone() for a in arguments]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[self.device.index]
        drawn = generator.clone_state()
        try:
            with torch.cuda.graph(graph, self.pool, _side_stream(self.device), capture_error_mode="thread_local"):
                result = self.function(*buffers)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a recording that fails does not end, and leaves its stream and the
            generator.graphsafe_set_state(drawn)  # generator's own state behind
            if isinstance(error, torch.OutOfMemoryError):
                raise
            cause = str(error).partition("\n")[0]
            raise RuntimeError(
                "this step cannot be recorded as a CUDA graph: something in it waits for the device, or "
                "is done on the CPU, or another thread uses the device; give --no-use_cuda_graph "
                f"({cause})"
            ) from error
        self.recorded[_shapes(arguments)] = graph, buffers, result

    def _aside(self, arguments: Sequence[Tensor | None]) -> Tensor | None:
        """The function itself, on the stream that records: what it leaves behind must belong to that one."""
        current, aside = torch.cuda.current_stream(self.device), _side_stream(self.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True", UserWarning)  # it is not recorded yet
            result = self.function(*arguments)
        current.wait_stream(aside)
        return result


def _shapes(arguments: Sequence[Tensor | None]) -> Hashable:
    return tuple(None if argument is None else argument.shape for argument in arguments)


def set_capturable(optimizer: torch.optim.Optimizer, device: torch.device, capturable: bool) -> None:
    """Let an optimiser's step be recorded, its learning rates as tensors on the device; or undo that."""
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if capturable else rate
        group["capturable"] = capturable


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: the matrix library keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


# ---- Random numbers of a run's own, where a process does several things at once.
# Torch's dropout and initialisations draw from one generator of the whole process. What trains in one thread while
# cells of a notebook run in another would change their numbers, and they would change what is trained.

INITIALISATIONS = (init.kaiming_uniform_, init.uniform_, init.normal_, torch.randn)  # that the kit's modules use
CPU = torch.device("cpu")

_own: ContextVar["OwnRandomness | None"] = ContextVar("own randomness", default=None)  # of a thread


class OwnRandomness(TorchFunctionMode):
    """Within this context, in this thread, dropout and `INITIALISATIONS` draw from generators that nobody else uses.

    On a CPU the numbers are those of a process whose generator has the same seed. On a GPU dropout's are others: the
    fused one takes no generator.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.number, self.generators = seed, {}

    def __enter__(self) -> "OwnRandomness":
        self._outer = _own.get()
        _own.set(self)
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        _own.set(self._outer)

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a kind of device; a run uses one device of a kind."""
        if device.type not in self.generators:
            self.generators[device.type] = torch.Generator(device).manual_seed(self.number)
        return self.generators[device.type]

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if function is F.dropout:
            return self._dropout(*args, **kwargs)
        if function in INITIALISATIONS:  # while models are built on the CPU
            kwargs = {**kwargs, "generator": kwargs.get("generator") or self.on(CPU)}
        return function(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - p, generator=self.on(x.device))
        return x * kept.div_(1 - p)


def manual_seed(seed: int) -> None:
    """Seed what this thread draws from: its `OwnRandomness`, or the process's generators."""
    own = _own.get()
    if own is None:
        torch.manual_seed(seed)
    else:
        own.number, own.generators = seed, {}


def generator(device: torch.device) -> torch.Generator:
    """What this thread draws from on a device."""
    own = _own.get()
    if own is not None:
        return own.on(device)
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is the GPU if there is one.

    Raises:
        ValueError: if the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:NUMBER, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but this torch sees no GPU; use --device cpu or auto")
    return device


def one_device(config: TrainConfig) -> torch.device:
    """Where a run in one process trains.

    Raises:
        ValueError: if the device is not there, or a CUDA graph is wanted without a GPU.
    """
    device = choose_device(config.device)
    if config.use_cuda_graph and device.type != "cuda":
        raise ValueError(f"use_cuda_graph needs a GPU, and this run is on device {device}; give --no-use_cuda_graph")
    return device
