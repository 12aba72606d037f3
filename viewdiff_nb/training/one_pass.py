"""Many adapters of one frozen base trained in one pass: a grid of runs for little more than the price of one.

Every run keeps its own seed, order of data, learning rate, rank, scale and lambda, and ends with the adapter that
`loop.train` would have given it. The frozen base, the data and the teacher of prior preservation are shared.
A batch holds the samples of A runs one after the other, (A B, ...); see `modules.stacked`.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import vmap

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.modules.stacked import stack_adapters, unstack
from viewdiff_nb.training.batches import (
    Mixup,
    count_batches,
    draw_epoch,
    mix,
    move_if_it_fits,
    take,
    views_to_train,
)
from viewdiff_nb.training.checkpoint import prepare_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import GraphedFunction, choose_device, connect
from viewdiff_nb.training.losses import LOSSES, Objective, amp_dtype_for, mean_loss, warmup_cosine
from viewdiff_nb.training.result import TrainResult, evaluate

MAY_DIFFER = ("rank", "lora_alpha", "lora_lr", "lambda_prior", "seed")  # between the runs of one pass


def shared_part(config: TrainConfig) -> TrainConfig:
    """What all runs of one pass have in common: equal for two configs that can be trained together."""
    return replace(config, **{name: getattr(TrainConfig, name) for name in MAY_DIFFER})


def refusal(config: TrainConfig) -> str | None:
    """Why a run has to be trained alone; None if it need not be."""
    if not (config.use_lora_attention and config.freezes_base and config.base_model_path):
        return "only LoRA adapters of a frozen base are trained together"
    if config.use_cross_view or config.paired_views:
        return "groups of views of a person are trained alone"
    if config.save_dir or config.log_dir or config.resume or config.devices * config.gradient_accumulation_steps > 1:
        return "accumulation, checkpoints, logs and several devices are for runs that are trained alone"
    if config.use_compile:
        return "use_compile is for runs that are trained alone"
    if config.use_amp and amp_dtype_for(choose_device(config.device)) is torch.float16:
        return "float16 needs a gradient scaler of its own for every run"
    return None


def train_together(configs: Sequence[TrainConfig], train_faces: FaceViews, val_faces: FaceViews) -> list[TrainResult]:
    """Train adapters that differ only in what `MAY_DIFFER` names.

    train_seconds of each result is its share of the whole. A run whose loss or gradient is not finite stays as it was
    before that step, is validated no more, and its result says "diverged"; the others go on.

    Raises:
        ValueError: for configs that cannot be trained together.
    """
    for config in configs:
        if reason := refusal(config):
            raise ValueError(reason)
        if shared_part(config) != shared_part(configs[0]):
            raise ValueError(f"runs of one pass may differ only in {', '.join(MAY_DIFFER)}")
    return _Pass(configs, train_faces, val_faces).run()


class _Pass:
    """Runs that are trained together; `run` is the loop."""

    def __init__(self, configs: Sequence[TrainConfig], train_faces: FaceViews, val_faces: FaceViews) -> None:
        self.configs, config = configs, configs[0]
        self.device, self.loss = connect(config).device, LOSSES[config.loss]
        faces, self.val_faces = move_if_it_fits(train_faces, self.device), move_if_it_fits(val_faces, self.device)
        self.faces = views_to_train(faces, config)
        self.mixup = Mixup(self.faces) if config.mixup else None
        self.batches = count_batches(self.faces, config)

        models, bases = zip(*(prepare_model(c, faces.feature_dim) for c in configs), strict=True)
        self.models = [model.to(self.device) for model in models]
        self.stack = stack_adapters(self.models)
        trainable = [p for p in self.stack.parameters() if p.requires_grad]
        rates = torch.tensor([c.lora_lr for c in configs])
        self.optimiser = StackedAdamW(trainable, rates, config.weight_decay, config.clip_norm)
        self.schedule = warmup_cosine(config.warmup, config.epochs * self.batches)
        self.generators = [torch.Generator().manual_seed(c.seed) for c in configs]
        self.lambdas = torch.tensor([c.lambda_prior for c in configs], device=self.device)
        base = prior_faces = None
        if bases[0] is not None:
            base = bases[0].to(self.device)
            prior_faces = faces.where(faces.abs_yaw < config.prior_max_yaw).in_memory().to(self.device)
        self.front = self.faces.front.to(self.device)
        self.objective = Objective(config, self.stack, self.front, self.device, base, prior_faces)

    def run(self) -> list[TrainResult]:
        config, count = self.configs[0], len(self.configs)
        learn = GraphedFunction(self._learn, self.device) if config.use_cuda_graph else self._learn
        start = []
        if config.val_every <= config.epochs:  # as in `train`; before the first step all are their base
            start = [{"epoch": 0} | evaluate(self.models[0], self.val_faces, self.loss)]
        histories: list[list[dict[str, float]]] = [list(start) for _ in self.configs]
        torch.manual_seed(config.seed)  # dropout
        seconds = 0.0
        for epoch in range(1, config.epochs + 1):
            self.stack.train()
            started = time.perf_counter()
            losses = torch.zeros(self.batches, count, device=self.device)
            for i, (rows, weight) in enumerate(self._draw()):
                self.optimiser.begin(self.schedule((epoch - 1) * self.batches + i))
                losses[i] = learn(rows, weight, self._draw_prior(rows))
            means = losses.mean(0).tolist()
            seconds += time.perf_counter() - started
            rate = self.schedule(epoch * self.batches)
            for history, mean, c in zip(histories, means, self.configs, strict=True):
                history.append({"epoch": epoch, "train_loss": mean, "lr": rate * c.lora_lr, "seconds": seconds / count})
            if epoch % config.val_every == 0 or epoch == config.epochs:
                unstack(self.stack, self.models)
                diverged = self.optimiser.diverged.tolist()
                for history, model, bad in zip(histories, self.models, diverged, strict=True):
                    if not bad:
                        history[-1] |= evaluate(model, self.val_faces, self.loss)
        steps = config.epochs * self.batches
        return [
            TrainResult(model, pd.DataFrame(history), seconds / count, steps, "diverged" if bad else "finished", None)
            for model, history, bad in zip(self.models, histories, diverged, strict=True)
        ]

    def _draw(self) -> list[tuple[Tensor, Tensor | None]]:
        """For each batch of an epoch the rows of all runs (A, B), with mix-up (A, 2 B), and its weights (A, B)."""
        drawn = [draw_epoch(self.faces, self.configs[0], self.mixup, generator) for generator in self.generators]
        rows = [torch.stack(batch) for batch in zip(*(rows for rows, _ in drawn), strict=True)]
        if not self.mixup:
            return [(batch, None) for batch in rows]
        weights = zip(*(weights for _, weights in drawn), strict=True)
        return [(batch, torch.stack(weight).to(self.device)) for batch, weight in zip(rows, weights, strict=True)]

    def _draw_prior(self, rows: Tensor) -> Tensor | None:
        """For each run the rows (A, K) of the prior samples that go with a batch; None without prior preservation."""
        if self.objective.prior is None:
            return None
        count = self.configs[0].prior_count(rows.shape[1] // (2 if self.mixup else 1))
        return torch.stack([self.objective.prior.draw(count, generator) for generator in self.generators])

    def _learn(self, rows: Tensor, weight: Tensor | None, prior_rows: Tensor | None) -> Tensor:
        """One step of all runs; returns their losses (A,) before it."""
        runs, objective = len(rows), self.objective
        mixing: tuple[Tensor, ...] = ()
        if weight is None:
            batch = take(self.faces, rows.flatten())
        else:  # mix wants the first halves of all runs, then the second ones
            both = take(self.faces, torch.cat([half.flatten() for half in rows.chunk(2, 1)]))
            batch, partner = mix(both, weight.flatten())
            mixing = partner.view(runs, -1), weight
        src, conditions = batch.src, batch.conditions()
        size = len(src) // runs
        if objective.prior is not None and prior_rows is not None:
            prior = objective.prior[prior_rows]
            src = _join(src, prior["inputs"])
            conditions = {name: _join(value, prior["conditions"][name]) for name, value in conditions.items()}
        with torch.autocast(self.device.type, objective.amp_dtype, enabled=objective.amp_dtype is not None):
            predicted = self.stack(src, **conditions, return_residual=False).unflatten(0, (runs, -1))
            task_loss = partial(mean_loss, self.loss, self.front)
            losses = vmap(task_loss)(predicted[:, :size], batch.person.view(runs, -1), *mixing)
            if objective.task is not None:
                prior_losses, _ = vmap(objective.task.prior_loss)(predicted[:, size:], prior["outputs"])
                losses = losses + self.lambdas * prior_losses
        losses.sum().backward()
        self.optimiser.step(losses.detach())
        return losses.detach()


def _join(own: Tensor, prior: Tensor) -> Tensor:
    """(A B, ...) and (A, K, ...) to (A (B + K), ...)."""
    return torch.cat((own.unflatten(0, (len(prior), -1)), prior), 1).flatten(0, 1)


BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW's, torch's defaults


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
        self.parameters, self.weight_decay, self.clip_norm = parameters, weight_decay, clip_norm
        self.values = torch.cat([p.detach().flatten(1) for p in parameters], 1)
        parts = self.values.split([p[0].numel() for p in parameters], 1)
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part.unflatten(1, parameter.shape[1:])
        device = self.values.device
        self.mean, self.square = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.lr = lr.to(device, torch.float32)[:, None]
        self.diverged = torch.zeros(len(lr), dtype=torch.bool, device=device)
        self.steps = 0
        self.factor, self.correct1, self.correct2 = torch.ones(3, device=device)  # of the step that begins

    def begin(self, factor: float) -> None:
        """Begin a step with learning rates factor * lr; apart from `step`, which a CUDA graph may replay."""
        self.steps += 1
        self.factor.fill_(factor)
        self.correct1.fill_(1 - BETAS[0] ** self.steps)
        self.correct2.fill_(math.sqrt(1 - BETAS[1] ** self.steps))

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """Update by the gradients of loss, (A,), and clear them."""
        gradient = torch.cat([p.grad.flatten(1) for p in self.parameters if p.grad is not None], 1)
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
