"""Random numbers of a run's own, where a process does several things at once.

Torch's dropout and initialisations draw from one generator of the whole process. What trains in one thread while
cells of a notebook run in another would change their numbers, and they would change what is trained.
"""

from collections.abc import Callable
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

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
