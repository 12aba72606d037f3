"""How well predicted frontal embeddings recognise people: identification (rank-k) and verification rates.

All rates follow from counts. The thresholds are the distinct genuine similarities, of a probe with its own person. The
impostor similarities, with everybody else, are counted in bins at and between them, a piece of the matrix at a time.

>>> probes, gallery = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.8, 0.6]]), torch.eye(2)
>>> scores = similarity_scores(probes, gallery, person=torch.tensor([0, 1, 1]))  # genuine .8, .8, .6
>>> scores.rank.tolist(), scores.genuine_counts.tolist()  # at .6 and .8
([1, 1, 2], [[1.0, 2.0]])
>>> scores.impostor_counts.tolist()  # below .6, at .6, between, at .8, above
[[0.0, 2.0, 0.0, 1.0, 0.0]]
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from viewdiff_nb.faces.geometry import YAW_BINS

FAR = 1e-3
PIECE = 2**22  # similarities that are held at a time
FOLDS = 10
COUNTS = ("views", "people")  # what `recognition_by_yaw` has beside rates


@dataclass(frozen=True)
class Scores:
    """M probes scored against a gallery; counts are by group (yaw bin), so that those of a union are sums."""

    genuine: Tensor  # (M,) cosine with the right person
    rank: Tensor  # (M,) of the right person, from 1; others that are as similar come before, so a tie is a miss
    thresholds: Tensor  # (U,) the distinct genuine similarities, rising
    genuine_bin: Tensor  # (M,) which of the thresholds each genuine similarity is
    genuine_counts: Tensor  # (G, U) genuine similarities by group and threshold
    impostor_counts: Tensor  # (G, 2 U + 1) impostor similarities by group and bin of `impostor_bins`


class Similarities:
    """Cosines of M probes with P people, piece by piece; the same in every loop over them.

    Equal embeddings have equal cosines, to the last bit: each pair of different embeddings is multiplied once. Two
    columns or rows of a matrix product may round the same sum differently, and would break ties.
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


