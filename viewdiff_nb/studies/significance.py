"""How certain a rate is: other people might have been tested, and other seeds might have been trained with.

People are resampled, not views: the views of one person succeed and fail together. A resample draws people with
replacement, and whoever is drawn n times counts n times as a probe and n times as an impostor, so that a pair of
people (i, j) weighs n_i n_j. Leaving the impostors' side as it is would make intervals of TAR at FAR 1e-3 up to
a third too narrow. Rank-k searches the whole gallery in every resample.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from scipy import optimize, stats
from torch import Tensor

from viewdiff_nb import metrics
from viewdiff_nb.faces.geometry import YAW_BINS
from viewdiff_nb.files import FAST

FARS = (1e-2, 1e-3, 1e-4)
RESAMPLES = 100 if FAST else 400  # of people
LEVEL = 0.05  # of intervals and of what is told apart
FEWEST_PEOPLE = 5  # for an interval over people; four can be resampled in 35 ways only
Key = TypeVar("Key")


@dataclass(frozen=True)
class Estimate:
    """A mean, and its standard errors over people and over seeds.

    The two are independent, so their intervals add like vectors: half = hypot(Student's quantile times people_error,
    Student's quantile times seeds_error), the method of variance estimates recovery (Zou & Donner 2008, Statistics in
    Medicine 27:1693). An error is NaN if there are too few people or seeds to tell it.
    """

    mean: float
    people_error: float = 0.0
    seeds_error: float = 0.0
    people: float = math.inf
    seeds: int = 1

    @property
    def half(self) -> float:
        """Half of the 95 % interval; NaN if there is none."""
        return self._half(LEVEL)

    @property
    def bound(self) -> float:
        """half; of a rate of 0 or 1 that nobody differs in how far Clopper & Pearson's bound is away."""
        degenerate = self.half == 0 and self.mean in (0, 1) and math.isfinite(self.people)
        return 1 - (LEVEL / 2) ** (1 / self.people) if degenerate else self.half

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def p(self) -> float:
        """Two-sided p-value of the mean being 0; NaN if there is no interval, or no spread to judge by.

        The level whose interval just touches 0, so p < .05 if and only if the 95 % interval excludes 0.
        """
        if math.isnan(self.half) or self.half == 0 != self.mean:
            return math.nan
        least = math.log(1e-300)

        def reaches_beyond_0(log_level: float) -> float:
            return self._half(math.exp(log_level)) - abs(self.mean)

        if reaches_beyond_0(0.0) >= 0:  # a mean of 0; some versions of SciPy round the quantile there
            return 1.0
        return 0.0 if reaches_beyond_0(least) < 0 else math.exp(optimize.brentq(reaches_beyond_0, least, 0.0))

    def _half(self, level: float) -> float:
        parts = ((self.people_error, self.people), (self.seeds_error, self.seeds))
        return math.hypot(*(error * stats.t.isf(level / 2, n - 1) if error else 0.0 for error, n in parts))

    def __str__(self) -> str:
        """A rate: three digits; a rate of 0 or 1 that nobody differs in has Clopper & Pearson's bound.

        >>> str(Estimate(1.0, people=300))   # 300 people of 300; .025 ** (1 / 300)
        '1.000 (≥ 0.988)'
        """
        if self.half == 0 < self.bound:
            return f"1.000 (≥ {1 - self.bound:.3f})" if self.mean else f"0.000 (≤ {self.bound:.3f})"
        return f"{self:.3f}"

    def __format__(self, form: str) -> str:
        """mean ± half in the form of a number, or why one of them is missing.

        >>> f"{Estimate(0.1234, 0.01):+.2f}"
        '+0.12 ± 0.02'
        """
        if not form:
            return str(self)
        if math.isnan(self.mean):
            return "too few"
        if math.isnan(self.half):
            why = "one person" if self.people == 1 else "one seed" if math.isnan(self.seeds_error) else "too few people"
            return f"{self.mean:{form}} ({why})"
        return f"{self.mean:{form}} ± {self.half:{form.lstrip('+')}}"


