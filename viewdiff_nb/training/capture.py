"""A training step as one CUDA graph: one launch instead of several hundred.

Steps of small models on small batches wait for the processor, which launches their kernels one by one (docs/gpu.md). A
graph is recorded once and replayed: the same kernels in the same order, dropout drawn from the same generator.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import cache

import torch
from torch import Tensor

WARMUP = 3  # calls in which lazily made things come to be: the optimiser's state, the libraries' workspaces


class Captured:
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
            raise RuntimeError("this step cannot be recorded as a CUDA graph: something in it waits for the device, or "
                               "is done on the CPU, or another thread uses the device; give --no-use_cuda_graph "
                               f"({cause})") from error  # fmt: skip
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