def unit_embeddings(predicted: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Both scaled to length 1, after the checks of `similarity_scores`."""
    if len(gallery) < 2:
        raise ValueError(f"recognition needs a gallery of at least 2 people, got {len(gallery)}")
    if not len(predicted):
        raise ValueError("there is no probe to recognise")
    if not (predicted.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("predicted and gallery embeddings must be finite; look for NaN in the model's weights")
    # in float64 no length of float32 values overflows or vanishes when squared; in parts, for a gallery of millions
    unit = [[F.normalize(y.double(), dim=1, eps=1e-100).float() for y in x.split(2**16)] for x in (predicted, gallery)]
    return torch.cat(unit[0]), torch.cat(unit[1])


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
    similarities = Similarities(predicted, gallery)
    group = torch.zeros_like(person) if group is None else group
    genuine, rank = torch.empty(person.shape, device=person.device), torch.empty_like(person)
    for rows, similarity in similarities:
        genuine[rows] = similarity.gather(1, person[rows, None])[:, 0]
        rank[rows] = (similarity >= genuine[rows, None]).sum(1)  # the right person is one of these
    thresholds, genuine_bin = genuine.unique(return_inverse=True)
    counts = torch.bincount(group * len(thresholds) + genuine_bin, minlength=groups * len(thresholds)).double()
    bins = 2 * len(thresholds) + 1
    impostors = torch.zeros(groups * bins, dtype=torch.float64, device=genuine.device)
    for rows, similarity in similarities:
        is_impostor = person[rows, None] != torch.arange(len(gallery), device=person.device)
        found = impostor_bins(thresholds, similarity) + group[rows, None] * bins
        impostors += torch.bincount(found[is_impostor], minlength=len(impostors))
    return Scores(genuine, rank, thresholds, genuine_bin, counts.view(groups, -1), impostors.view(groups, -1))


def impostor_bins(thresholds: Tensor, similarity: Tensor) -> Tensor:
    """The bin of each similarity: 2 u + 1 if it is threshold u, 2 u if it lies below that and above the one before."""
    return torch.searchsorted(thresholds, similarity) + torch.searchsorted(thresholds, similarity, right=True)


def accept_rates(counts: Tensor) -> Tensor:
    """(..., K) counts by bin to (..., K + 1): the share in bin k or above; 0 in the end, above all bins.

    Of impostors, every second one, `[..., 1::2]`, is the false accept rate at a threshold.
    """
    reached = counts.flip(-1).cumsum(-1).flip(-1)
    return F.pad(reached / reached[..., :1], (0, 1))


def lowest_threshold(impostor_counts: Tensor, far: float = FAR) -> Tensor:
    """(..., 2 U + 1) to (...): number of the lowest threshold that accepts at most a share far of the impostors.

    It is U if even the highest accepts more. Of fewer than 1 / far impostors none may be accepted.
    """
    if not 0 < far < 1:
        raise ValueError(f"a false accept rate lies between 0 and 1, got {far:g}")
    return (accept_rates(impostor_counts)[..., 1::2] > far).sum(-1)


def can_tell(impostors: Tensor | float, far: float = FAR) -> Tensor | bool:
    """Whether there are enough impostor similarities to measure a false accept rate of far: at least 1 / far."""
    return impostors * far >= 1


def tar_at_far(genuine_counts: Tensor, impostor_counts: Tensor, far: float = FAR) -> Tensor:
    """(...): share of genuine similarities that `lowest_threshold` accepts; NaN for fewer than 1 / far impostors."""
    rates = accept_rates(genuine_counts).gather(-1, lowest_threshold(impostor_counts, far)[..., None])[..., 0]
    return rates.masked_fill(~torch.as_tensor(can_tell(impostor_counts.sum(-1), far)), math.nan)


def roc_auc(genuine_counts: Tensor, impostor_counts: Tensor) -> Tensor:
    """(...): P(genuine > impostor) + P(equal) / 2 over all pairs (Mann-Whitney)."""
    above = accept_rates(genuine_counts)  # (..., U + 1): what beats an impostor just below threshold u
    beaten = torch.empty_like(impostor_counts)
    beaten[..., 0::2] = above
    beaten[..., 1::2] = (above[..., :-1] + above[..., 1:]) / 2  # at threshold u: half of what is equal
    return (impostor_counts * beaten).sum(-1) / impostor_counts.sum(-1)


def equal_error_rate(genuine_counts: Tensor, impostor_counts: Tensor) -> Tensor:
    """(...): the smallest rate that neither false accepts nor false rejects exceed, over all thresholds."""
    return torch.maximum(accept_rates(impostor_counts)[..., 1::2], 1 - accept_rates(genuine_counts)).amin(-1)


def verification_hits(predicted: Tensor, gallery: Tensor, person: Tensor, seed: int = 0) -> Tensor:
    """(M,) share of right decisions on each probe's two pairs: with its own front, and with a random other one.

    As InsightFace does it (recognition/arcface_torch/eval/verification.py): as many genuine as impostor pairs, ten
    folds, in each the threshold with the best accuracy on the other nine. Folds hold different people. NaN if all
    probes fall into one fold, which leaves nothing to set a threshold on.
    """
    probes, fronts = unit_embeddings(predicted, gallery)
    people, device, generator = len(fronts), person.device, torch.Generator().manual_seed(seed)
    other = (person + torch.randint(1, people, (len(person),), generator=generator).to(device)) % people
    fold = (torch.randperm(people, generator=generator).to(device) % FOLDS)[person]
    genuine, impostor = (probes * fronts[person]).sum(1), (probes * fronts[other]).sum(1)
    similarity = torch.cat((genuine, impostor))
    is_genuine = torch.arange(len(similarity), device=device) < len(genuine)
    return fold_hits(similarity, is_genuine, fold.repeat(2)).view(2, -1).mean(0)


def fold_hits(similarity: Tensor, same: Tensor, fold: Tensor) -> Tensor:
    """(N,) 1.0 where a pair is decided right, by the threshold with the best accuracy on the pairs of the other folds.

    NaN for pairs without another fold, or one without a pair of the same person: there is nothing to set it on.

    Args:
        similarity, same, fold: (N,) each, whether the pair is of the same person, and its fold.
    """
    hits = torch.full_like(similarity, math.nan)
    for i in fold.unique():
        held_out, rest = fold == i, fold != i
        if (rest & same).any():
            thresholds = similarity[rest & same].sort().values
            refused = torch.searchsorted(similarity[rest & ~same].sort().values, thresholds)
            accepted = torch.arange(len(thresholds), 0, -1, device=fold.device)
            best = thresholds[(accepted + refused).argmax()]
            hits[held_out] = ((similarity[held_out] >= best) == same[held_out]).to(hits.dtype)
    return hits


def pair_counts(similarity: Tensor, same: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(W, U) genuine and (W, 2 U + 1) impostor similarities of pairs by bin, as in `Scores`, for W ways to count them.

    Args:
        similarity, same: (N,) each.
        weight: (N, W) how often a pair counts: one column a group or a resample; None counts each once.

    >>> pairs = torch.tensor([0.9, 0.5, 0.7]), torch.tensor([True, True, False])
    >>> roc_auc(*pair_counts(*pairs)).item()   # .9 beats the impostor's .7, .5 does not
    0.5
    """
    weight = torch.ones(len(same), 1, device=same.device) if weight is None else weight
    thresholds, genuine_bin = similarity[same].unique(return_inverse=True)
    counts = []
    for kind, bins, found in (
        (same, len(thresholds), genuine_bin),
        (~same, 2 * len(thresholds) + 1, impostor_bins(thresholds, similarity[~same])),
    ):
        count = torch.zeros(bins, weight.shape[1], dtype=torch.float64, device=weight.device)
        counts.append(count.index_add_(0, found, weight[kind].double()).T)
    return counts[0], counts[1]


def yaw_bin(abs_yaw: Tensor) -> Tensor:
    """(M,) number of the bin of `YAW_BINS` that each probe is in; beyond its end the last."""
    edges = torch.tensor([low for low, _ in YAW_BINS[1:]], device=abs_yaw.device, dtype=abs_yaw.dtype)
    return torch.bucketize(abs_yaw, edges, right=True)


def yaw_groups(bins: Tensor) -> Iterator[tuple[str, list[int], Tensor]]:
    """Name ("all", "0-45", "45-90", "0-30", ...), numbers of `YAW_BINS`, and mask (M,) of each group with probes."""
    last = YAW_BINS[-1][1]
    for low, high in ((0, last), (0, 45), (45, last), *YAW_BINS):
        picked = [i for i, (start, end) in enumerate(YAW_BINS) if low <= start and end <= high]
        inside = torch.isin(bins, torch.tensor(picked, device=bins.device))
        if inside.any():
            yield "all" if len(picked) == len(YAW_BINS) else f"{low}-{high}", picked, inside


def probe_values(predicted: Tensor, gallery: Tensor, person: Tensor, scores: Scores) -> dict[str, Tensor]:
    """Everything that is a mean over probes, (M,) each.

    centred_cosine: after subtracting the gallery's mean; always predicting the mean face has a high cosine, and 0 here.
    mse: per dimension between unit embeddings, the guide's validation loss.
    """
    unit, fronts = unit_embeddings(predicted, gallery)
    mean = fronts.mean(0)
    return {
        "rank1": (scores.rank <= 1).float(),
        "rank5": (scores.rank <= 5).float(),
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
        {name of `yaw_groups`: those of `probe_values`, auc, eer, a tar for each of fars (NaN for fewer than 1 / FAR
        impostor pairs), and `COUNTS`: views, and people whose views these are}.
    """
    bins = yaw_bin(abs_yaw)
    scores = similarity_scores(predicted, gallery, person, bins, len(YAW_BINS))
    values = probe_values(predicted, gallery, person, scores)
    impostors = scores.impostor_counts.sum(0)
    for far in fars:
        accepted = (scores.genuine_bin >= lowest_threshold(impostors, far)).float()
        values[tar_name(far)] = accepted if can_tell(impostors.sum(), far) else accepted * math.nan
    table = {}
    for name, picked, inside in yaw_groups(bins):
        counts = scores.genuine_counts[picked].sum(0), scores.impostor_counts[picked].sum(0)
        table[name] = {rate: value[inside].mean().item() for rate, value in values.items()}
        table[name] |= {"auc": roc_auc(*counts).item(), "eer": equal_error_rate(*counts).item()}
        table[name] |= {"views": int(inside.sum()), "people": len(person[inside].unique())}
    return table
