"""How well predicted frontal embeddings recognise people.

A cosine alone says little: always predicting the mean face scores high and recognises nobody. So the
identification (rank-1) and verification (TAR at a FAR, AUC) rates stand beside it everywhere.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .faces.views import YAW_BINS

FAR = 1e-3


@dataclass(frozen=True)
class Scores:
    """Similarities of M probes with a gallery of P people, the raw material of every rate.

    genuine: (M,) cosine with the right person.
    impostor: (M, P - 1) cosine with all others.
    """

    genuine: Tensor
    impostor: Tensor


def similarity_scores(predicted: Tensor, gallery: Tensor, person: Tensor) -> Scores:
    """
    Args:
        predicted: (M, D) predicted frontal embeddings, any length.
        gallery: (P, D) frontal embeddings, P >= 2.
        person: (M,) row of the gallery each probe belongs to.

    Raises:
        ValueError: for a gallery of one person, no probe, or values that are not finite.
    """
    if len(gallery) < 2:
        raise ValueError(f"recognition needs a gallery of at least 2 people, got {len(gallery)}")
    if not len(predicted):
        raise ValueError("there is no probe to recognise")
    if not (predicted.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("predicted and gallery embeddings must be finite; look for NaN in the model's weights")
    similarity = F.normalize(predicted.float(), dim=1) @ F.normalize(gallery.float(), dim=1).T
    right = F.one_hot(person, len(gallery)).bool()
    return Scores(similarity[right], similarity[~right].view(len(predicted), -1))


def rank1(scores: Scores) -> Tensor:
    """(M,) bool: is the right person the most similar of the gallery? A tie is a miss."""
    return scores.genuine > scores.impostor.amax(1)


def threshold_at_far(impostor: Tensor, far: float = FAR) -> float:
    """The smallest threshold t such that at most a share far of the impostor scores is > t.

    Raises:
        ValueError: if there are fewer than 1 / far impostor scores.
    """
    count = impostor.numel()
    if not 0 < far < 1 or count * far < 1:
        raise ValueError(f"FAR {far:g} cannot be told from {count} impostor scores; it needs at least 1/FAR")
    allowed = int(count * far)
    return impostor.flatten().topk(allowed + 1).values[-1].item()


def roc_auc(scores: Scores) -> float:
    """P(genuine > impostor) + P(equal) / 2 over all pairs (Mann-Whitney)."""
    impostor = scores.impostor.flatten().sort().values
    below = torch.searchsorted(impostor, scores.genuine, right=False)
    not_above = torch.searchsorted(impostor, scores.genuine, right=True)
    return ((below + not_above).double().mean() / (2 * len(impostor))).item()


def recognition_by_yaw(
    predicted: Tensor, gallery: Tensor, person: Tensor, abs_yaw: Tensor, far: float = FAR
) -> dict[str, dict[str, float]]:
    """Rates over all probes and by |yaw| bin.

    Args:
        predicted, gallery, person: see `similarity_scores`.
        abs_yaw: (M,) |yaw| of the probes' side views in degrees.
        far: false accept rate; its one threshold is set on all impostor pairs and used in every bin.

    Returns:
        {"all" | "0-45" | "45-90" | "0-30" | ...: {rank1, tar, auc, cosine, centred_cosine, mse, views}}.
        centred_cosine is the cosine after subtracting the gallery's mean, which leaves the mean face
        near 0. mse is per dimension between unit embeddings, the guide's validation loss.
    """
    scores = similarity_scores(predicted, gallery, person)
    threshold = threshold_at_far(scores.impostor, far)
    unit, fronts = F.normalize(predicted.float(), dim=1), F.normalize(gallery.float(), dim=1)
    mean = fronts.mean(0)
    rows = {
        "rank1": rank1(scores).float(),
        "tar": (scores.genuine > threshold).float(),
        "cosine": scores.genuine,
        "centred_cosine": F.cosine_similarity(unit - mean, (fronts - mean)[person], dim=1),
        "mse": (unit - fronts[person]).square().mean(1),
    }
    bins = {"all": torch.ones_like(abs_yaw, dtype=torch.bool)}
    last = YAW_BINS[-1][1]
    for low, high in ((0, 45), (45, last), *YAW_BINS):
        inside = (abs_yaw >= low) & ((abs_yaw < high) | (high == last))
        if inside.any():
            bins[f"{low}-{high}"] = inside
    table = {}
    for name, inside in bins.items():
        table[name] = {rate: value[inside].mean().item() for rate, value in rows.items()}
        table[name]["auc"] = roc_auc(Scores(scores.genuine[inside], scores.impostor[inside]))
        table[name]["views"] = int(inside.sum())
    return table
