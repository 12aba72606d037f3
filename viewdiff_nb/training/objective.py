"""What a batch costs: the task loss, with mix-up, fused views or prior preservation where the config says so."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..faces.views import FaceViews
from ..modules.prior import EnhancedTransformerWithPrior, PriorPreservationDataset, PriorPreservationLoss
from ..modules.transformer import fuse_views
from .batches import FaceBatch
from .config import TrainConfig
from .losses import LOSSES, mean_loss
from .mixup import mix


class Cost(NamedTuple):
    """loss: what is minimised, a scalar. prior: of it the prior loss, before lambda_prior, detached; or None."""

    loss: Tensor
    prior: Tensor | None


class Objective:
    """The loss of batches in training mode.

    Args:
        config: of the run.
        model: predicts frontal embeddings.
        front: (P, D) frontal embeddings of the training people.
        device: where all of it lies.
        base: the teacher of prior preservation, and
        prior_faces: the views whose base predictions are preserved; None without it.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        front: Tensor,
        device: torch.device,
        base: nn.Module | None = None,
        prior_faces: FaceViews | None = None,
    ) -> None:
        self.config, self.model, self.front, self.device = config, model, front, device
        self.amp_dtype = amp_dtype_for(device) if config.use_amp else None
        self.task = self.prior = None
        if base is not None:
            self.task = EnhancedTransformerWithPrior(model, base, config.lambda_prior, PriorPreservationLoss(front))
            self.prior = PriorPreservationDataset(base, prior_faces.src, prior_faces.conditions())

    def draw(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Rows of the prior samples that go with count samples; None without prior preservation."""
        return None if self.prior is None else self.prior.draw(self.config.prior_count(count), generator)

    def __call__(self, batch: FaceBatch, weight: Tensor | None = None, kept: Tensor | None = None) -> Cost:
        """
        Args:
            batch: of B samples, or of 2 B with
            weight: (B,) of their first half, for mix-up.
            kept: the prior samples' rows, from `draw`.
        """
        partner = None
        if weight is not None:
            batch, partner = mix(batch, weight)
        person = batch.person
        loss_of = partial(mean_loss, LOSSES[self.config.loss], self.front, partner=partner, weight=weight)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            if self.task is not None:
                loss, terms = self.task.compute_loss(batch.src, batch.conditions(), person, loss_of,
                                                     prior=self.prior[kept])  # fmt: skip
                return Cost(loss, terms["prior_loss"])
            predicted = self.model(batch.src, **batch.conditions(), return_residual=False)
            if self.config.use_cross_view:  # several views, one frontal embedding
                predicted, person = fuse_views(predicted, self.config.n_views), person[:: self.config.n_views]
            return Cost(loss_of(predicted, person), None)


def amp_dtype_for(device: torch.device) -> torch.dtype:
    """bfloat16 on CPUs and on GPUs that compute it, float16 otherwise."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16
