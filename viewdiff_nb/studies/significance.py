"""How certain a rate is: other people might have been tested, and other seeds might have been trained with.

People are resampled, not views: the views of one person succeed and fail together. A resample draws people with
replacement, and whoever is drawn n times counts n times as a probe and n times as an impostor, so that a pair of
people (i, j) weighs n_i n_j. Leaving the impostors' side as it is would make intervals of TAR at FAR 1e-3 up to
a third too narrow. Rank-k searches the whole gallery in every resample: a person who is not drawn is still there to
be mistaken for.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from scipy import optimize, stats
from torch import Tensor

from viewdiff_nb.faces.geometry import YAW_BINS
from viewdiff_nb.metrics import (
    Similarities,
    can_tell,
    equal_error_rate,
    level_cells,
    lowest_level,
    probe_values,
    roc_auc,
    similarity_scores,
    tar_name,
    true_accept_rates,
    yaw_bin,
    yaw_groups,
)

FARS = (1e-2, 1e-3, 1e-4)
RESAMPLES = 400
LEVEL = 0.05  # of intervals and of what is told apart
FEWEST_PEOPLE = 5  # for an interval over people; four can be resampled in 35 ways only


@dataclass(frozen=True)
class Estimate:
    """A mean, and what it would vary by with other people and with other seeds.

    The two are independent, so their intervals add like vectors: half = hypot(Student's quantile times people_error,
    Student's quantile times seeds_error), the method of variance estimates recovery (Zou & Donner 2008, Statistics in
    Medicine 27:1693). p is that interval turned round: the level at which it just touches 0, so p < .05 if and only
    if the 95 % interval excludes 0.

    people_error: standard error over people; NaN if these are too few to tell. people: how many they are.
    seeds_error: standard error of the mean over seeds; NaN if one seed is all there is. seeds: how many they are.
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
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def p(self) -> float:
        """Two-sided p-value of the mean being 0; NaN if there is no interval, or no spread to judge by."""
        if math.isnan(self.half) or (self.half == 0 and self.mean != 0):
            return math.nan
        if self.half == 0:
            return 1.0
        least = math.log(1e-300)
        if self._beyond(least) < 0:
            return 0.0
        return math.exp(optimize.brentq(self._beyond, least, 0.0))

    def _beyond(self, log_level: float) -> float:
        """How far beyond 0 the interval of a level reaches; it shrinks to nothing as the level rises to 1."""
        return self._half(math.exp(log_level)) - abs(self.mean)

    def _half(self, level: float) -> float:
        parts = ((self.people_error, self.people), (self.seeds_error, self.seeds))
        return math.hypot(*(error * stats.t.isf(level / 2, n - 1) if error else 0.0 for error, n in parts))

    def __str__(self) -> str:
        """A rate: three digits; a rate of 0 or 1 that nobody differs in has Clopper & Pearson's bound.

        >>> str(Estimate(1.0, people=300))   # 300 people of 300; .025 ** (1 / 300)
        '1.000 (≥ 0.988)'
        """
        if self.half == 0 and self.mean in (0, 1) and math.isfinite(self.people):
            least = (LEVEL / 2) ** (1 / self.people)
            return f"1.000 (≥ {least:.3f})" if self.mean else f"0.000 (≤ {1 - least:.3f})"
        return f"{self:.3f}"

    def __format__(self, form: str) -> str:
        """mean ± half in the form of a number, or why one of them is not there.

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
    """A rate, or a paired difference, with the uncertainty of people and of seeds.

    Args:
        values: the rate for each of S seeds.
        resampled: (S, B) the same in B resamples of people, the same resamples for every seed; NaN where a resample
            cannot tell it. If more than half cannot, there is no interval.
        people: how many were resampled; fewer than `FEWEST_PEOPLE` have no interval.

    One seed has no interval over seeds: the estimate then holds for that one training only.

    >>> str(estimate([0.5, 0.7], [[0.5, 0.5], [0.7, 0.7]]))   # people agree; 12.706 * 0.1414 / sqrt(2)
    '0.600 ± 1.271'
    """
    found = over_seeds(values)
    drawn = torch.tensor(resampled, dtype=torch.float64).mean(0)
    told = drawn[~drawn.isnan()]
    enough = people >= FEWEST_PEOPLE and 2 * len(told) >= len(drawn)
    error = told.std().item() if enough else math.nan
    return replace(found, people_error=error, people=people, seeds_error=found.seeds_error if found.seeds > 1 else 0.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons that are made at once, corrected for their number.

    The smallest of m is multiplied by m, the next by m - 1, ..., and none is less than the one before it (Holm 1979,
    Scandinavian Journal of Statistics 6:65). The chance that any true null hypothesis is rejected stays below the
    level. NaN is no comparison.
    """
    corrected, before = list(p_values), 0.0
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, i) in enumerate(order):
        before = corrected[i] = max(before, min(1.0, p * (len(order) - rank)))
    return corrected


