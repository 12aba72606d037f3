"""Verification and identification rates of a benchmark's rows, and how certain they and their differences are.

People are resampled as in `studies.significance`: whoever is drawn n times counts n times, and a pair of two people
n n' times. Models and the thresholds of accuracies stay as they are, so what other training people would do is no part
of an interval.
"""

from collections.abc import Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from viewdiff_nb import metrics
from viewdiff_nb.faces.pairs import Pairs
from viewdiff_nb.studies.real_benchmark import Benchmark
from viewdiff_nb.studies.significance import Estimate, estimate, resampled_people

FARS = (1e-2, 1e-3)


def fold_rates(benchmark: Benchmark, parts: Sequence[dict]) -> dict:
    """Rates of what `score_fold` gave for each fold of one row and seed; see `run_real_faces`."""
    drawn = resampled_people(len(benchmark.fold))  # (B, P)
    found: dict = {"settings": pd.Series([part["setting"] for part in parts]).value_counts().to_dict()}
    found["machines"] = sorted({part["machine"] for part in parts})
    for protocol, pairs in benchmark.pairs.items():
        similarity = torch.empty(len(pairs))
        for fold, part in enumerate(parts):
            similarity[pairs.fold == fold] = torch.tensor(part[protocol])
        weight = _pair_weights(benchmark, pairs, drawn)
        hits = metrics.fold_hits(similarity, pairs.same, pairs.fold).double()
        found[protocol] = hits.mean().item(), _weighted_accuracy(hits, pairs, weight).tolist()
        if protocol == "FP":
            counts = metrics.pair_counts(similarity, pairs.same, torch.cat((torch.ones(len(pairs), 1), weight), 1))
            rates = {"auc": metrics.roc_auc, "eer": metrics.equal_error_rate}
            rates |= {metrics.tar_name(far): partial(metrics.tar_at_far, far=far) for far in FARS}
            for name, rate in rates.items():
                first, *resampled = rate(*counts).tolist()
                found[name] = first, resampled
    rows = torch.cat([benchmark.profiles_of(fold) for fold in range(len(parts))])
    weight = drawn[:, benchmark.faces.person[rows]]  # (B, M)
    for name in ("rank1", "rank1_one"):
        hits = torch.tensor([rank == 1 for part in parts for rank in part[name]]).double()
        found[name] = hits.mean().item(), (weight @ hits / weight.sum(1)).tolist()
    return found


def _pair_weights(benchmark: Benchmark, pairs: Pairs, drawn: Tensor) -> Tensor:
    """(N, B) how often a pair counts in resamples of people: n of a person's own, n n' of two people's."""
    first, second = (drawn[:, benchmark.faces.person[rows]].T for rows in (pairs.first, pairs.second))
    return torch.where(pairs.same[:, None], first, first * second)


def _weighted_accuracy(hits: Tensor, pairs: Pairs, weight: Tensor) -> Tensor:
    """(B,) the mean of the accuracies on same and on different pairs, of which there are as many."""
    halves = [(hits[kind] @ weight[kind]) / weight[kind].sum(0) for kind in (pairs.same, ~pairs.same)]
    return (halves[0] + halves[1]) / 2


def names_of(results: dict) -> list[str]:
    """The rows of results, in order."""
    return list(dict.fromkeys(name for name, _ in results))


def rate_estimate(results: dict, row: str, rate: str, other: str | None = None) -> Estimate:
    """A rate in percent, or how far it is above another row's; 95 % over resampled people, and over seeds.

    Differences are paired by resample and seed; a row without seeds is compared with each of the other's.

    Raises:
        ValueError: for a row that is not in results, or two rows with different seeds.
    """
    ours, theirs = _by_seed(results, row, rate), _by_seed(results, other, rate) if other else {}
    if other:
        if len(ours) == 1 or len(theirs) == 1:
            seeds = max(ours, theirs, key=len)
            ours, theirs = ({seed: of.get(seed, of[0]) for seed in seeds} for of in (ours, theirs))
        if ours.keys() != theirs.keys():
            raise ValueError(f"{row} has seeds {list(ours)}, {other} has {list(theirs)}; run both with the same")
        ours = {
            seed: (value - theirs[seed][0], [x - y for x, y in zip(drawn, theirs[seed][1], strict=True)])
            for seed, (value, drawn) in ours.items()
        }
    values = [100 * value for value, _ in ours.values()]
    return estimate(values, [[100 * x for x in drawn] for _, drawn in ours.values()])


def _by_seed(results: dict, row: str, rate: str) -> dict[int, tuple[float, list[float]]]:
    found = {seed: of_seed[rate] for (name, seed), of_seed in sorted(results.items()) if name == row}
    if not found:
        raise ValueError(f"there is no row {row!r}; there are {', '.join(names_of(results))}")
    return found
