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
    Where all rows have one learning rate it is that optimiser that does it, in its fused form.

    A row whose gradient is not finite is not updated by it.

    Args:
        parameters: each (A, ...).
        lr: (A,).
        clip_norm: bound of each row's gradient over all parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: Tensor, weight_decay: float, clip_norm: float) -> None:
        self.parameters = list(parameters)
        self.lr = lr.to(self.parameters[0].device, torch.float32)
        self.weight_decay, self.clip_norm, self.steps = weight_decay, clip_norm, 0
        self.rate = float(lr[0])
        self.fused = None
        if (lr == lr[0]).all():
            self.fused = torch.optim.AdamW(self.parameters, lr=self.rate, weight_decay=weight_decay, fused=True)
        else:
            self.mean, self.square = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
            self.factor, self.correct1, self.correct2 = torch.ones(3, device=self.lr.device)  # of the step that begins

    def begin(self, factor: float) -> None:
        """Begin a step with learning rates factor * lr."""
        if self.fused is not None:
            [group] = self.fused.param_groups
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(factor * self.rate)
            else:
                group["lr"] = factor * self.rate
            return
        self.steps += 1
        self.factor.fill_(factor)
        self.correct1.fill_(1 - BETAS[0] ** self.steps)
        self.correct2.fill_(math.sqrt(1 - BETAS[1] ** self.steps))

    @torch.no_grad()
    def step(self) -> Tensor:
        """Update as `begin` said; returns the norms (A,) of the gradients before clipping."""
        gradients = [p.grad for p in self.parameters]
        norm = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        fine = norm.isfinite()
        scale = torch.where(fine, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0), 0.0)
        safe = not norm.is_cuda and bool(fine.all())  # on a GPU nobody waits for the answer
        for gradient in gradients:
            gradient.mul_(_rows(scale, gradient))
            if not safe:
                gradient.nan_to_num_(0.0, 0.0, 0.0)  # 0 times infinity
        if self.fused is not None:
            self.fused.step()
        else:
            self._update(gradients, fine)
        for p in self.parameters:
            p.grad = None
        return norm

    def _update(self, gradients: Sequence[Tensor], fine: Tensor) -> None:
        (beta1, beta2), rate = BETAS, self.factor * self.lr * fine
        for p, g, m, v in zip(self.parameters, gradients, self.mean, self.square, strict=True):
            m.lerp_(g, _rows((1 - beta1) * fine, p))
            v.lerp_(g * g, _rows((1 - beta2) * fine, p))
            r = _rows(rate, p)
            p.mul_(1 - r * self.weight_decay)
            p.addcdiv_(m * (-r / self.correct1), v.sqrt().div_(self.correct2).add_(EPS))


def _rows(values: Tensor, stack: Tensor) -> Tensor:
    """(A,) to broadcast against the rows of a stack (A, ...)."""
    return values.view(-1, *(1,) * (stack.dim() - 1)).to(stack.dtype)
