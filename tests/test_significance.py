import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from viewdiff_nb.metrics import COUNTS, recognition_by_yaw
from viewdiff_nb.studies.significance import (
    Estimate,
    estimate,
    holm,
    in_words,
    judged,
    over_seeds,
    resampled_people,
    resampled_rates,
    told_apart,
)

FARS = (0.1, 0.01)


def random_people(people=14, views=6, noise=1.2):
    gallery = torch.randn(people, 12)
    person = torch.arange(people).repeat_interleave(views)
    yaw = torch.linspace(0, 89, views).repeat(people)
    return gallery[person] + noise * torch.randn(len(person), 12), gallery, person, yaw


def test_each_person_drawn_once_gives_the_rates_themselves():
    people = random_people()
    rates = resampled_rates(*people, torch.ones(1, 14, dtype=torch.float64), FARS)
    for where, row in recognition_by_yaw(*people, FARS).items():
        for rate, value in row.items():
            if rate not in COUNTS:
                assert rates[where][rate].item() == pytest.approx(value, abs=2e-6), (where, rate)


def test_resamples_equal_the_repeated_people():
    """A person drawn n times is n probes of each view, and pairs (i, j) are there n_i n_j times."""
    predicted, gallery, person, yaw = random_people()
    weights = resampled_people(14, resamples=3, seed=1)
    rates = resampled_rates(predicted, gallery, person, yaw, weights, FARS)
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (predicted, gallery)]
    similarity = (unit[0] @ unit[1].T).numpy()
    best = similarity.argmax(1) == person.numpy()
    for b, drawn in enumerate(weights.long().numpy()):
        inside = (yaw >= 45).numpy()
        assert rates["45-90"]["rank1"][b].item() == pytest.approx(np.repeat(best[inside], drawn[person[inside]]).mean())
        truth, scores = [], []
        for i, row in enumerate(similarity):
            for j, value in enumerate(row):
                own = j == person[i]
                count = drawn[person[i]] * (1 if own else drawn[j])
                truth += [own] * int(count)
                scores += [value] * int(count)
        assert rates["all"]["auc"][b].item() == pytest.approx(roc_auc_score(truth, scores), abs=1e-6)
        far, tar, _ = roc_curve(truth, scores, drop_intermediate=False)
        assert rates["all"]["eer"][b].item() == pytest.approx(np.maximum(far, 1 - tar).min(), abs=1e-6)
        for wanted, name in zip(FARS, ("tar@1e-1", "tar@1e-2"), strict=True):
            assert rates["all"][name][b].item() == pytest.approx(tar[far <= wanted + 1e-9].max(), abs=1e-6)


def test_the_interval_of_a_mean_over_people_is_the_known_one():
    """Each person's views are all recognised or none is: a binomial with one trial per person."""
    gallery = torch.nn.functional.normalize(torch.randn(300, 40), dim=1)
    person = torch.arange(300).repeat_interleave(4)
    lost = (torch.arange(300) % 4 == 0)[person, None]
    predicted = torch.where(lost, -gallery[person], gallery[person])
    rates = resampled_rates(predicted, gallery, person, torch.zeros(1200), resampled_people(300), FARS)
    found = estimate([0.75], [rates["all"]["rank1"].tolist()])
    assert found.half == pytest.approx(1.96 * math.sqrt(0.75 * 0.25 / 300), rel=0.1)
    assert rates["all"]["rank1"].mean().item() == pytest.approx(0.75, abs=0.005)


def test_equal_arguments_draw_equal_people():
    assert torch.equal(resampled_people(50, 20, 3), resampled_people(50, 20, 3))
    assert not torch.equal(resampled_people(50, 20, 3), resampled_people(50, 20, 4))
    assert (resampled_people(50, 20).sum(1) == 50).all()


def test_uncertainty_of_people_and_seeds_adds_up():
    people = [[0.5, 0.7, 0.6], [0.6, 0.8, 0.7]]
    found = estimate([0.6, 0.7], people)
    over_people = 1.959964 * np.std([0.55, 0.75, 0.65], ddof=1)
    over_seeds = 12.7062 * np.std([0.6, 0.7], ddof=1) / math.sqrt(2)
    assert found.mean == pytest.approx(0.65) and found.half == pytest.approx(
        math.hypot(over_people, over_seeds), rel=1e-5
    )
    assert found.low == pytest.approx(0.65 - found.half) and found.high == pytest.approx(0.65 + found.half)
    assert estimate([0.6], people[:1]).half == pytest.approx(1.959964 * 0.1, rel=1e-5)  # one seed: people only


def students(*values):
    return estimate(values, [[0.0, 0.0]] * len(values))  # people vary not at all


