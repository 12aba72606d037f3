"""Many adapters of one frozen base trained in one pass: a grid of runs for little more than the price of one.

Every run keeps its own seed, order of data, learning rate, rank, scale and lambda, and ends with the adapter that
`trainer.train` would have given it. The frozen base, the data and the teacher of prior preservation are shared.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor
from torch.func import vmap

from ..faces.views import FaceViews
from ..modules.prior import PriorPreservationDataset, PriorPreservationLoss
from ..modules.stacked import StackedAdapters
from .batches import count_batches, place, take, views_to_train
from .capture import Captured
from .config import TrainConfig, choose_device
from .evaluation import evaluate
from .losses import LOSSES, mean_loss
from .mixup import Mixup, draw_epoch, mix
from .objective import amp_dtype_for
from .optimiser import StackedAdamW, warmup_cosine
from .prepare import prepare_model
from .trainer import TrainResult

FREE = ("rank", "lora_alpha", "lora_lr", "lambda_prior", "seed")  # what runs of one pass may differ in


def shared_part(config: TrainConfig) -> TrainConfig:
    """What all runs of one pass have in common: equal for two configs that can be trained together."""
    return replace(config, **{name: getattr(TrainConfig, name) for name in FREE})


def refusal(config: TrainConfig) -> str | None:
    """Why a run has to be trained alone; None if it need not be."""
    if not (config.use_lora_attention and config.freezes_base and config.base_model_path):
        return "only LoRA adapters of a frozen base are trained together"
    if config.use_cross_view or config.paired_views:
        return "groups of views of a person are trained alone"
    if config.save_dir or config.log_dir or config.resume or config.devices * config.gradient_accumulation_steps > 1:
        return "accumulation, checkpoints, logs and several devices are for runs that are trained alone"
    if config.use_amp and amp_dtype_for(choose_device(config.device)) is torch.float16:
        return "float16 needs a gradient scaler of its own for every run"
    return None


def train_together(
    configs: Sequence[TrainConfig], train_faces: FaceViews, val_faces: FaceViews
) -> list[TrainResult]:
    """Train adapters that differ only in what `FREE` names.

    train_seconds of each result is its share of the whole. A run whose loss or gradient is not finite stays as it was
    before that step, is validated no more, and its result says "diverged"; the others go on.

    Raises:
        ValueError: for configs that cannot be trained together.
    """
    shared = shared_part(configs[0])
    for config in configs:
        if (reason := refusal(config)) or shared_part(config) != shared:
            raise ValueError(reason or f"runs of one pass may differ only in {', '.join(FREE)}")
    return _Pass(configs, train_faces, val_faces).run()


class _Pass:
    def __init__(self, configs: Sequence[TrainConfig], train_faces: FaceViews, val_faces: FaceViews) -> None:
        self.configs, config = list(configs), configs[0]
        self.device = config.one_device()
        faces, self.val_faces = place(train_faces, self.device), place(val_faces, self.device)
        self.faces = views_to_train(faces, config)
        self.front = self.faces.front.to(self.device)
        self.mixup = Mixup(self.faces) if config.mixup else None
        self.batches = count_batches(self.faces, config)

        prepared = [prepare_model(c, faces.feature_dim) for c in self.configs]
        self.model = StackedAdapters([model.to(self.device) for model, _ in prepared])
        self.parameters = list(self.model.trainable().values())
        rates = torch.tensor([c.lora_lr for c in self.configs])
        self.optimiser = StackedAdamW(self.parameters, rates, config.weight_decay, config.clip_norm)
        self.schedule = warmup_cosine(config.warmup, config.epochs * self.batches)
        self.generators = [torch.Generator().manual_seed(c.seed) for c in self.configs]
        self.lambdas = torch.tensor([c.lambda_prior for c in self.configs], device=self.device)
        self.prior = self.prior_loss = None
        if prepared[0][1] is not None:
            kept = faces.where(faces.abs_yaw < config.prior_max_yaw).in_memory().to(self.device)
            self.prior = PriorPreservationDataset(prepared[0][1].to(self.device), kept.src, kept.conditions())
            self.prior_loss = PriorPreservationLoss(self.front)
        self.amp_dtype = amp_dtype_for(self.device) if config.use_amp else None

    def run(self) -> list[TrainResult]:
        config, count = self.configs[0], len(self.configs)
        learn = Captured(self._learn, self.device) if config.use_cuda_graph else self._learn
        start = []
        if config.val_every <= config.epochs:  # as in `train`; before the first step all are their base
            start = [{"epoch": 0} | evaluate(self.model.models[0], self.val_faces, LOSSES[config.loss])]
        histories: list[list[dict]] = [list(start) for _ in self.configs]
        torch.manual_seed(config.seed)  # dropout
        seconds = 0.0
        for epoch in range(config.epochs):
            self.model.train()
            started = time.perf_counter()
            losses = torch.zeros(self.batches, count, device=self.device)
            rows, weights = self._draw()
            for i in range(self.batches):
                self.optimiser.begin(self.schedule(epoch * self.batches + i))
                losses[i] = learn(rows[i], weights and weights[i], self._draw_prior(rows[i]))
            means = losses.mean(0).tolist()
            seconds += time.perf_counter() - started
            rate = self.schedule((epoch + 1) * self.batches)
            for history, mean, c in zip(histories, means, self.configs, strict=True):
                history.append({"epoch": epoch + 1, "train_loss": mean, "lr": rate * c.lora_lr,
                                "seconds": seconds / count})  # fmt: skip
            if (epoch + 1) % config.val_every == 0 or epoch + 1 == config.epochs:
                diverged = self.optimiser.diverged.tolist()
                for history, model, bad in zip(histories, self.model.unstack(), diverged, strict=True):
                    if not bad:
                        history[-1] |= evaluate(model, self.val_faces, LOSSES[config.loss])
        ended = ["diverged" if bad else "finished" for bad in diverged]
        return [TrainResult(model, pd.DataFrame(history), seconds / count, config.epochs * self.batches, how, None)
                for model, history, how in zip(self.model.unstack(), histories, ended, strict=True)]  # fmt: skip

    def _draw(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """For each batch the rows of all runs (A, B), with mix-up (A, 2 B), and the weights (A, B)."""
        drawn = [draw_epoch(self.faces, self.configs[0], self.mixup, generator) for generator in self.generators]
        rows = [torch.stack(batch) for batch in zip(*(r for r, _ in drawn), strict=True)]
        if not self.mixup:
            return rows, None
        return rows, [torch.stack(weight).to(self.device) for weight in zip(*(w for _, w in drawn), strict=True)]

    def _draw_prior(self, rows: Tensor) -> Tensor | None:
        """For each run the rows (A, K) of the prior samples that go with a batch; None without prior preservation."""
        if self.prior is None:
            return None
        count = self.configs[0].prior_count(rows.shape[1] // (2 if self.mixup else 1))
        return torch.stack([self.prior.draw(count, generator) for generator in self.generators])

    def _learn(self, rows: Tensor, weight: Tensor | None, kept: Tensor | None) -> Tensor:
        """One step of all runs; returns their losses (A,) before it."""
        loss = self._losses(rows, weight, kept)
        loss.sum().backward()
        self.optimiser.step(loss.detach())
        return loss.detach()

    def _losses(self, rows: Tensor, weight: Tensor | None, kept_rows: Tensor | None) -> Tensor:
        """(A,) what is minimised by each run."""
        runs, partner = len(rows), None
        if weight is not None:  # first halves of all runs, then second halves, as mix wants them
            rows = torch.cat([half.flatten() for half in rows.chunk(2, 1)])
        batch = take(self.faces, rows.flatten())
        if weight is not None:
            batch, partner = mix(batch, weight.flatten())
            partner = partner.view(runs, -1)
        src, conditions = batch.src, batch.conditions()
        size = len(src) // runs
        kept = None
        if kept_rows is not None:
            kept = self.prior[kept_rows]
            src = _join(src, kept["inputs"])
            conditions = {name: _join(value, kept["conditions"][name]) for name, value in conditions.items()}
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            predicted = self.model(src, **conditions, return_residual=False).unflatten(0, (runs, -1))
            loss = self._task_losses(predicted[:, :size], batch.person.view(runs, -1), partner, weight)
            if kept is not None:
                preserved, _ = vmap(self.prior_loss)(predicted[:, size:], kept["outputs"])
                loss = loss + self.lambdas * preserved
        return loss

    def _task_losses(self, predicted: Tensor, person: Tensor, partner: Tensor | None, weight: Tensor | None) -> Tensor:
        loss = LOSSES[self.configs[0].loss]
        if partner is None:
            return vmap(lambda p, o: mean_loss(loss, self.front, p, o))(predicted, person)
        return vmap(lambda *a: mean_loss(loss, self.front, *a))(predicted, person, partner, weight)


def _join(own: Tensor, kept: Tensor) -> Tensor:
    """(A B, ...) and (A, K, ...) to (A (B + K), ...)."""
    return torch.cat((own.unflatten(0, (len(kept), -1)), kept), 1).flatten(0, 1)
