"""Where a run computes: on one device or in several processes, as a CUDA graph or not, with whose random numbers.

torchrun starts several processes. Each holds a copy of the model, and all draw the same batches; each predicts its
share, and the predictions are gathered before the loss is taken. So a batch means the same, in every loss, on any
number of processes: `batch_size` counts the samples of all of them together.
"""

import atexit
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from viewdiff_nb.training.config import TrainConfig

Value = TypeVar("Value")
COMMAND = "viewdiff_nb.train_enhanced"
ENOUGH = 1024  # samples of a batch for each GPU: with fewer, two took longer than one, or hardly less (docs/gpu.md)


@dataclass(frozen=True)
class Processes:
    """The processes that train a run together, as one of them sees it.

    device: of this process. count: how many there are. rank: this one's number.
    """

    device: torch.device
    count: int = 1
    rank: int = 0

    def share(self, model: nn.Module, group: int) -> nn.Module:
        """The model to call in training; group samples stay together in a process, the n_views of a person."""
        return SharedModel(self, model, group) if self.count > 1 else model

    def add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make every gradient the sum of those of all processes, in one message."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        message = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(message)
        for gradient, part in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def from_first(self, value: Value) -> Value:
        """The first process's value, in all of them."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


class SharedModel(nn.Module):
    """A model that predicts this process's share of a batch and returns the predictions of all.

    Every process takes the loss of the whole batch, but has the gradient of its own share alone: the batch's is their
    sum, `Processes.add_up`. Unlike DistributedDataParallel's it is taken after the backward pass, and in a CUDA graph.
    """

    def __init__(self, processes: Processes, model: nn.Module, group: int) -> None:
        super().__init__()
        self.processes, self.group, self.model = processes, group, model
        for values in (*model.parameters(), *model.buffers()):
            dist.broadcast(values.detach(), src=0)

    def forward(self, src: Tensor, return_residual: bool = True, **conditions: Tensor) -> Tensor:
        count, rank = self.processes.count, self.processes.rank
        size = -(-len(src) // (self.group * count)) * self.group
        rows = torch.arange(size * count, device=src.device) % len(src)  # the last share is filled up from the start
        mine = rows.view(count, size)[rank]
        conditions = {name: value[mine] for name, value in conditions.items()}
        predicted = self.model(src[mine], return_residual=return_residual, **conditions).contiguous()
        shares = [torch.empty_like(predicted) for _ in range(count)]
        dist.all_gather(shares, predicted.detach())
        shares[rank] = predicted
        return torch.cat(shares)[: len(src)]


def connect(config: TrainConfig) -> Processes:
    """The processes that a run trains in.

    Raises:
        ValueError: if torchrun did not start the processes, if a device is not there, or if a CUDA graph or a
            compiled step is wanted where there is none.
    """
    several = started_by_torchrun()
    if several and config.use_compile:  # of devices the config itself says so
        raise ValueError("use_compile is for one process, and this run has several; give --no-use_compile")
    if config.devices > 1 and not several:
        raise ValueError(
            f"devices={config.devices} needs {config.devices} processes, which torchrun starts: torchrun "
            f"--nproc_per_node {config.devices} -m {COMMAND} ... (or your own program instead of it); "
            f"python -m {COMMAND} --devices {config.devices} does so by itself"
        )
    device = choose_device(config.device)
    for name in ("use_cuda_graph", "use_compile"):  # on a CPU torch 2.13 compiles steps that corrupt the heap
        if device.type != "cuda" and getattr(config, name):
            raise ValueError(f"{name} needs a GPU, and this run is on device {device}; give --no-{name}")
    if not several:
        return Processes(device)
    if device.type == "cuda":
        wanted, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if wanted > there:
            raise ValueError(f"{wanted} devices were asked for, and this machine has {there} GPUs")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
        atexit.register(dist.destroy_process_group)
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    count, rank = dist.get_world_size(), dist.get_rank()
    if rank == 0 and device.type == "cuda" and config.batch_size < count * ENOUGH:
        warnings.warn(
            f"{count} GPUs share batches of {config.batch_size}, which one trains about as fast; use one, with "
            f"--use_cuda_graph, or a batch_size of {count * ENOUGH} or more",
            stacklevel=2,
        )
    return Processes(device, count, rank)


def _end_with_parent(parent: int) -> None:
    """torchrun ends its processes, but not when it is killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def relaunch(arguments: Sequence[str], count: int) -> NoReturn:
    """Run the command line with these arguments in count processes, by torchrun; ends this process when they end."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "86400")  # after a signal they end their epoch, and save
    try:
        run.main(["--standalone", "--nproc_per_node", str(count), "-m", COMMAND, *arguments])
    except SignalException:  # passed on to the processes, which have ended
        sys.exit(130)
    except ChildFailedError:  # the one that failed has said why
        sys.exit(1)
    sys.exit()


def started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is the one that talks to the user."""
    return int(os.environ.get("RANK", "0")) == 0


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