def test_p_is_students_where_only_seeds_vary():
    for values in ([0.020, 0.012, 0.016, 0.010, 0.022], [0.020, 0.0205], [-0.3, 0.1, 0.2, 0.05]):
        expected = stats.ttest_1samp(values, 0.0)
        for found in (students(*values), over_seeds(values)):
            assert found.p == pytest.approx(expected.pvalue, rel=1e-8)
            interval = expected.confidence_interval()
            assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert students(0.020, 0.012, 0.016, 0.010, 0.022).p == pytest.approx(0.0022, abs=5e-5)


def test_p_is_the_bootstraps_where_only_people_vary():
    draws = [0.05, 0.15, 0.1]  # standard deviation .05
    assert estimate([0.1], [draws]).p == pytest.approx(2 * stats.norm.sf(2), rel=1e-8)
    assert estimate([0.1], [draws], people=20).p == pytest.approx(2 * stats.t.sf(2, 19), rel=1e-8)
    assert estimate([0.1], [draws], people=20).half == pytest.approx(2.093024 * 0.05, rel=1e-6)


def test_p_of_nothing():
    assert Estimate(0.0, 0.1).p == Estimate(0.0).p == 1
    assert Estimate(9.0, 0.1).p == 0  # beyond what a float holds
    assert math.isnan(Estimate(0.1).p) and math.isnan(over_seeds([0.01, 0.01]).p)  # no spread, so nothing to judge by
    assert judged({"a": over_seeds([0.01, 0.01])}) == {"a": "+0.010 ± 0.000 (no spread to judge by)"}
    assert math.isnan(over_seeds([0.3]).p) and math.isnan(over_seeds([0.3]).half)


@given(st.floats(-1, 1), st.floats(1e-9, 0.5), st.floats(0, 0.5), st.integers(2, 400), st.integers(2, 30))
def test_p_is_below_5_percent_if_and_only_if_the_interval_excludes_0(mean, people_error, seeds_error, people, seeds):
    found = Estimate(mean, people_error, seeds_error, people, seeds)
    assume(abs(abs(mean) - found.half) > 1e-9)
    assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
    assert 0 <= found.p <= 1


def test_the_interval_covers_what_it_promises():
    """Differences that vary by seed and by person: 95 % intervals hold the truth about 95 times in 100."""
    generator, people, seeds, inside = np.random.default_rng(0), 40, 4, 0
    drawn = resampled_people(people, 100).numpy() / people
    for _ in range(1000):
        of_person, of_seed = generator.normal(0.3, 1, people), generator.normal(0, 0.1, seeds)
        found = estimate(
            list(of_person.mean() + of_seed), [list(drawn @ of_person + shift) for shift in of_seed], people
        )
        inside += found.low <= 0.3 <= found.high
    assert 935 <= inside <= 985


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # x 3, 1 (raised to .06), 2, 4
    assert holm([0.3, 0.9]) == pytest.approx([0.6, 0.9]) and holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02] and holm([]) == []
    with_gap = holm([0.01, math.nan, 0.04])  # two comparisons
    assert with_gap[::2] == pytest.approx([0.02, 0.04]) and math.isnan(with_gap[1])


def test_holm_errs_in_5_of_100_tables():
    """Twelve differences that are 0: without the correction almost every second table tells one of them apart."""
    generator = np.random.default_rng(1)
    tables = generator.normal(size=(400, 12, 5))
    p = stats.ttest_1samp(tables, 0.0, axis=2).pvalue
    wrong = sum(any(told_apart([over_seeds(row) for row in table])) for table in tables[:100])
    assert wrong == sum(min(row) < 0.05 / 12 for row in p[:100]) <= 12 < (p.min(1) < 0.05)[:100].sum()
    assert sum(min(holm(list(row))) < 0.05 for row in p) <= 0.08 * 400


def test_words_follow_from_the_corrected_p():
    clear, near, none = Estimate(0.5, 0.01), Estimate(0.022, 0.01), Estimate(0.001, 0.01)
    assert in_words([near]) == ["p .028"] and in_words([near, clear]) == ["p .028", "p < .001"]
    assert in_words([near, none, clear]) == ["not told apart", "not told apart", "p < .001"]
    assert told_apart([near, none, clear]) == [False, False, True]
    assert in_words([over_seeds([0.1]), near]) == ["no interval", "p .028"]
    assert judged({"a": near, "b": clear}) == {"a": "+0.022 ± 0.020 (p .028)", "b": "+0.500 ± 0.020 (p < .001)"}


def test_a_rate_that_nobody_differs_in_has_a_bound():
    for people in (1, 20, 300):
        bound = stats.binomtest(people, people).proportion_ci()  # Clopper & Pearson
        assert str(Estimate(1.0, people=people)) == f"1.000 (≥ {bound.low:.3f})"
        assert str(Estimate(0.0, people=people)) == f"0.000 (≤ {1 - bound.low:.3f})"
    assert str(Estimate(0.5, 0.01)) == "0.500 ± 0.020" and f"{Estimate(0.0):+.3f}" == "+0.000 ± 0.000"


