"""Rates against NumPy and scikit-learn, also in resamples of people."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import people
from sklearn.metrics import roc_auc_score

from viewdiff_nb.studies import real_models
from viewdiff_nb.studies.real_benchmark import stand_in
from viewdiff_nb.studies.real_faces import score_fold
from viewdiff_nb.studies.real_models import Family
from viewdiff_nb.studies.real_rates import fold_rates, rate_estimate
from viewdiff_nb.studies.significance import resampled_people


@pytest.fixture(scope="module")
def benchmark():
    return stand_in(people(40, views=12, noise=0.6))


@pytest.fixture(scope="module")
def raw(benchmark):
    """Rates of raw embeddings."""
    family = Family(real_models.raw_candidates, {"raw": ("raw",)})
    parts = [score_fold(family, benchmark, fold, 0)["raw"] | {"machine": "here"} for fold in range(10)]
    return fold_rates(benchmark, parts)


@pytest.fixture(scope="module")
def cosine(benchmark):
    """(N,) of the frontal-profile pairs."""
    unit, pairs = F.normalize(benchmark.faces.src, dim=1).numpy(), benchmark.pairs["FP"]
    return (unit[pairs.first] * unit[pairs.second]).sum(1)


def test_auc_is_scikit_learn_s_also_where_people_count_several_times(benchmark, raw, cosine):
    pairs, drawn = benchmark.pairs["FP"], resampled_people(40).numpy()
    same, person = pairs.same.numpy(), benchmark.faces.person.numpy()
    assert raw["auc"][0] == pytest.approx(roc_auc_score(same, cosine), abs=1e-6)
    for i in (0, 7):
        first, second = (drawn[i][person[rows.numpy()]] for rows in (pairs.first, pairs.second))
        weight = np.where(same, first, first * second)
        assert raw["auc"][1][i] == pytest.approx(roc_auc_score(same, cosine, sample_weight=weight), abs=1e-6)


def test_accuracy_is_that_of_the_best_threshold_of_the_other_folds(benchmark, raw, cosine):
    pairs = benchmark.pairs["FP"]
    same, fold = pairs.same.numpy(), pairs.fold.numpy()
    right = np.zeros(len(same))
    for i in range(10):
        rest = fold != i
        best = max(np.unique(cosine[rest]), key=lambda t: ((cosine[rest] >= t) == same[rest]).mean())
        right[~rest] = (cosine[~rest] >= best) == same[~rest]
    assert raw["FP"][0] == pytest.approx(right.mean(), abs=0.02)  # equally good thresholds may decide otherwise
    assert len(raw["FP"][1]) == 400 and 0.01 < np.std(raw["FP"][1]) < 0.1


def test_rank_one_is_counted_over_the_profiles(benchmark, raw):
    own = F.normalize(benchmark.faces.src, dim=1) @ F.normalize(benchmark.faces.front, dim=1).T
    hit = (own.argmax(1) == benchmark.faces.person)[benchmark.is_profile]
    assert raw["rank1"][0] == pytest.approx(hit.double().mean().item(), abs=1e-6)
    drawn = resampled_people(40)[3][benchmark.faces.person[benchmark.is_profile]]
    weighted = (drawn * hit).sum() / drawn.sum()
    assert raw["rank1"][1][3] == pytest.approx(weighted.item(), abs=1e-6)
    assert raw["settings"] == {"('raw',)": 10} and raw["machines"] == ["here"]


def test_an_interval_is_that_of_resampled_people():
    drawn = np.random.default_rng(0).normal(0.9, 0.01, 400).tolist()
    results = {("a", 0): {"FP": (0.9, drawn)}, ("b", 0): {"FP": (0.5, [x - 0.4 for x in drawn])}}
    found = rate_estimate(results, "a", "FP")
    assert found.mean == pytest.approx(90) and found.people_error == pytest.approx(100 * np.std(drawn, ddof=1))
    apart = rate_estimate(results, "a", "FP", "b")  # they succeed and fail together
    assert apart.mean == pytest.approx(40) and apart.people_error == pytest.approx(0, abs=1e-9)


def test_seeds_are_paired_and_add_their_own_spread():
    results = {("a", s): {"FP": (v, [v] * 400)} for s, v in {0: 0.9, 1: 0.92, 2: 0.94}.items()}
    results[("b", 0)] = {"FP": (0.9, [0.9] * 400)}
    found = rate_estimate(results, "a", "FP", "b")  # one without seeds is compared with each
    assert found.mean == pytest.approx(2) and found.seeds == 3
    assert found.seeds_error == pytest.approx(2 / torch.tensor(3.0).sqrt().item())
    assert rate_estimate(results, "b", "FP", "a").mean == pytest.approx(-2)


def test_rows_that_cannot_be_compared_are_named():
    results = {("a", s): {"FP": (0.9, [0.9] * 400)} for s in range(3)}
    results |= {("b", s): {"FP": (0.9, [0.9] * 400)} for s in range(2)}
    with pytest.raises(ValueError, match="there is no row 'typo'; there are a, b"):
        rate_estimate(results, "a", "FP", "typo")
    with pytest.raises(ValueError, match=r"a has seeds \[0, 1, 2\], b has \[0, 1\]"):
        rate_estimate(results, "a", "FP", "b")
