"""Many adapters of one frozen base trained in one pass: a grid of runs for little more than the price of one.

Every run keeps its own seed, order of data, learning rate, rank, scale and lambda, and ends with the adapter that
`trainer.train` would have given it. The frozen base, the data and the teacher of prior preservation are shared.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.modules.attention import PoseConditionedLoRAAttention, pose_code, split_heads
from viewdiff_nb.modules.lora import LoRALinearLayer
from viewdiff_nb.modules.prior import PriorPreservationDataset, PriorPreservationLoss
from viewdiff_nb.modules.projection import LightweightFaceProjectionLayer
from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D
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
from viewdiff_nb.training.devices import GraphedFunction, choose_device, one_device
from viewdiff_nb.training.evaluation import evaluate
from viewdiff_nb.training.losses import LOSSES, amp_dtype_for, mean_loss, warmup_cosine
from viewdiff_nb.training.result import TrainResult

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


def train_together(configs: Sequence[TrainConfig], train_faces: FaceViews, val_faces: FaceViews) -> list[TrainResult]:
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
        self.device = one_device(config)
        faces, self.val_faces = move_if_it_fits(train_faces, self.device), move_if_it_fits(val_faces, self.device)
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
        learn = GraphedFunction(self._learn, self.device) if config.use_cuda_graph else self._learn
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
                history.append(
                    {"epoch": epoch + 1, "train_loss": mean, "lr": rate * c.lora_lr, "seconds": seconds / count}
                )
            if (epoch + 1) % config.val_every == 0 or epoch + 1 == config.epochs:
                diverged = self.optimiser.diverged.tolist()
                for history, model, bad in zip(histories, self.model.unstack(), diverged, strict=True):
                    if not bad:
                        history[-1] |= evaluate(model, self.val_faces, LOSSES[config.loss])
        ended = ["diverged" if bad else "finished" for bad in diverged]
        return [
            TrainResult(model, pd.DataFrame(history), seconds / count, config.epochs * self.batches, how, None)
            for model, history, how in zip(self.model.unstack(), histories, ended, strict=True)
        ]

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


# ---- Many adapters of one frozen base, side by side in one pass.
# A batch holds the samples of A adapters one after the other, (A B, ...). The frozen layers see one large batch; what an
# adapter adds is a product with a stack of A matrices. Adapters of different rank are padded with zeros to the highest:
# where both factors are zero neither gets a gradient, so the padding stays zero and changes nothing.


class StackedLoRALinear(nn.Module):
    """A LoRA layers over one frozen linear layer, to be trained: they can be neither merged nor disabled.

    As in `LoRALinearLayer`, but lora_down is (A, R, in_features + pose_dim), lora_up (A, out_features, R), and scale
    (A, 1, 1), with R the highest rank.

    Args:
        layers: of equal base and pose_dim, without adapter dropout; their parameters are copied.
    """

    def __init__(self, layers: Sequence[LoRALinearLayer]) -> None:
        super().__init__()
        first = layers[0]
        self.in_features, self.out_features, self.pose_dim = first.in_features, first.out_features, first.pose_dim
        if any(layer.dropout or layer.pose_dim != first.pose_dim or layer.is_merged for layer in layers):
            raise ValueError(
                "adapters that are trained together share pose_dim, are not merged, and have no dropout of their own"
            )
        self.weight, self.bias = first.weight, first.bias
        self.ranks = [layer.rank for layer in layers]
        scales = torch.tensor([layer.scale for layer in layers], device=self.weight.device, dtype=self.weight.dtype)
        self.register_buffer("scale", scales[:, None, None], persistent=False)
        pads = [max(self.ranks) - rank for rank in self.ranks]
        self.lora_down = nn.Parameter(
            torch.stack([F.pad(x.lora_down.detach(), (0, 0, 0, p)) for x, p in zip(layers, pads, strict=True)])
        )
        self.lora_up = nn.Parameter(
            torch.stack([F.pad(x.lora_up.detach(), (0, p)) for x, p in zip(layers, pads, strict=True)])
        )

    @torch.no_grad()
    def copy_to(self, index: int, layer: LoRALinearLayer) -> None:
        """Write the adapter of that number back into a layer of its own rank."""
        layer.lora_down.copy_(self.lora_down[index, : layer.rank])
        layer.lora_up.copy_(self.lora_up[index, :, : layer.rank])

    def forward(self, x: Tensor, pose: Tensor | None = None) -> Tensor:
        """x: (A B, T, in_features), pose: (A B, 1, pose_dim) to (A B, T, out_features)."""
        y = F.linear(x, self.weight, self.bias)
        low = self.down(x)
        if self.pose_dim:
            low = low + self.down_pose(pose)[:, :, None]
        low = low.flatten(1, 2)  # (A, B T, R)
        return y + ((low * self.scale) @ self.lora_up.transpose(1, 2)).view_as(y)

    def extra_repr(self) -> str:
        return f"{self.in_features} to {self.out_features}, ranks={self.ranks}, pose_dim={self.pose_dim}"

    def _split_down(self) -> tuple[Tensor, Tensor]:
        return self.lora_down.split((self.in_features, self.pose_dim), 2)

    def down(self, x: Tensor) -> Tensor:
        """A_x x of each adapter: (A B, K, in_features) to (A, B, K, R)."""
        low = x.reshape(len(self.ranks), -1, self.in_features) @ self._split_down()[0].transpose(1, 2)
        return low.unflatten(1, (-1, x.shape[1]))

    def down_pose(self, pose: Tensor) -> Tensor:
        """A_p c of each adapter: (A B, 1, pose_dim) to (A, B, R)."""
        return pose.reshape(len(self.ranks), -1, self.pose_dim) @ self._split_down()[1].transpose(1, 2)

    def up_by_head(self, heads: int) -> Tensor:
        """B_h: (A, H, out_features / H, R)."""
        return self.lora_up.unflatten(1, (heads, -1))


class StackedAttention(nn.Module):
    """A attentions over one frozen one, for a single feature token with a memory.

    The short way of `PoseConditionedLoRAAttention`, and one step further for the adapters: what A_k and A_v make of a
    token is R numbers, so scores and sums are taken there, and no adapter ever sees (heads, tokens, D).

    Args:
        layers: of equal sizes; their parameters are copied.
    """

    def __init__(self, layers: Sequence[PoseConditionedLoRAAttention]) -> None:
        super().__init__()
        self.num_heads, self.pose_dim = layers[0].num_heads, layers[0].pose_dim
        for name in ("query", "key", "value", "out"):
            setattr(self, name, StackedLoRALinear([getattr(layer, name) for layer in layers]))

    def copy_to(self, index: int, layer: PoseConditionedLoRAAttention) -> None:
        for name in ("query", "key", "value", "out"):
            getattr(self, name).copy_to(index, getattr(layer, name))

    def forward(
        self, features: Tensor, pose: Tensor | None = None, memory: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """features: (A B, 1, D), pose: (A B, P), memory: (A B, M, D); see `PoseConditionedLoRAAttention`.

        The feature token and the memory are kept apart: what a frozen base makes of pose and keypoints needs no
        gradient.
        """
        runs, heads = len(self.key.ranks), self.num_heads
        code = pose_code(pose, (len(features), self.pose_dim)) if self.pose_dim else None
        q = split_heads(self.query(features, code), heads)[:, :, 0]  # (N, H, d), N = A B
        q = q * q.shape[-1] ** -0.5
        towards = q.transpose(0, 1) @ self.key.weight.unflatten(0, (heads, -1))  # (H, N, D)
        towards = towards.transpose(0, 1)
        scores = torch.cat((towards @ features.transpose(1, 2), towards @ memory.transpose(1, 2)), 2)  # (N, H, 1 + M)
        low_q = q.unflatten(0, (runs, -1)).transpose(1, 2) @ self.key.up_by_head(heads)  # (A, H, B, R)
        low_q = low_q.transpose(1, 2) * self.key.scale[:, None]  # (A, B, H, R)
        low_k = torch.cat((self.key.down(features), self.key.down(memory)), 2)  # (A, B, 1 + M, R)
        weights = (scores + (low_q @ low_k.transpose(2, 3)).flatten(0, 1)).softmax(-1)

        summed = weights[:, :, :1] * features + weights[:, :, 1:] @ memory  # (N, H, D)
        attended = summed.transpose(0, 1) @ self.value.weight.unflatten(0, (heads, -1)).transpose(1, 2)  # (H, N, d)
        low_v = torch.cat((self.value.down(features), self.value.down(memory)), 2)  # (A, B, 1 + M, R)
        low_v = weights.unflatten(0, (runs, -1)) @ low_v  # (A, B, H, R)
        if self.pose_dim:
            low_v = low_v + self.value.down_pose(code)[:, :, None]
        low_v = (low_v * self.value.scale[:, None]).transpose(1, 2)  # (A, H, B, R)
        update = (low_v @ self.value.up_by_head(heads).transpose(2, 3)).transpose(1, 2)  # (A, B, H, d)
        attended = (attended.transpose(0, 1) + update.flatten(0, 1)).flatten(1) + self.value.bias
        output = self.out(attended[:, None])
        return (output, weights[:, :, None]) if return_attention else output


class StackedProjection(nn.Module):
    """A projection layers side by side: one layer whose every parameter is a stack (A, ...).

    Args:
        layers: of the same sizes; their parameters are copied.
    """

    def __init__(self, layers: Sequence[LightweightFaceProjectionLayer]) -> None:
        super().__init__()
        self.count = len(layers)
        self.layer = copy.deepcopy(layers[0])
        for name, parameter in self.layer.named_parameters():
            parameter.data = torch.stack([layer.get_parameter(name).detach() for layer in layers])

    @torch.no_grad()
    def copy_to(self, index: int, layer: LightweightFaceProjectionLayer) -> None:
        for name, parameter in layer.named_parameters():
            parameter.copy_(self.layer.get_parameter(name)[index])

    def forward(self, features: Tensor, keypoints_3d: Tensor, source_pose: Tensor) -> Tensor:
        """(A B, D), (A B, K, 3), (A B, 3) to (A B, D)."""
        stacks = dict(self.layer.named_parameters())
        parts = [value.unflatten(0, (self.count, -1)) for value in (features, keypoints_3d, source_pose)]
        if features.is_cuda:  # one launch for all, of all voxels
            self.layer.in_turns = False
            return vmap(self._one)(stacks, *parts).flatten(0, 1)
        return torch.cat(
            [
                self._one({name: stack[i] for name, stack in stacks.items()}, *(part[i] for part in parts))
                for i in range(self.count)
            ]
        )

    def _one(self, parameters: dict[str, Tensor], features: Tensor, keypoints: Tensor, pose: Tensor) -> Tensor:
        return functional_call(self.layer, parameters, (features, keypoints), {"source_pose": pose})


class StackedAdapters(nn.Module):
    """A models that differ in their adapters only, as one: (A B, ...) samples to (A B, D) predictions.

    Args:
        models: with LoRA, perhaps with a projection, without cross-view attention; of the same base, whose weights are
            taken from the first. Ranks and scales may differ.
    """

    def __init__(self, models: Sequence[EnhancedTransformerDecoderOnly3D]) -> None:
        super().__init__()
        first = models[0]
        if first.cross_view is not None:
            raise ValueError("cross-view attention is trained one model at a time")
        self.models = list(models)  # not this module's own
        self.together = copy.deepcopy(first)
        for name, kind in _outermost(first):
            parent, _, leaf = name.rpartition(".")
            stack = kind([model.get_submodule(name) for model in models])
            setattr(self.together.get_submodule(parent), leaf, stack)
        stacked = [f"{name}." for name, _ in _outermost(first)]
        if left := [name for name in self.trainable() if not name.startswith(tuple(stacked))]:
            raise ValueError(f"only adapters are trained together, and {left[0]} is trainable; freeze the base")

    def forward(self, src: Tensor, **conditions) -> Tensor:
        return self.together(src, **conditions)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The stacked parameters, each (A, ...), by name."""
        return {name: p for name, p in self.together.named_parameters() if p.requires_grad}

    def unstack(self) -> list[EnhancedTransformerDecoderOnly3D]:
        """The models given, with what their adapters have become."""
        for name, _ in _outermost(self.models[0]):
            for i, model in enumerate(self.models):
                self.together.get_submodule(name).copy_to(i, model.get_submodule(name))
        return self.models


def _outermost(model: nn.Module) -> list[tuple[str, type]]:
    """Names of the modules that are stacked, none within another, with the class that does it."""
    found: list[tuple[str, type]] = []
    for name, module in model.named_modules():
        kind = STACKS.get(type(module))
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if kind is not None and not inside and (kind is not StackedAttention or module.rank):
            found.append((name, kind))
    return found


STACKS = {
    PoseConditionedLoRAAttention: StackedAttention,
    LoRALinearLayer: StackedLoRALinear,
    LightweightFaceProjectionLayer: StackedProjection,
}


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
