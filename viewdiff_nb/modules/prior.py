"""Prior preservation: adapt a model without losing what its base could do (DreamBooth, arXiv:2208.12242)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from viewdiff_nb.modules.lora import evaluation_mode

Conditions = dict[str, Tensor]


class PriorPreservationLoss(nn.Module):
    """How far a student's predictions s are from its teacher's t; each term is zero when they agree.

        kl      = mean KL(p || q),  p = softmax_j(cos(t, a_j) / T),  q = softmax_j(cos(s, a_j) / T)
        feature = mean (1 - cos(s, t))
        l2      = mean |s - t|^2 / |t|^2
        loss    = w_kl kl + w_feature feature + w_l2 l2

    p and q are distributions over people: which of the anchors a_j is this? kl is in nats.

    Args:
        anchors: (A, D) embeddings of people, any length; None for the teacher's predictions of the batch.
        temperature: T.
        weights: (w_kl, w_feature, w_l2).
    """

    anchors: Tensor | None

    def __init__(
        self, anchors: Tensor | None = None, temperature: float = 0.05, weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature, self.weights = temperature, weights
        unit = None if anchors is None else F.normalize(anchors.float(), dim=-1)
        self.register_buffer("anchors", unit, persistent=False)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of predictions (B, D), without a gradient into the teacher; and its terms, detached: {kl_loss,
        feature_loss, l2_loss}, scalars.
        """
        if student.shape != teacher.shape or student.dim() != 2:
            shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise ValueError(f"student and teacher must both be (B, D), got {shapes}")
        student, teacher = student.float(), teacher.detach().float()
        with torch.autocast(student.device.type, enabled=False):  # would round the unit vectors of a product
            s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
            anchors = t if self.anchors is None else self.anchors
            log_q, log_p = ((x @ anchors.T / self.temperature).log_softmax(-1) for x in (s, t))
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            feature = (1 - (s * t).sum(-1)).mean()
            l2 = ((student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)).mean()
        w_kl, w_feature, w_l2 = self.weights
        loss = w_kl * kl + w_feature * feature + w_l2 * l2
        return loss, {"kl_loss": kl.detach(), "feature_loss": feature.detach(), "l2_loss": l2.detach()}


class PriorPreservationDataset(Dataset):
    """What must not be forgotten: samples {inputs, conditions, outputs}, with the teacher's outputs computed once.

    Args:
        base_model: the teacher, on the device of the samples.
        src: (N, D) side-view embeddings, e.g. of the views that the base was trained on.
        conditions: {angles (N, 3), keypoints_3d (N, 5, 3), pose (N, 3)}.
        batch_size: samples per teacher forward.
    """

    def __init__(self, base_model: nn.Module, src: Tensor, conditions: Conditions, batch_size: int = 1024) -> None:
        if not len(src):
            raise ValueError("the prior set is empty; give the samples whose predictions are to be preserved")
        self.src, self.conditions = src, conditions
        parts = [slice(i, i + batch_size) for i in range(0, len(src), batch_size)]
        outputs = [teacher_outputs(base_model, src[p], {k: v[p] for k, v in conditions.items()}) for p in parts]
        self.outputs = torch.cat(outputs)

    def __len__(self) -> int:
        return len(self.src)

    def __getitem__(self, index: int | slice | Tensor) -> dict[str, Any]:
        conditions = {name: value[index] for name, value in self.conditions.items()}
        return {"inputs": self.src[index], "conditions": conditions, "outputs": self.outputs[index]}

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count,) random rows, with replacement, on the device of the samples."""
        device = self.src.device if generator is None else generator.device
        rows = torch.randint(len(self), (count,), generator=generator, device=device)
        return rows.to(self.src.device, non_blocking=True)


def teacher_outputs(base_model: nn.Module, inputs: Tensor, conditions: Conditions) -> Tensor:
    """The base model's frontal predictions in evaluation mode: (B, D). The model's mode is restored."""
    with evaluation_mode(base_model):
        return base_model(inputs, **conditions, return_residual=False)


class EnhancedTransformerWithPrior(nn.Module):
    """A model in training together with the base that it must not forget, its teacher, which is frozen here.

    loss = task loss + lambda_prior * prior loss, from one forward pass of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        base_model: nn.Module,
        lambda_prior: float = 0.1,
        prior_loss: PriorPreservationLoss | None = None,
    ) -> None:
        super().__init__()
        if lambda_prior < 0:
            raise ValueError(f"lambda_prior must not be negative, got {lambda_prior}")
        self.model, self.base_model, self.lambda_prior = model, base_model.requires_grad_(False).eval(), lambda_prior
        self.prior_loss = prior_loss or PriorPreservationLoss()

    def train(self, mode: bool = True) -> "EnhancedTransformerWithPrior":
        super().train(mode)
        self.base_model.eval()  # a teacher with dropout would not be a fixed function
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def compute_loss(
        self,
        inputs: Tensor,
        conditions: Conditions,
        targets: Tensor,
        original_loss_fn: Callable[[Tensor, Tensor], Tensor],
        prior: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            inputs: (B, D) side-view embeddings.
            conditions: {angles, pose, keypoints_3d}, each (B, ...).
            targets: (B, D) frontal embeddings.
            original_loss_fn: task loss of (predicted frontal embeddings, targets).
            prior: samples of a `PriorPreservationDataset`; None to preserve the base's outputs on inputs.

        Returns:
            the loss, and {total_loss, original_loss, prior_loss, kl_loss, feature_loss, l2_loss}, detached.
        """
        if prior is None:
            predicted = kept = self.model(inputs, **conditions, return_residual=False)
            taught = teacher_outputs(self.base_model, inputs, conditions)
        else:
            both = {name: torch.cat((value, prior["conditions"][name])) for name, value in conditions.items()}
            output = self.model(torch.cat((inputs, prior["inputs"])), **both, return_residual=False)
            predicted, kept, taught = output[: len(inputs)], output[len(inputs) :], prior["outputs"]
        task = original_loss_fn(predicted, targets)
        preserved, terms = self.prior_loss(kept, taught)
        loss = task + self.lambda_prior * preserved
        named = {"total_loss": loss, "original_loss": task, "prior_loss": preserved}
        return loss, {name: value.detach() for name, value in named.items()} | terms