def with_cuda_graph(config: TrainConfig) -> TrainConfig:
    """The config with use_cuda_graph where the process that trains can record: on one GPU, in the main thread."""
    alone = config.devices == config.gradient_accumulation_steps == 1 and not started_by_torchrun()
    if not alone or threading.current_thread() is not threading.main_thread():
        return config
    return replace(config, use_cuda_graph=choose_device(config.device).type == "cuda")


WARMUP = 3  # calls in which the optimiser makes its state, and libraries their workspaces


class GraphedFunction:
    """A function of tensors that is replayed as a CUDA graph, one for each set of shapes it is called with.

    A graph launches all kernels of a training step at once, the same ones in the same order; small models wait for
    launches otherwise (docs/gpu.md). https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    The first calls with new shapes run the function as it is; then it is recorded, which computes nothing.

    Args:
        function: of tensors, or None in their place, to a tensor, to be read before the next call. It must not wait for
            the device; what changes from call to call must be an argument or a tensor that is changed in place.
        device: a GPU.
        warmup: calls before the recording.

    Raises:
        RuntimeError: from a call, if the function cannot be recorded.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, warmup: int = WARMUP) -> None:
        self.function, self.warmup = function, warmup
        self.device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
        self.pool = torch.cuda.graph_pool_handle()  # of all graphs: only one runs at a time
        self.calls: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Sequence[Tensor | None], Tensor]] = {}

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        shapes = _shapes(arguments)
        if shapes not in self.recorded:
            self.calls[shapes] += 1
            if self.calls[shapes] <= self.warmup:
                return self._unrecorded(arguments)
            self.record(*arguments)
        graph, buffers, result = self.recorded[shapes]
        for buffer, argument in zip(buffers, arguments, strict=True):
            if buffer is not None and argument is not None:
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
            torch.cuda.set_stream(stream)  # a failed recording leaves its own stream and generator state behind
            generator.graphsafe_set_state(drawn)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            cause = str(error).partition("\n")[0]
            raise RuntimeError(
                "this step cannot be recorded as a CUDA graph: something in it waits for the device, or is done on the "
                f"CPU, or another thread uses the device; give --no-use_cuda_graph ({cause})"
            ) from error
        self.recorded[_shapes(arguments)] = graph, buffers, result

    def _unrecorded(self, arguments: Sequence[Tensor | None]) -> Tensor:
        """The function itself, on the stream that records, to which the memory that it keeps must belong."""
        current, side = torch.cuda.current_stream(self.device), _side_stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True", UserWarning)  # it is not recorded yet
            result = self.function(*arguments)
        current.wait_stream(side)
        return result


def _shapes(arguments: Sequence[Tensor | None]) -> Hashable:
    return tuple(None if argument is None else argument.shape for argument in arguments)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: the matrix library keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


def set_capturable(optimizer: torch.optim.Optimizer, device: torch.device, capturable: bool) -> None:
    """Let an optimiser's step be recorded, its learning rates as tensors on the device; or undo that."""
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if capturable else rate
        group["capturable"] = capturable


CPU = torch.device("cpu")
INITIALISATIONS = (init.kaiming_uniform_, init.uniform_, init.normal_, torch.randn)  # that the kit's modules use
_own: ContextVar["OwnRandomness | None"] = ContextVar("own randomness", default=None)  # of a thread


class OwnRandomness(TorchFunctionMode):
    """Within this context, in this thread, dropout and `INITIALISATIONS` draw from generators that nobody else uses.

    So a run in a thread and the cells of a notebook do not change each other's numbers. On a CPU they are those of a
    process whose generator has the same seed; on a GPU dropout's are others, as the fused one takes no generator.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed, self.generators = seed, dict[str, torch.Generator]()  # by kind of device

    def __enter__(self) -> "OwnRandomness":
        self._outer = _own.get()
        _own.set(self)
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        _own.set(self._outer)

    def on(self, device: torch.device) -> torch.Generator:
        if device.type not in self.generators:
            self.generators[device.type] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device.type]

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
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
    if own := _own.get():
        own.seed, own.generators = seed, {}
    else:
        torch.manual_seed(seed)


def generator(device: torch.device) -> torch.Generator:
    """What this thread draws from on a device."""
    if own := _own.get():
        return own.on(device)
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
