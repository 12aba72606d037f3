"""What is minimised, and how: losses of predicted frontal embeddings (docs/recipe.md compares them), and AdamW."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.modules.prior import EnhancedTransformerWithPrior, PriorPreservationDataset, PriorPreservationLoss
from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D, fuse_views
from viewdiff_nb.training.batches import FaceBatch, mix
from viewdiff_nb.training.config import PRIOR_TERMS, TrainConfig

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
TEMPERATURE = 0.05  # of the softmax over people; cosines differ by a few tenths
MARGIN = 0.1  # of the cosine
FINAL_LR = 0.01  # of the learning rate, at the end of the cosine


def mse(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """The guide's loss: mean squared error per dimension."""
    return (predicted - gallery[person]).square().mean(-1)


def cosine(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """1 - cos. Alone it draws predictions toward the mean face."""
    return 1 - F.cosine_similarity(predicted, gallery[person], dim=-1)


def identity(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """Cross-entropy of telling the person among all training people: softmax_p(cos(predicted, front_p) / T)."""
    return F.cross_entropy(_cosines(predicted, gallery) / TEMPERATURE, person, reduction="none")


def identity_cosine(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """identity + 0.2 cosine."""
    return identity(predicted, gallery, person) + 0.2 * cosine(predicted, gallery, person)


def identity_margin(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """identity, the right person's cosine lowered by a margin (CosFace, Wang et al. 2018, arXiv:1801.09414, eq. 4)."""
    cosines = _cosines(predicted, gallery) - MARGIN * F.one_hot(person, len(gallery))
    return F.cross_entropy(cosines / TEMPERATURE, person, reduction="none")


def two_way(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """identity, plus the way back: telling for each sample's front which prediction of the batch is its own.

    The way back makes similarities comparable between people, which one threshold for all needs. Both directions as in
    CLIP (Radford et al. 2021, arXiv:2103.00020); other predictions of the same person count neither way. Memory and
    time grow with the square of the batch, and with the batch alone where it has more samples than there are people.
    """
    scaled = _cosines(predicted, gallery) / TEMPERATURE  # (B, P)
    if len(person) > len(gallery):  # samples of a person are told from the same predictions: once a person is enough
        own = person[:, None] == torch.arange(len(gallery), device=person.device)
        others = scaled.masked_fill(own, torch.finfo(scaled.dtype).min / 2).logsumexp(0)  # (P,)
        mine = scaled.gather(1, person[:, None])[:, 0]
        right = mine - torch.logaddexp(mine, others[person])
    else:
        back = scaled[:, person].T  # (B, B): the front of sample i against prediction j
        right = back.diagonal() - back.masked_fill(_partners(person), -float("inf")).logsumexp(1)
    return F.cross_entropy(scaled, person, reduction="none") - right


def two_way_pairs(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """two-way + 0.5 times telling, for each prediction, which others of the batch are of the same person.

    Khosla et al. 2020, arXiv:2004.11362, eq. 2. Needs batches with several views of a person (paired_views).
    """
    scaled = _cosines(predicted, predicted.to(gallery.dtype)) / TEMPERATURE
    itself = torch.eye(len(person), dtype=torch.bool, device=person.device)
    log_share = scaled - scaled.masked_fill(itself, -float("inf")).logsumexp(1, keepdim=True)
    partners = _partners(person)
    pairs = -(log_share * partners).sum(1) / partners.sum(1).clamp_min(1)
    return two_way(predicted, gallery, person) + 0.5 * pairs


def _partners(person: Tensor) -> Tensor:
    """(B, B) bool: which other samples of the batch are of the same person."""
    return (person[:, None] == person) & ~torch.eye(len(person), dtype=torch.bool, device=person.device)


def _cosines(predicted: Tensor, gallery: Tensor) -> Tensor:
    """In the gallery's dtype, within autocast too: a cosine in bfloat16, divided by `TEMPERATURE`, is off by .1."""
    with torch.autocast(predicted.device.type, enabled=False):
        return F.normalize(predicted.to(gallery.dtype), dim=-1) @ F.normalize(gallery, dim=-1).T


LOSSES: dict[str, Loss] = {
    "mse": mse,
    "cosine": cosine,
    "identity": identity,
    "identity+cosine": identity_cosine,
    "identity+margin": identity_margin,
    "two-way": two_way,
    "two-way+pairs": two_way_pairs,
}
"""Each takes predicted (B, D), the training people's frontal embeddings (P, D) and person (B,), and returns (B,)."""


def mean_loss(
    loss: Loss,
    gallery: Tensor,
    predicted: Tensor,
    person: Tensor,
    partner: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean of a loss over a batch; with mix-up, of weight * loss(person) + (1 - weight) * loss(partner)."""
    predicted = predicted.float()
    values = loss(predicted, gallery, person)
    if partner is not None and weight is not None:
        values = torch.lerp(loss(predicted, gallery, partner), values, weight)
    return values.mean()


class Cost(NamedTuple):
    """loss: what is minimised, a scalar. prior: of it the prior loss, before lambda_prior, detached; 0 without."""

    loss: Tensor
    prior: Tensor


class Objective:
    """The loss of batches in training mode: the task loss, with mix-up, fused views or prior preservation.

    Args:
        model: predicts frontal embeddings.
        front: (P, D) frontal embeddings of the training people, on the device.
        base: the teacher of prior preservation; None without it.
        prior_faces: the views whose base predictions are preserved.
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
        if base is not None and prior_faces is not None:
            weights = tuple(float(term in config.prior_terms) for term in PRIOR_TERMS)
            prior_loss = PriorPreservationLoss(front, weights=weights)
            self.task = EnhancedTransformerWithPrior(model, base, config.lambda_prior, prior_loss)
            src, conditions = prior_faces.src, prior_faces.conditions()
            self.prior = PriorPreservationDataset(base, src, conditions)  # type: ignore[arg-type] # rows on disk serve, too

    def draw(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Rows of the prior samples that go with count samples; None without prior preservation."""
        return None if self.prior is None else self.prior.draw(self.config.prior_count(count), generator)

    def __call__(self, batch: FaceBatch, weight: Tensor | None = None, kept: Tensor | None = None) -> Cost:
        """
        Args:
            batch: of B samples, or for mix-up of 2 B.
            weight: (B,) of the first half, for mix-up.
            kept: the prior samples' rows, from `draw`.
        """
        partner = None
        if weight is not None:
            batch, partner = mix(batch, weight)
        person, conditions = batch.person, batch.conditions()
        loss_of = partial(mean_loss, LOSSES[self.config.loss], self.front, partner=partner, weight=weight)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            if self.task is not None and self.prior is not None and kept is not None:
                loss, terms = self.task.compute_loss(batch.src, conditions, person, loss_of, prior=self.prior[kept])
                return Cost(loss, terms["prior_loss"])
            predicted = self.model(batch.src, **conditions, return_residual=False)
            if self.config.use_cross_view:  # several views, one frontal embedding
                predicted, person = fuse_views(predicted, self.config.n_views), person[:: self.config.n_views]
            loss = loss_of(predicted, person)
            return Cost(loss, torch.zeros_like(loss))


def compiled(objective: Objective) -> Callable[..., Cost]:
    """An objective as torch.compile makes it; with a warning as it is, where that fails."""
    from torch._dynamo.exc import TorchDynamoException

    torch.compiler.reset()  # the same code of earlier runs counts toward a limit, beyond which nothing is compiled
    program = torch.compile(objective.__call__, dynamic=False)

    def call(*arguments: Any) -> Cost:
        nonlocal program
        try:
            return program(*arguments)
        except TorchDynamoException as error:
            cause = str(error).partition("\n")[0]
            warnings.warn(f"use_compile: torch.compile failed, so the step runs as it is ({cause})", stacklevel=2)
            program = objective
            return program(*arguments)

    return call


def amp_dtype_for(device: torch.device) -> torch.dtype:
    """bfloat16 on CPUs and on GPUs that compute it, float16 otherwise."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with one group per role: LoRA and projection at lora_lr, base and cross-view attention at lr."""
    if isinstance(model, EnhancedTransformerDecoderOnly3D):
        roles = model.parameter_groups()
    else:
        roles = {"base": [p for p in model.parameters() if p.requires_grad]}
    if not roles:
        raise ValueError("the model has no trainable parameter: its base is frozen and nothing was added")
    rates = dict.fromkeys(roles, config.lr) | {"lora": config.lora_lr, "projection": config.lora_lr}
    groups = [{"params": params, "lr": rates[role], "role": role} for role, params in roles.items()]
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


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Learning rates, one a group; written into tensors where a CUDA graph reads them."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
