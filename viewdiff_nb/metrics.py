"""How well predicted frontal embeddings recognise people.

A cosine alone says little: always predicting the mean face scores high and recognises nobody. So the
identification (rank-k) and verification (TAR at a FAR, AUC, EER, accuracy) rates stand beside it everywhere.

All rates follow from comparisons of impostor with genuine similarities, so the similarities of a large
gallery are counted in pieces and never held as one matrix.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from viewdiff_nb.faces.geometry import YAW_BINS

FAR = 1e-3
PIECE = 2**22  # similarities that exist at a time
FOLDS = 10
COUNTS = ("views", "people")  # what `recognition_by_yaw` has beside rates


class NotFiniteError(ValueError):
    """Embeddings that hold NaN or infinity cannot be compared."""


@dataclass(frozen=True)
class Scores:
    """What a set of M probes scored against a gallery of P people; the raw material of every rate.

    Genuine similarities (a probe with its own person) define U levels l_0 < l_1 < ..., each impostor
    similarity falls into one of 2 U + 1 cells: below l_0, at l_0, between l_0 and l_1, ..., above the last.
    Probes are counted by group (yaw bins, people), so rates of any union of groups follow from sums.

    genuine: (M,) cosine with the right person.
    place: (M,) how many others are at least as similar; 0 is recognised at rank 1, and a tie is a miss.
    genuine_counts: (G, U) genuine similarities by group and level.
    impostor_counts: (G, 2 U + 1) impostor similarities by group and cell.
    level: (M,) the level of each genuine similarity.
    """

    genuine: Tensor
    place: Tensor
    genuine_counts: Tensor
    impostor_counts: Tensor
    level: Tensor


class Similarities:
    """Cosines of M probes with P people, piece by piece; the same in every loop over them.

    Equal embeddings have equal cosines, to the last bit, wherever they stand: each pair of different embeddings is
    multiplied once. Two columns or rows of a matrix product may round the same sum differently, and would break ties.
    """

    def __init__(self, predicted: Tensor, gallery: Tensor) -> None:
        probes, fronts = unit_embeddings(predicted, gallery)
        self.probes, self.of_probe = probes.unique(dim=0, return_inverse=True)
        self.fronts, self.of_person = fronts.unique(dim=0, return_inverse=True)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of some probes (R,), and their cosines (R, P); every probe comes once."""
        size = max(1, PIECE // len(self.of_person))
        for start in range(0, len(self.probes), size):
            cosines = self.probes[start : start + size] @ self.fronts.T
            inside = (self.of_probe >= start) & (self.of_probe < start + size)
            for rows in inside.nonzero()[:, 0].split(size):
                yield rows, cosines[self.of_probe[rows] - start][:, self.of_person]


def similarity_scores(
    predicted: Tensor, gallery: Tensor, person: Tensor, group: Tensor | None = None, groups: int = 1
) -> Scores:
    """
    Args:
        predicted: (M, D) predicted frontal embeddings, any length.
        gallery: (P, D) frontal embeddings, P >= 2.
        person: (M,) row of the gallery each probe belongs to.
        group: (M,) int64 below groups; all probes in one group if None.

    Raises:
        ValueError: for a gallery of one person, no probe, or values that are not finite.
    """
    pairs = Similarities(predicted, gallery)
    group = torch.zeros_like(person) if group is None else group
    genuine = torch.empty(person.shape, device=person.device)
    for rows, similarity in pairs:
        genuine[rows] = similarity.gather(1, person[rows, None])[:, 0]
    levels, level = genuine.unique(return_inverse=True)
    cells = 2 * len(levels) + 1
    counts = torch.zeros(groups * cells, dtype=torch.float64, device=genuine.device)
    place = torch.empty_like(person)
    for rows, similarity in pairs:
        place[rows] = (similarity >= genuine[rows, None]).sum(1) - 1
        own = person[rows, None] == torch.arange(len(gallery), device=person.device)
        cell = level_cells(levels, similarity) + group[rows, None] * cells
        counts += torch.bincount(cell[~own], minlength=len(counts))
    of_level = torch.bincount(group * len(levels) + level, minlength=groups * len(levels)).double()
    return Scores(genuine, place, of_level.view(groups, -1), counts.view(groups, -1), level)


def level_cells(levels: Tensor, similarity: Tensor) -> Tensor:
    """The cell of each similarity among levels (U,), see `Scores`."""
    return torch.searchsorted(levels, similarity) + torch.searchsorted(levels, similarity, right=True)


def unit_embeddings(predicted: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Both scaled to length 1, after the checks of `similarity_scores`."""
    if len(gallery) < 2:
        raise ValueError(f"recognition needs a gallery of at least 2 people, got {len(gallery)}")
    if not len(predicted):
        raise ValueError("there is no probe to recognise")
    if not (predicted.isfinite().all() and gallery.isfinite().all()):
        raise NotFiniteError("predicted and gallery embeddings must be finite; look for NaN in the model's weights")
    # in float64 no length of float32 values overflows or vanishes when squared
    probes, fronts = (F.normalize(x.double(), dim=1, eps=1e-100).float() for x in (predicted, gallery))
    return probes, fronts


def rank_rate(scores: Scores, k: int = 1) -> float:
    """Share of probes whose right person is among the k most similar of the gallery."""
    return (scores.place < k).float().mean().item()


def false_accept_rates(impostor_counts: Tensor) -> Tensor:
    """(..., 2 U + 1) to (..., U): the share of impostors that are accepted from level u on."""
    reached = impostor_counts.flip(-1).cumsum(-1).flip(-1)  # in this cell or above
    return reached[..., 1::2] / reached[..., :1]


def true_accept_rates(genuine_counts: Tensor) -> Tensor:
    """(..., U) to (..., U): the share of genuine similarities that are accepted from level u on."""
    reached = genuine_counts.flip(-1).cumsum(-1).flip(-1)
    return reached / reached[..., :1]


def lowest_level(impostor_counts: Tensor, far: float = FAR) -> Tensor:
    """(..., 2 U + 1) to (...): the lowest level from which on at most a share far of the impostors is accepted.

    It is U if even the highest level accepts more. Of fewer than 1 / far impostors none may be accepted.
    """
    if not 0 < far < 1:
        raise ValueError(f"a false accept rate lies between 0 and 1, got {far:g}")
    return (false_accept_rates(impostor_counts) > far).sum(-1)


def can_tell(impostors: Tensor | float, far: float = FAR) -> Tensor | bool:
    """Whether so many impostor similarities tell a false accept rate of far; it takes 1 / far of them."""
    return impostors * far >= 1


def tar_at_far(genuine_counts: Tensor, impostor_counts: Tensor, far: float = FAR) -> Tensor:
    """(...): share of genuine similarities above the threshold that accepts at most a share far of the impostors.

    NaN where there are fewer than 1 / far impostors, from whom such a threshold cannot be told.
    """
    rates = F.pad(true_accept_rates(genuine_counts), (0, 1))  # beyond the highest level nobody
    rates = rates.gather(-1, lowest_level(impostor_counts, far)[..., None])[..., 0]
    return rates.masked_fill(~can_tell(impostor_counts.sum(-1), far), math.nan)


def roc_auc(genuine_counts: Tensor, impostor_counts: Tensor) -> Tensor:
    """(...): P(genuine > impostor) + P(equal) / 2 over all pairs (Mann-Whitney)."""
    at_or_above = F.pad(true_accept_rates(genuine_counts), (0, 1))  # (..., U + 1), 0 above the last level
    # an impostor below level u is beaten by what is at u or above; at level u by that above u, and half of that at u
    between, equal = at_or_above, (at_or_above[..., :-1] + at_or_above[..., 1:]) / 2
    beaten = torch.empty_like(impostor_counts)
    beaten[..., 0::2], beaten[..., 1::2] = between, equal
    return (impostor_counts * beaten).sum(-1) / impostor_counts.sum(-1)


def equal_error_rate(genuine_counts: Tensor, impostor_counts: Tensor) -> Tensor:
    """(...): the smallest rate that neither false accepts nor false rejects exceed, over all thresholds."""
    rejected = 1 - true_accept_rates(genuine_counts)
    return torch.maximum(false_accept_rates(impostor_counts), rejected).amin(-1)


def verification_hits(predicted: Tensor, gallery: Tensor, person: Tensor, seed: int = 0) -> Tensor:
    """(M,) share of right decisions on each probe's two pairs: with its own front, and with a random other one.

    As InsightFace does it (recognition/arcface_torch/eval/verification.py): as many genuine as impostor pairs,
    ten folds, in each the threshold with the best accuracy on the other nine. Folds hold different people. NaN if all
    probes fall into one fold, which leaves nothing to set a threshold on.
    """
    probes, fronts = unit_embeddings(predicted, gallery)
    people = len(fronts)
    generator = torch.Generator().manual_seed(seed)
    other = (person + torch.randint(1, people, (len(person),), generator=generator).to(person.device)) % people
    fold = (torch.randperm(people, generator=generator).to(person.device) % FOLDS)[person]
    genuine, impostor = (probes * fronts[person]).sum(1), (probes * fronts[other]).sum(1)
    hits = torch.empty_like(genuine)
    for i in fold.unique():
        held_out = fold == i
        if held_out.all():
            return hits.fill_(math.nan)
        threshold = _best_threshold(genuine[~held_out], impostor[~held_out])
        right = (genuine[held_out] >= threshold).float() + (impostor[held_out] < threshold).float()
        hits[held_out] = right / 2
    return hits


def _best_threshold(genuine: Tensor, impostor: Tensor) -> Tensor:
    """The genuine score from which on accepting is right most often."""
    levels = genuine.sort().values
    accepted = torch.arange(len(levels), 0, -1, device=levels.device)
    refused = torch.searchsorted(impostor.sort().values, levels)
    return levels[(accepted + refused).argmax()]


def yaw_groups(abs_yaw: Tensor) -> dict[str, Tensor]:
    """Masks (M,) of the probes: "all", "0-45", "45-90" and every bin of `YAW_BINS` that has probes."""
    last = YAW_BINS[-1][1]
    groups = {"all": torch.ones_like(abs_yaw, dtype=torch.bool)}
    for low, high in ((0, 45), (45, last), *YAW_BINS):
        inside = (abs_yaw >= low) & ((abs_yaw < high) | (high == last))
        if inside.any():
            groups[f"{low}-{high}"] = inside
    return groups


def yaw_bin(abs_yaw: Tensor) -> Tensor:
    """(M,) number of the bin of `YAW_BINS` that each probe is in; beyond its end the last."""
    edges = torch.tensor([low for low, _ in YAW_BINS[1:]], device=abs_yaw.device, dtype=abs_yaw.dtype)
    return torch.bucketize(abs_yaw, edges, right=True)


def probe_values(predicted: Tensor, gallery: Tensor, person: Tensor, scores: Scores) -> dict[str, Tensor]:
    """Everything that is a mean over probes, (M,) each: rank1, rank5, accuracy, cosine, centred_cosine, mse.

    centred_cosine is the cosine after subtracting the gallery's mean, which leaves the mean face near 0.
    mse is per dimension between unit embeddings, the guide's validation loss.
    """
    unit, fronts = unit_embeddings(predicted, gallery)
    mean = fronts.mean(0)
    return {
        "rank1": (scores.place < 1).float(),
        "rank5": (scores.place < 5).float(),
        "accuracy": verification_hits(predicted, gallery, person),
        "cosine": scores.genuine,
        "centred_cosine": F.cosine_similarity(unit - mean, (fronts - mean)[person], dim=1),
        "mse": (unit - fronts[person]).square().mean(1),
    }


def tar_name(far: float) -> str:
    """The name of TAR at a FAR in tables: "tar" at `FAR`, else e.g. "tar@1e-4"."""
    return "tar" if far == FAR else f"tar@{far:.0e}".replace("e-0", "e-")


def recognition_by_yaw(
    predicted: Tensor, gallery: Tensor, person: Tensor, abs_yaw: Tensor, fars: tuple[float, ...] = (FAR,)
) -> dict[str, dict[str, float]]:
    """Rates over all probes and by |yaw| bin.

    Args:
        predicted, gallery, person: see `similarity_scores`.
        abs_yaw: (M,) |yaw| of the probes' side views in degrees.
        fars: false accept rates; the threshold of each is set on all impostor pairs and used in every bin.

    Returns:
        {"all" | "0-45" | "45-90" | "0-30" | ...: {those of `probe_values`, auc, eer, a tar for each of fars; and
        `COUNTS`: views, and people whose views these are}}. A tar is NaN if there are fewer than 1 / FAR impostor
        pairs, and accuracy where `verification_hits` says so.
    """
    bins = yaw_bin(abs_yaw)
    scores = similarity_scores(predicted, gallery, person, bins, len(YAW_BINS))
    values = probe_values(predicted, gallery, person, scores)
    total = scores.impostor_counts.sum(0)
    for far in fars:
        accepted = (scores.level >= lowest_level(total, far)).float()
        values[tar_name(far)] = accepted if can_tell(total.sum(), far) else accepted.fill_(math.nan)
    table = {}
    for name, inside in yaw_groups(abs_yaw).items():
        picked = bins[inside].unique()
        pairs = scores.genuine_counts[picked].sum(0), scores.impostor_counts[picked].sum(0)
        table[name] = {rate: value[inside].mean().item() for rate, value in values.items()}
        table[name] |= {"auc": roc_auc(*pairs).item(), "eer": equal_error_rate(*pairs).item()}
        table[name] |= {"views": int(inside.sum()), "people": len(person[inside].unique())}
    return table
