"""Many adapters of one frozen base trained in one pass: a grid of runs for little more than the price of one.

Every run keeps its own seed, order of data, learning rate, rank, scale and lambda, and ends with the adapter that
`loop.train` would have given it. The frozen base, the data and the teacher of prior preservation are shared.

A batch holds the samples of A adapters one after the other, (A B, ...). The frozen layers see one large batch; what an
adapter adds is a product with a stack of A matrices. Adapters of different rank are padded with zeros to the highest:
where both factors are zero neither gets a gradient, so the padding stays zero and changes nothing.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pad_sequence

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.modules.attention import PoseConditionedLoRAAttention, pose_code, split_heads
from viewdiff_nb.modules.lora import LoRALinearLayer
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
from viewdiff_nb.training.devices import GraphedFunction, choose_device, connect
from viewdiff_nb.training.evaluation import evaluate
from viewdiff_nb.training.losses import LOSSES, Objective, amp_dtype_for, mean_loss, warmup_cosine
from viewdiff_nb.training.result import TrainResult

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
        size = rows.shape[1] // (2 if self.mixup else 1)
        return torch.stack([self.objective.draw(size, generator) for generator in self.generators])

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
        if objective.prior is not None:
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


class StackedLoRALinear(nn.Module):
    """A LoRA layers over one frozen linear layer, to be trained: they can be neither merged nor disabled.

    As in `LoRALinearLayer`, but lora_down is (A, R, in_features + pose_dim), lora_up (A, out_features, R), and scale
    (A, 1, 1), with R the highest rank. The layers have the same base and pose_dim; their parameters are copied.
    """

    scale: Tensor

    def __init__(self, layers: Sequence[LoRALinearLayer]) -> None:
        super().__init__()
        first = layers[0]
        if any(layer.dropout or layer.pose_dim != first.pose_dim or layer.is_merged for layer in layers):
            raise ValueError(
                "adapters that are trained together share pose_dim, are not merged, and have no dropout of their own"
            )
        self.weight, self.bias = first.weight, first.bias
        self.in_features, self.pose_dim, self.ranks = first.in_features, first.pose_dim, [x.rank for x in layers]
        scales = torch.tensor([x.scale for x in layers], device=self.weight.device, dtype=self.weight.dtype)
        self.register_buffer("scale", scales[:, None, None], persistent=False)
        downs, ups = [x.lora_down.detach() for x in layers], [x.lora_up.detach().T for x in layers]
        self.lora_down = nn.Parameter(pad_sequence(downs, batch_first=True))
        self.lora_up = nn.Parameter(pad_sequence(ups, batch_first=True).transpose(1, 2).contiguous())

    def forward(self, x: Tensor, pose: Tensor | None = None) -> Tensor:
        """x: (A B, T, in_features), pose: (A B, 1, pose_dim) to (A B, T, out_features)."""
        y = F.linear(x, self.weight, self.bias)
        low = self.down(x)
        if pose is not None:
            low = low + self.down_pose(pose)[:, :, None]
        low = low.flatten(1, 2)  # (A, B T, R)
        return y + ((low * self.scale) @ self.lora_up.transpose(1, 2)).view_as(y)

    def extra_repr(self) -> str:
        return f"{self.in_features} to {len(self.weight)}, ranks={self.ranks}, pose_dim={self.pose_dim}"

    def down(self, x: Tensor) -> Tensor:
        """A_x x of each adapter: (A B, K, in_features) to (A, B, K, R)."""
        matrices, _ = self.lora_down.split((self.in_features, self.pose_dim), 2)
        low = x.reshape(len(self.ranks), -1, self.in_features) @ matrices.transpose(1, 2)
        return low.unflatten(1, (-1, x.shape[1]))

    def down_pose(self, pose: Tensor) -> Tensor:
        """A_p c of each adapter: (A B, 1, pose_dim) to (A, B, R)."""
        _, matrices = self.lora_down.split((self.in_features, self.pose_dim), 2)
        return pose.reshape(len(self.ranks), -1, self.pose_dim) @ matrices.transpose(1, 2)


class StackedAttention(nn.Module):
    """A attentions over one frozen one, for a single feature token with a memory.

    The short way of `PoseConditionedLoRAAttention`, and one step further for the adapters: what A_k and A_v make of a
    token is R numbers, so scores and sums are taken there, and no adapter ever sees (heads, tokens, D).
    """

    def __init__(self, layers: Sequence[PoseConditionedLoRAAttention]) -> None:
        super().__init__()
        self.num_heads, self.pose_dim = layers[0].num_heads, layers[0].pose_dim

        def stacked(name: str) -> StackedLoRALinear:
            return StackedLoRALinear([getattr(layer, name) for layer in layers])

        self.query, self.key = stacked("query"), stacked("key")
        self.value, self.out = stacked("value"), stacked("out")

    def forward(
        self, features: Tensor, pose: Tensor | None, memory: Tensor, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """features: (A B, 1, D), pose: (A B, P), memory: (A B, M, D); see `PoseConditionedLoRAAttention`."""
        runs, heads = len(self.key.ranks), self.num_heads
        code = pose_code(pose, (len(features), self.pose_dim)) if self.pose_dim else None
        q = split_heads(self.query(features, code), heads)[:, :, 0]  # (N, H, d), N = A B
        q = q * q.shape[-1] ** -0.5
        towards = q.transpose(0, 1) @ self.key.weight.unflatten(0, (heads, -1))  # (H, N, D)
        towards = towards.transpose(0, 1)
        scores = torch.cat((towards @ features.transpose(1, 2), towards @ memory.transpose(1, 2)), 2)  # (N, H, 1 + M)
        low_q = q.unflatten(0, (runs, -1)).transpose(1, 2) @ self.key.lora_up.unflatten(1, (heads, -1))  # (A, H, B, R)
        low_q = low_q.transpose(1, 2) * self.key.scale[:, None]  # (A, B, H, R)
        low_k = torch.cat((self.key.down(features), self.key.down(memory)), 2)  # (A, B, 1 + M, R)
        weights = (scores + (low_q @ low_k.transpose(2, 3)).flatten(0, 1)).softmax(-1)

        summed = weights[:, :, :1] * features + weights[:, :, 1:] @ memory  # (N, H, D)
        attended = summed.transpose(0, 1) @ self.value.weight.unflatten(0, (heads, -1)).transpose(1, 2)  # (H, N, d)
        low_v = torch.cat((self.value.down(features), self.value.down(memory)), 2)  # (A, B, 1 + M, R)
        low_v = weights.unflatten(0, (runs, -1)) @ low_v  # (A, B, H, R)
        if code is not None:
            low_v = low_v + self.value.down_pose(code)[:, :, None]
        low_v = (low_v * self.value.scale[:, None]).transpose(1, 2)  # (A, H, B, R)
        update = (low_v @ self.value.lora_up.unflatten(1, (heads, -1)).transpose(2, 3)).transpose(1, 2)  # (A, B, H, d)
        attended = (attended.transpose(0, 1) + update.flatten(0, 1)).flatten(1) + self.value.bias
        output = self.out(attended[:, None])
        return (output, weights[:, :, None]) if return_attention else output


class StackedProjection(nn.Module):
    """A projection layers of the same sizes: one layer whose every parameter is a stack (A, ...), copied from them."""

    def __init__(self, layers: Sequence[LightweightFaceProjectionLayer]) -> None:
        super().__init__()
        self.count = len(layers)
        self.layer = copy.deepcopy(layers[0])
        for name, parameter in self.layer.named_parameters():
            parameter.data = torch.stack([layer.get_parameter(name).detach() for layer in layers])

    def forward(self, features: Tensor, keypoints_3d: Tensor, source_pose: Tensor) -> Tensor:
        """(A B, D), (A B, K, 3), (A B, 3) to (A B, D)."""
        stacks: dict[str, Tensor] = dict(self.layer.named_parameters())
        parts = [value.unflatten(0, (self.count, -1)) for value in (features, keypoints_3d, source_pose)]
        if features.is_cuda:  # one launch for all, of all voxels
            self.layer.in_turns = False
            return vmap(self._one)(stacks, *parts).flatten(0, 1)
        rows = ({name: stack[i] for name, stack in stacks.items()} for i in range(self.count))
        return torch.cat([self._one(row, *own) for row, *own in zip(rows, *parts, strict=True)])

    def _one(self, parameters: dict[str, Tensor], features: Tensor, keypoints: Tensor, pose: Tensor) -> Tensor:
        return functional_call(self.layer, parameters, (features, keypoints), {"source_pose": pose})


def stack_adapters(models: Sequence[EnhancedTransformerDecoderOnly3D]) -> EnhancedTransformerDecoderOnly3D:
    """A models that differ in their adapters only, as one: (A B, ...) samples to (A B, D) predictions.

    Args:
        models: with LoRA, perhaps with a projection, without cross-view attention; of the same base, whose weights are
            copied from the first. Ranks and scales may differ.

    Returns:
        a model whose trainable parameters are stacks, each (A, ...).
    """
    first = models[0]
    if first.cross_view is not None:
        raise ValueError("cross-view attention is trained one model at a time")
    roles = first.parameter_roles()
    if base := [name for name, p in first.named_parameters() if p.requires_grad and roles[name] == "base"]:
        raise ValueError(f"only adapters are trained together, and {base[0]} is trainable; freeze the base")
    stack = copy.deepcopy(first)
    for block, *originals in zip(stack.blocks, *(model.blocks for model in models), strict=True):
        if block.attention.rank:
            block.attention = StackedAttention([original.attention for original in originals])
        if isinstance(block.linear1, LoRALinearLayer):
            block.linear1 = StackedLoRALinear([original.linear1 for original in originals])
            block.linear2 = StackedLoRALinear([original.linear2 for original in originals])
    if projections := [model.projection for model in models if model.projection is not None]:
        stack.projection = StackedProjection(projections)  # type: ignore[assignment]  # takes what the original takes
    return stack


@torch.no_grad()
def unstack(stack: nn.Module, models: Sequence[nn.Module]) -> None:
    """Write what the adapters have become into models like those that were stacked, to each without the padding."""
    for name, stacked in stack.named_parameters():
        if stacked.requires_grad:
            for row, model in zip(stacked, models, strict=True):
                own = model.get_parameter(name.replace("projection.layer.", "projection."))
                own.copy_(row[tuple(slice(size) for size in own.shape)])


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
