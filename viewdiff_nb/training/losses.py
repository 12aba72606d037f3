"""Task losses between predicted and true frontal embeddings, one value per sample.

Which one recognises people best was measured on validation people; see docs/recipe.md.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
TEMPERATURE = 0.05  # of the softmax over people; cosines differ by a few tenths
MARGIN = 0.1  # of the cosine


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
    cosines = _cosines(predicted, gallery)
    cosines = cosines - MARGIN * F.one_hot(person, len(gallery))
    return F.cross_entropy(cosines / TEMPERATURE, person, reduction="none")


def two_way(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """identity, plus the way back: telling for each sample's front which prediction of the batch is its own.

    The way back makes similarities comparable between gallery people, which one threshold for all needs.
    Both directions as in CLIP (Radford et al. 2021, arXiv:2103.00020); other predictions of the same person
    count neither as right nor as wrong.
    """
    scaled = _cosines(predicted, gallery) / TEMPERATURE  # (B, P)
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
    if partner is not None:
        values = torch.lerp(loss(predicted, gallery, partner), values, weight)
    return values.mean()


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
