import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from viewdiff_nb.metrics import COUNTS, recognition_by_yaw
from viewdiff_nb.studies.significance import Estimate, estimate, resampled_people, resampled_rates

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
    assert found.mean == pytest.approx(0.65) and found.half == pytest.approx(math.hypot(over_people, over_seeds), rel=1e-5)
    assert found.low == pytest.approx(0.65 - found.half) and found.high == pytest.approx(0.65 + found.half)
    assert estimate([0.6], people[:1]).half == pytest.approx(1.959964 * 0.1, rel=1e-5)  # one seed: people only


def test_p_values():
    assert Estimate(0.0, 0.1).p == pytest.approx(1)
    assert Estimate(0.1, 0.1).p == pytest.approx(0.05)
    assert Estimate(-0.2, 0.1).p == pytest.approx(2 * stats.norm.sf(2 * 1.959964), rel=1e-4)
    assert Estimate(0.0, 0.0).p == 1 and Estimate(0.1, 0.0).p == 0
