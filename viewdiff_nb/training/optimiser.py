"""AdamW with a learning rate per role, and its schedule."""

import math
from collections.abc import Callable

import torch
from torch import nn

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