def test_what_cannot_be_told_says_why():
    assert str(estimate([math.nan], [[math.nan] * 3], people=20)) == "too few"
    assert str(estimate([0.5], [[0.5, math.nan, 0.5, 0.5]], people=1)) == "0.500 (one person)"
    assert str(estimate([0.5], [[0.4, 0.6, math.nan]], people=5)).startswith("0.500 ± ")
    assert str(estimate([0.5], [[0.4, math.nan, math.nan]], people=5)) == "0.500 (too few people)"
    assert str(estimate([0.5], [[0.5, 0.5, math.nan]], people=4)) == "0.500 (too few people)"  # 35 resamples in all
    assert str(over_seeds([0.5])) == "0.500 (one seed)"


@pytest.mark.parametrize("people,views", [(12, 8), (10, 16), (20, 6)])
def test_small_sets_have_intervals(people, views):
    """As many held-out people as notebook 05 has of 72 people with 8 views, and of 60 with 16."""
    scored = random_people(people, views)
    rates = resampled_rates(*scored, resampled_people(people), (1e-3, 1e-4))
    for where, row in recognition_by_yaw(*scored, (1e-3, 1e-4)).items():
        for rate, value in row.items():
            if rate in COUNTS:
                continue
            found = estimate([value], [rates[where][rate].tolist()], row["people"])
            assert math.isnan(found.mean) == (rate == "tar@1e-4")
            assert math.isnan(found.half) == math.isnan(found.mean), (where, rate)


def test_a_resample_sets_its_threshold_by_the_same_rule():
    """Of people with barely a thousand impostor pairs most resamples have fewer; none of these may pass."""
    predicted, gallery, person, yaw = random_people(12, 8)
    weights = resampled_people(12, 50)
    tar = resampled_rates(predicted, gallery, person, yaw, weights, (1e-3,))["all"]["tar"]
    similarity = torch.nn.functional.normalize(predicted, dim=1) @ torch.nn.functional.normalize(gallery, dim=1).T
    own = person[:, None] == torch.arange(12)
    fewer = 0
    for drawn, found in zip(weights, tar, strict=True):
        pairs = (drawn[person][:, None] * drawn).masked_fill(own, 0)
        if pairs.sum() < 1000:
            fewer += 1
            passed = similarity[own] > similarity[pairs > 0].max()
            assert found.item() == pytest.approx(
                (drawn[person] * passed).sum().item() / drawn[person].sum().item(), abs=1e-6
            )
    assert fewer > 25


def test_a_bin_with_one_person_has_rates_and_no_interval():
    predicted, gallery, person, yaw = random_people(20, 6)
    yaw = torch.where(person == 3, 80.0, 10.0)
    row = recognition_by_yaw(predicted, gallery, person, yaw)["75-90"]
    resampled = resampled_rates(predicted, gallery, person, yaw, resampled_people(20))["75-90"]
    words = str(estimate([row["rank1"]], [resampled["rank1"].tolist()], row["people"]))
    assert words == f"{row['rank1']:.3f} (one person)"


def test_resamples_break_ties_as_the_rates_do():
    """Every front stands under two names, and every prediction, too."""
    gallery, person = torch.randn(10, 33).repeat(2, 1), torch.arange(20).repeat_interleave(6)
    predicted = (gallery[person] + torch.randn(120, 33))[torch.randint(60, (120,))]
    scored = predicted, gallery, person, torch.linspace(0, 89, 6).repeat(20)
    rates = resampled_rates(*scored, torch.ones(1, 20, dtype=torch.float64), FARS)
    for where, row in recognition_by_yaw(*scored, FARS).items():
        assert row["rank1"] == 0
        for rate in set(row) - set(COUNTS):
            assert rates[where][rate].item() == pytest.approx(row[rate], abs=2e-6), (where, rate)


def test_each_bin_has_its_own_rates_where_each_person_is_drawn_once():
    """Against the rates of `recognition_by_yaw`, bin by bin, with views of several yaws."""
    torch.manual_seed(5)
    gallery = torch.randn(40, 16)
    person = torch.arange(40).repeat_interleave(6)
    yaw = torch.tensor([5.0, 35.0, 50.0, 65.0, 80.0, 88.0]).repeat(40)
    predicted = gallery[person] + (yaw / 30)[:, None] * torch.randn(len(person), 16)
    found = resampled_rates(predicted, gallery, person, yaw, torch.ones(1, 40, dtype=torch.float64), FARS)
    known = recognition_by_yaw(predicted, gallery, person, yaw, FARS)
    assert found.keys() == known.keys() and len(found) > 4
    told = 0
    for where, rates in found.items():
        for rate, value in rates.items():
            if not math.isnan(known[where][rate]):
                assert value.item() == pytest.approx(known[where][rate], abs=1e-6), (where, rate)
                told += 1
    assert told > 30
