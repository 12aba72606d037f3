"""How certain a rate is: other people might have been tested, and other seeds might have been trained with.

People are resampled, not views: the views of one person succeed and fail together. A resample draws people with
replacement, and whoever is drawn n times counts n times as a probe and n times as an impostor, so that a pair of
people (i, j) weighs n_i n_j. Leaving the impostors' side as it is would make intervals of TAR at FAR 1e-3 up to
a third too narrow. Rank-k searches the whole gallery in every resample: a person who is not drawn is still there to
be mistaken for.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from ..faces.views import YAW_BINS
from ..metrics import (
    equal_error_rate,
    lowest_level,
    probe_values,
    roc_auc,
    similarity_scores,
    tar_name,
    true_accept_rates,
    unit_embeddings,
    yaw_bin,
    yaw_groups,
)

FARS = (1e-2, 1e-3, 1e-4)
RESAMPLES = 400
NORMAL = stats.norm.ppf(0.975)


@dataclass(frozen=True)
class Estimate:
    """mean ± half: a 95 % interval over people and, where there are several, over seeds. p: of being 0."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def p(self) -> float:
        """Two-sided p-value of the mean being 0."""
        if self.half == 0:
            return float(self.mean == 0)
        return float(2 * stats.norm.sf(abs(self.mean) / self.half * NORMAL))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


def estimate(values: Sequence[float], resampled: Sequence[Sequence[float]]) -> Estimate:
    """A rate, or a paired difference, with the uncertainty of people and of seeds.

    Args:
        values: the rate for each of S seeds.
        resampled: (S, B) the same in B resamples of people, the same resamples for every seed.

    The two parts are independent, so their variances add: 1.96 standard deviations over resamples of the mean over
    seeds, and Student's interval of the mean over seeds. One seed has no such interval: the estimate then holds for
    that one training only.

    >>> str(estimate([0.5, 0.7], [[0.5, 0.5], [0.7, 0.7]]))   # people agree; 12.706 * 0.1414 / sqrt(2)
    '0.600 ± 1.271'
    """
    seeds = torch.tensor(values, dtype=torch.float64)
    over_people = torch.tensor(resampled, dtype=torch.float64).mean(0).std().item()
    over_seeds = 0.0
    if len(seeds) > 1:
        over_seeds = stats.t.ppf(0.975, len(seeds) - 1) * seeds.std().item() / math.sqrt(len(seeds))
    return Estimate(seeds.mean().item(), math.hypot(NORMAL * over_people, over_seeds))


def resampled_people(people: int, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """(B, P) how often each person is drawn in each resample; the same for equal arguments."""
    drawn = torch.randint(people, (resamples, people), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(resamples, people, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def resampled_rates(
    predicted: Tensor, gallery: Tensor, person: Tensor, abs_yaw: Tensor, weights: Tensor, fars: Sequence[float] = FARS
) -> dict[str, dict[str, Tensor]]:
    """The rates of `recognition_by_yaw`, each (B,): once for every resample of people.

    Args:
        predicted, gallery, person, abs_yaw: as there.
        weights: (B, P) of `resampled_people`.

    Needs memory for all M x P comparisons.
    """
    bins, count = yaw_bin(abs_yaw), len(YAW_BINS)
    scores = similarity_scores(predicted, gallery, person, bins, count)
    owner = person * count + bins
    genuine = torch.zeros(len(gallery) * count, scores.genuine_counts.shape[1], dtype=torch.float64)
    genuine.index_put_((owner, scores.level), torch.ones(1).double(), accumulate=True)
    genuine = torch.einsum("bp,pgu->gbu", weights, genuine.view(len(gallery), count, -1)).float()
    impostor = _impostor_counts(predicted, gallery, person, bins, scores.genuine.unique(), weights)  # (G, B, cells)
    total = impostor.sum(0)
    accepted = {tar_name(far): lowest_level(total, far) for far in fars}

    values = probe_values(predicted, gallery, person, scores)
    rates: dict[str, dict[str, Tensor]] = {}
    for name, inside in yaw_groups(abs_yaw).items():
        picked = bins[inside].unique()
        pairs = genuine[picked].sum(0), impostor[picked].sum(0)
        drawn = weights @ torch.bincount(person[inside], minlength=len(gallery)).double()
        rates[name] = {
            rate: weights @ torch.bincount(person[inside], value[inside].double(), minlength=len(gallery)) / drawn
            for rate, value in values.items()
        }
        shares = F.pad(true_accept_rates(pairs[0]), (0, 1))
        rates[name] |= {rate: shares.gather(-1, level[:, None])[:, 0] for rate, level in accepted.items()}
        rates[name] |= {"auc": roc_auc(*pairs), "eer": equal_error_rate(*pairs)}
    return rates


def _impostor_counts(
    predicted: Tensor, gallery: Tensor, person: Tensor, group: Tensor, levels: Tensor, weights: Tensor
) -> Tensor:
    """(G, B, 2 U + 1): weighted numbers of impostor similarities by group and cell (see `metrics.Scores`).

    A sparse matrix counts how often each pair of people falls into each cell; its product with the pairs'
    weights does all resamples at once.
    """
    probes, fronts = unit_embeddings(predicted, gallery)
    people, cells, groups = len(fronts), 2 * len(levels) + 1, len(YAW_BINS)
    similarity = probes @ fronts.T
    cell = torch.searchsorted(levels, similarity) + torch.searchsorted(levels, similarity, right=True)
    cell += group[:, None] * cells
    pair = person[:, None] * people + torch.arange(people)
    impostor = person[:, None] != torch.arange(people)
    where = torch.stack((cell[impostor], pair[impostor]))
    size = groups * cells, people * people
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly)")
        counts = torch.sparse_coo_tensor(where, torch.ones(where.shape[1]), size, check_invariants=False)
        counts = counts.to_sparse_csr()  # its products use all cores
    drawn = weights.float()
    of_pairs = (drawn[:, :, None] * drawn[:, None]).view(len(weights), -1).T  # (P P, B)
    return (counts @ of_pairs).view(groups, cells, -1).transpose(1, 2).contiguous()