def over_seeds(values: Iterable[float]) -> Estimate:
    """The mean of independent values with Student's interval over them; a single one has none.

    >>> f"{over_seeds([1.0, 2.0, 3.0]):.3f}"   # 4.303 * 1 / sqrt(3)
    '2.000 ± 2.484'
    """
    seeds = torch.tensor(list(values), dtype=torch.float64)
    error = seeds.std().item() / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan
    return Estimate(seeds.mean().item(), seeds_error=error, seeds=len(seeds))


def estimate(values: Sequence[float], resampled: Sequence[Sequence[float]], people: float = math.inf) -> Estimate:
    """A rate, or a paired difference, with the uncertainty of people and of seeds; of one seed that of people only.

    Args:
        values: the rate for each of S seeds.
        resampled: (S, B) the same in B resamples of people, the same resamples for every seed; NaN where a resample
            cannot tell it. If more than half cannot, there is no interval.
        people: how many were resampled; fewer than `FEWEST_PEOPLE` have no interval.

    >>> str(estimate([0.5, 0.7], [[0.5, 0.5], [0.7, 0.7]]))   # people agree; 12.706 * 0.1414 / sqrt(2)
    '0.600 ± 1.271'
    """
    found = over_seeds(values)
    drawn = torch.tensor(resampled, dtype=torch.float64).mean(0)
    known = drawn[~drawn.isnan()]
    enough = people >= FEWEST_PEOPLE and 2 * len(known) >= len(drawn)
    error = known.std().item() if enough else math.nan
    return replace(found, people_error=error, people=people, seeds_error=found.seeds_error if found.seeds > 1 else 0.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons, corrected for their number; NaN is no comparison.

    The smallest of m is multiplied by m, the next by m - 1, ..., and none is less than the one before it (Holm 1979,
    Scandinavian Journal of Statistics 6:65). The chance that any true null hypothesis is rejected stays below the
    level.
    """
    corrected, before = list(p_values), 0.0
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, i) in enumerate(order):
        before = corrected[i] = max(before, min(1.0, p * (len(order) - rank)))
    return corrected


def told_apart(differences: Sequence[Estimate]) -> list[bool]:
    """Which of several differences are told from 0, by Holm's p-values."""
    return [p < LEVEL for p in holm([difference.p for difference in differences])]


def in_words(differences: Sequence[Estimate]) -> list[str]:
    """Of each of several differences its p-value after Holm, or why there is none, or "not told apart"."""

    def words(p: float, difference: Estimate) -> str:
        if math.isnan(p):
            return "no spread to judge by" if difference.half == 0 else "no interval"
        if p >= LEVEL:
            return "not told apart"
        return "p < .001" if p < 1e-3 else f"p {p:.3f}".replace("0.", ".")

    return list(map(words, holm([difference.p for difference in differences]), differences))


def judged(found: Mapping[Key, Estimate], form: str = "+.3f") -> dict[Key, str]:
    """Differences with their `in_words`, under the same keys: e.g. '+0.027 ± 0.007 (p .003)'."""
    words = dict(zip(found, in_words(list(found.values())), strict=True))
    return {key: f"{x:{form}}" + ("" if math.isnan(x.half) else f" ({words[key]})") for key, x in found.items()}


def judged_lines(found: Mapping[str, Estimate]) -> list[str]:
    """`judged` as a Markdown list of what is compared; its last line says what p is."""
    lines = [f"- {what}: {words}." for what, words in judged(found, "+.4f").items()]
    return [*lines, f"- ({correction(len(found))})"] if found else []


def correction(comparisons: int) -> str:
    """What the p-values of so many comparisons are; stands in every table and list of them."""
    return f"p after Holm, {comparisons} comparison{'s' * (comparisons != 1)}"


def resampled_people(people: int, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """(B, P) how often each person is drawn in each resample; the same for equal arguments."""
    drawn = torch.randint(people, (resamples, people), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(resamples, people, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def resampled_rates(
    predicted: Tensor, gallery: Tensor, person: Tensor, abs_yaw: Tensor, weights: Tensor, fars: Sequence[float] = FARS
) -> dict[str, dict[str, Tensor]]:
    """The rates of `recognition_by_yaw`, each (B,): once for every resample of people.

    The threshold of a TAR is set in every resample by the same rule, a share far of its own impostor pairs; a resample
    with fewer than 1 / far of them lets none pass. NaN: a resample without anybody whose views are in the bin, or
    without impostors; a TAR that the people themselves cannot tell. Needs memory for all M x P comparisons.

    Args:
        predicted, gallery, person, abs_yaw: as there.
        weights: (B, P) of `resampled_people`.
    """
    bins, people = metrics.yaw_bin(abs_yaw), len(gallery)
    scores = metrics.similarity_scores(predicted, gallery, person, bins, len(YAW_BINS))
    thresholds = len(scores.thresholds)
    genuine = torch.zeros(len(YAW_BINS) * thresholds, len(weights), dtype=torch.float64)
    genuine.index_add_(0, bins * thresholds + scores.genuine_bin, weights.T[person])
    genuine = genuine.view(len(YAW_BINS), thresholds, -1).transpose(1, 2).float()  # (G, B, U)
    impostor = _impostor_counts(predicted, gallery, person, bins, scores.thresholds, weights)  # (G, B, 2 U + 1)
    total = impostor.sum(0)
    nobody = total.sum(-1) == 0
    lowest = {far: metrics.lowest_threshold(total, far)[:, None] for far in fars}
    values = metrics.probe_values(predicted, gallery, person, scores)
    rates: dict[str, dict[str, Tensor]] = {}
    for name, picked, inside in metrics.yaw_groups(bins):
        counts = genuine[picked].sum(0), impostor[picked].sum(0)
        drawn = weights @ torch.bincount(person[inside], minlength=people).double()
        rates[name] = {
            rate: weights @ torch.bincount(person[inside], value[inside].double(), minlength=people) / drawn
            for rate, value in values.items()
        }
        accepted = metrics.accept_rates(counts[0])
        for far in fars:
            unknown = nobody | (not metrics.can_tell(scores.impostor_counts.sum(), far))
            rates[name][metrics.tar_name(far)] = accepted.gather(-1, lowest[far])[:, 0].masked_fill(unknown, math.nan)
        rates[name] |= {"auc": metrics.roc_auc(*counts), "eer": metrics.equal_error_rate(*counts)}
    return rates


def _impostor_counts(
    predicted: Tensor, gallery: Tensor, person: Tensor, group: Tensor, thresholds: Tensor, weights: Tensor
) -> Tensor:
    """(G, B, 2 U + 1): weighted numbers of impostor similarities by group and bin of `impostor_bins`.

    A sparse matrix counts how often each pair of people falls into each bin; its product with the pairs' weights does
    all resamples at once.
    """
    people, bins, groups = len(gallery), 2 * len(thresholds) + 1, len(YAW_BINS)
    found = torch.empty(len(person), people, dtype=torch.long)
    for rows, similarity in metrics.Similarities(predicted, gallery):
        found[rows] = metrics.impostor_bins(thresholds, similarity) + group[rows, None] * bins
    pair = person[:, None] * people + torch.arange(people)
    is_impostor = person[:, None] != torch.arange(people)
    where = torch.stack((found[is_impostor], pair[is_impostor]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly)")
        counts = torch.sparse_coo_tensor(
            where, torch.ones(where.shape[1]), (groups * bins, people * people), check_invariants=False
        ).to_sparse_csr()  # its products use all cores
    drawn = weights.float()
    of_pairs = (drawn[:, :, None] * drawn[:, None]).view(len(weights), -1).T  # (P P, B)
    return (counts @ of_pairs).view(groups, bins, -1).transpose(1, 2).contiguous()
