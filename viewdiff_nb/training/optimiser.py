"""AdamW with a learning rate per role, and its schedule."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .config import TrainConfig

FINAL_LR = 0.01  # of the learning rate, at the end of the cosine
BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW's, torch's defaults
FAST_ROLES = ("lora", "projection")  # trained with lora_lr


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with one group per role: LoRA and projection at lora_lr, base and cross-view attention at lr."""
    if hasattr(model, "parameter_groups"):
        roles = model.parameter_groups()
    else:
        roles = {"base": [p for p in model.parameters() if p.requires_grad]}
    if not roles:
        raise ValueError("the model has no trainable parameter: its base is frozen and nothing was added")
    groups = [{"params": params, "lr": config.lora_lr if role in FAST_ROLES else config.lr, "role": role}
              for role, params in roles.items()]  # fmt: skip
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def warmup_cosine(warmup: float, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: linear from 0 to 1, then a cosine down to `FINAL_LR`."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, steps - rising)
        return FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    return factor


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float], factor: float) -> None:
    """Learning rates factor * rates, one a group; written into tensors where a CUDA graph reads them."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(factor * rate)
        else:
            group["lr"] = factor * rate


class StackedAdamW:
    """AdamW for stacks of parameters (A, ...), each row with a learning rate of its own and clipped by itself.

    As `torch.optim.AdamW` (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) would treat the rows one by one.
    The parameters become views of one tensor (A, N), so that a step is a few operations however many there are; a
    module that is moved or converted afterwards is not trained by it any more.

    A row whose loss or gradient is not finite has `diverged`: it is updated neither by this step nor by later ones.

    Args:
        parameters: each (A, ...), of one dtype.
        lr: (A,).
        clip_norm: bound of each row's gradient over all parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: Tensor, weight_decay: float, clip_norm: float) -> None:
        self.parameters = list(parameters)
        self.values = self._flat([p.detach() for p in self.parameters])
        parts = self.values.split([p[0].numel() for p in self.parameters], 1)
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.data = part.unflatten(1, parameter.shape[1:])
        device = self.values.device
        self.mean, self.square = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.lr, self.weight_decay, self.clip_norm = lr.to(device, torch.float32)[:, None], weight_decay, clip_norm
        self.diverged = torch.zeros(len(lr), dtype=torch.bool, device=device)
        self.steps = 0
        self.factor, self.correct1, self.correct2 = torch.ones(3, device=device)  # of the step that begins

    def begin(self, factor: float) -> None:
        """Begin a step with learning rates factor * lr."""
        self.steps += 1
        self.factor.fill_(factor)
        self.correct1.fill_(1 - BETAS[0] ** self.steps)
        self.correct2.fill_(math.sqrt(1 - BETAS[1] ** self.steps))

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """Update as `begin` said.

        Args:
            loss: (A,), of which the parameters have the gradients.
        """
        gradient = self._flat([p.grad for p in self.parameters])
        norm = gradient.norm(dim=1)
        self.diverged |= ~(norm.isfinite() & loss.isfinite())
        moves = ~self.diverged[:, None]
        gradient.mul_((self.clip_norm / (norm[:, None] + 1e-6)).clamp(max=1.0)).masked_fill_(~moves, 0.0)
        rate = self.factor * self.lr * moves
        self.mean.lerp_(gradient, (1 - BETAS[0]) * moves)
        self.square.lerp_(gradient.square_(), (1 - BETAS[1]) * moves)
        self.values.mul_(1 - rate * self.weight_decay)
        spread = self.square.sqrt().div_(self.correct2).add_(EPS)
        self.values.addcdiv_(self.mean * (-rate / self.correct1), spread)
        for p in self.parameters:
            p.grad = None

    @staticmethod
    def _flat(stacks: Sequence[Tensor]) -> Tensor:
        """(A, ...) each to (A, N)."""
        return torch.cat([stack.flatten(1) for stack in stacks], 1)
