"""AdamW with a learning rate per role, and its schedule."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .config import TrainConfig

FINAL_LR = 0.01  # of the learning rate, at the end of the cosine
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


class StackedAdamW:
    """AdamW for stacks of parameters (A, ...), each row with a learning rate of its own and clipped by itself.

    As `torch.optim.AdamW` (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) would treat the rows one by one,
    which has one learning rate for a tensor.

    Args:
        parameters: each (A, ...).
        lr: (A,).
        clip_norm: bound of each row's gradient over all parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: Tensor, weight_decay: float, clip_norm: float) -> None:
        self.parameters = list(parameters)
        self.lr = lr.to(self.parameters[0].device, torch.float32)
        self.weight_decay, self.clip_norm, self.steps = weight_decay, clip_norm, 0
        self.betas, self.eps = (0.9, 0.999), 1e-8
        self.mean, self.square = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))

    @torch.no_grad()
    def step(self, factor: float) -> Tensor:
        """Update with learning rates factor * lr; returns the norms (A,) of the gradients before clipping.

        A row whose gradient is not finite is left as it is, and so are its moments.
        """
        self.steps += 1
        gradients = [p.grad for p in self.parameters]
        norm = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        fine = norm.isfinite()
        scale = torch.where(fine, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0), 0.0)
        rate = factor * self.lr * fine
        beta1, beta2 = self.betas
        correct1, correct2 = 1 - beta1**self.steps, math.sqrt(1 - beta2**self.steps)
        for p, g, m, v in zip(self.parameters, gradients, self.mean, self.square, strict=True):
            rows = (-1, *(1,) * (p.dim() - 1))
            g = torch.where(fine.view(rows), g * scale.view(rows), 0.0)
            weight1, weight2 = ((1 - beta) * fine.view(rows) for beta in self.betas)
            m.lerp_(g, weight1.to(m.dtype))
            v.lerp_(g * g, weight2.to(v.dtype))
            r = rate.view(rows).to(p.dtype)
            p.mul_(1 - r * self.weight_decay)
            p.addcdiv_(m * (-r / correct1), v.sqrt().div_(correct2).add_(self.eps))
        for p in self.parameters:
            p.grad = None
        return norm