def told_apart(differences: Sequence[Estimate]) -> list[bool]:
    """Which of several differences are told from 0, by Holm's p-values."""
    return [p < LEVEL for p in holm([difference.p for difference in differences])]


def correction(comparisons: int) -> str:
    """What the p-values of so many comparisons are; stands in every table and list of them."""
    return f"p after Holm, {comparisons} comparison{'s' * (comparisons != 1)}"


def judged(found: dict, form: str = "+.3f") -> dict:
    """Differences (`Estimate`s) in words, under the same keys: e.g. '+0.027 ± 0.007 (p .003)', p after Holm."""
    texts = {}
    for (key, apart), sure in zip(found.items(), in_words(list(found.values())), strict=True):
        texts[key] = f"{apart:{form}}" + ("" if math.isnan(apart.half) else f" ({sure})")
    return texts


def judged_lines(found: dict[str, Estimate]) -> list[str]:
    """`judged` as a Markdown list of what is compared; its last line says what p is."""
    lines = [f"- {what}: {words}." for what, words in judged(found, "+.4f").items()]
    return [*lines, f"- ({correction(len(found))})"] if found else []


def in_words(differences: Sequence[Estimate]) -> list[str]:
    """Of each of several differences its p-value after Holm, or "not told apart"."""
    words = []
    for p, difference in zip(holm([difference.p for difference in differences]), differences, strict=True):
        if math.isnan(p):
            words.append("no spread to judge by" if difference.half == 0 else "no interval")
        elif p < LEVEL:
            words.append("p < .001" if p < 1e-3 else f"p {p:.3f}".replace("0.", "."))
        else:
            words.append("not told apart")
    return words


def resampled_people(people: int, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """(B, P) how often each person is drawn in each resample; the same for equal arguments."""
    drawn = torch.randint(people, (resamples, people), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(resamples, people, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def resampled_rates(
    predicted: Tensor, gallery: Tensor, person: Tensor, abs_yaw: Tensor, weights: Tensor, fars: Sequence[float] = FARS
) -> dict[str, dict[str, Tensor]]:
    """The rates of `recognition_by_yaw`, each (B,): once for every resample of people.

    The threshold of a TAR is set in every resample by the same rule, a share far of its own impostor pairs. So a
    resample with fewer than 1 / far of them lets none pass, where the people themselves are just enough. NaN: a
    resample without anybody whose views are in the bin, or without impostors; a TAR that the people themselves cannot
    tell.

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
    accepted = {tar_name(far): lowest_level(total, far) for far in fars if can_tell(scores.impostor_counts.sum(), far)}

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
        rates[name] |= {tar_name(far): torch.full((len(weights),), math.nan) for far in fars}
        shares = F.pad(true_accept_rates(pairs[0]), (0, 1))
        for rate, level in accepted.items():
            of_rate = shares.gather(-1, level[:, None])[:, 0]
            rates[name][rate] = of_rate.masked_fill(total.sum(-1) == 0, math.nan)
        rates[name] |= {"auc": roc_auc(*pairs), "eer": equal_error_rate(*pairs)}
    return rates


def _impostor_counts(
    predicted: Tensor, gallery: Tensor, person: Tensor, group: Tensor, levels: Tensor, weights: Tensor
) -> Tensor:
    """(G, B, 2 U + 1): weighted numbers of impostor similarities by group and cell (see `metrics.Scores`).

    A sparse matrix counts how often each pair of people falls into each cell; its product with the pairs'
    weights does all resamples at once.
    """
    people, cells, groups = len(gallery), 2 * len(levels) + 1, len(YAW_BINS)
    cell = torch.empty(len(person), people, dtype=torch.long)
    for rows, similarity in Similarities(predicted, gallery):
        cell[rows] = level_cells(levels, similarity) + group[rows, None] * cells
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
