import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import people

from viewdiff_nb.calibration import ABSTAIN, ACCEPT, REJECT, Calibration, calibrate, template_similarities

BINS = ((0, 30), (30, 45), (45, 60), (60, 75), (75, 91))


@pytest.fixture(scope="module")
def faces():
    return people(25, views=20, noise=0.8)


def of(faces):
    return faces.src, faces.front, faces.person, faces.abs_yaw


def by_bin(faces):
    """Of each bin: genuine and impostor cosines as NumPy arrays."""
    cosines = (F.normalize(faces.src, dim=1).double() @ F.normalize(faces.front, dim=1).double().T).numpy()
    own = faces.person[:, None].numpy() == np.arange(len(faces.front))
    yaw = faces.abs_yaw.numpy()
    rows = [(yaw >= low) & (yaw < high) for low, high in BINS]
    return [(cosines[r][own[r]], cosines[r][~own[r]]) for r in rows]


@pytest.mark.parametrize("far", [0.002, 0.01, 0.1, 0.5])
def test_each_bin_keeps_to_its_rate_at_the_lowest_genuine_similarity_that_does(faces, far):
    found, cosines = calibrate(*of(faces), far=far), by_bin(faces)
    candidates = np.concatenate([genuine for genuine, _ in cosines])
    for (genuine, impostor), threshold in zip(cosines, found.thresholds.tolist(), strict=True):
        assert len(genuine) > 20
        fits = [t for t in candidates if (impostor >= t - 1e-7).mean() <= far]
        assert threshold == pytest.approx(min(fits), abs=1e-6)
        assert (impostor >= threshold).mean() <= far
    assert found.far == far and len(found.thresholds.unique()) > 1


def test_what_is_decided_keeps_to_the_rate(faces):
    """Over all impostor pairs of the people it was fitted to, each compared by itself."""
    found = calibrate(*of(faces), far=0.02)
    cosines = F.normalize(faces.src, dim=1) @ F.normalize(faces.front, dim=1).T
    own = F.one_hot(faces.person, 25).bool()
    view, other = (~own).nonzero().T
    decided = found.decide(cosines[view, other] - 1e-6, faces.abs_yaw[view])
    assert set(decided.tolist()) == {ACCEPT, REJECT} == {1, 0}
    for low, high in BINS:
        inside = (faces.abs_yaw[view] >= low) & (faces.abs_yaw[view] < high)
        assert 0 < (decided[inside] == ACCEPT).double().mean() <= 0.02


def test_decisions_by_hand():
    """At the threshold is accepted; |yaw| beyond 90 degrees belongs to the last bin."""
    found = Calibration(
        torch.tensor([0.1, 0.2, 0.3, 0.4, math.inf]),
        torch.tensor([True, True, False, True, True]),
        torch.zeros(5),
        torch.ones(5),
        0.01,
    )
    yaw = torch.tensor([29.9, 30.0, 44.9, 50.0, 60.0, 80.0, 170.0])
    similarity = torch.tensor([0.15, 0.15, 0.2, 0.9, 0.4, 1.0, 1.0])
    assert found.decide(similarity, yaw).tolist() == [1, 0, 1, ABSTAIN, 1, 0, 0]


def test_with_too_few_impostors_a_bin_abstains(faces):
    """24 impostors a view: a rate of .001 needs 42 views, .02 needs 3."""
    cells = [(faces.abs_yaw >= low) & (faces.abs_yaw < high) for low, high in BINS]
    keep = torch.cat([cell.nonzero()[:n, 0] for cell, n in zip(cells, (45, 42, 41, 3, 2), strict=True)])
    some = faces.where(keep)
    assert calibrate(*of(some), far=0.001).states_far.tolist() == [True, True, False, False, False]
    found = calibrate(*of(some), far=0.02)
    assert found.states_far.tolist() == [True, True, True, True, False]
    decided = found.decide(torch.tensor([2.0, 2.0, -2.0]), torch.tensor([70.0, 80.0, 80.0]))
    assert decided.tolist() == [ACCEPT, ABSTAIN, ABSTAIN]


def test_a_bin_that_accepts_too_few_of_the_right_people_abstains(faces):
    thresholds = calibrate(*of(faces), far=0.01).thresholds.tolist()
    tar = [(genuine >= t - 1e-7).mean() for (genuine, _), t in zip(by_bin(faces), thresholds, strict=True)]
    assert len(set(tar)) > 3 and tar[4] < tar[1]
    for least in (0.0, *tar, 1.0):
        expected = [rate >= least - 1e-9 for rate in tar]
        assert calibrate(*of(faces), far=0.01, least_tar=least - 1e-9).states_far.tolist() == expected


def test_normalised_scores_of_impostors_have_mean_0_and_spread_1(faces):
    found = calibrate(*of(faces))
    cosines = F.normalize(faces.src, dim=1) @ F.normalize(faces.front, dim=1).T
    scores, own = found.normalised(cosines, faces.abs_yaw), F.one_hot(faces.person, 25).bool()
    for i, (low, high) in enumerate(BINS):
        rows = (faces.abs_yaw >= low) & (faces.abs_yaw < high)
        impostors = scores[rows][~own[rows]].double().numpy()
        assert impostors.mean() == pytest.approx(0, abs=1e-5) and impostors.std() == pytest.approx(1, abs=1e-5)
        raw = by_bin(faces)[i][1]
        assert float(found.mean[i]) == pytest.approx(raw.mean(), abs=1e-6)
        assert float(found.spread[i]) == pytest.approx(raw.std(), abs=1e-6)
    torch.testing.assert_close(found.normalised(cosines[:, 3], faces.abs_yaw), scores[:, 3])


def test_bins_without_views_abstain_and_accept_nothing(faces):
    some = faces.where((faces.abs_yaw >= 30) & (faces.abs_yaw < 60))
    found, full = calibrate(*of(some), far=0.01), calibrate(*of(faces), far=0.01)
    assert found.states_far.tolist() == [False, True, True, False, False]
    assert found.thresholds[[0, 3, 4]].tolist() == [math.inf] * 3
    torch.testing.assert_close(found.mean[1:3], full.mean[1:3])
    torch.testing.assert_close(found.spread[1:3], full.spread[1:3])
    assert found.decide(torch.ones(2), torch.tensor([10.0, 80.0])).tolist() == [ABSTAIN, ABSTAIN]


def test_ties_are_counted_as_accepted():
    """Three people, views alike: of six impostors of each bin, two tie with genuine views at 1, one lies at .8."""
    front = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6]])
    views, person = front, torch.arange(3)
    yaw = torch.zeros(3)
    # impostors: 1, .8 of the first, 1, .8 of the second, .8, .8 of the third; genuine: 1, 1, 1
    found = calibrate(views, front, person, yaw, far=0.34)
    assert found.thresholds[0] == pytest.approx(1.0) and found.states_far[0]
    found = calibrate(views, front, person, yaw, far=0.33)  # a third is more
    assert found.thresholds[0] == math.inf
    assert found.decide(torch.ones(1), yaw[:1]).tolist() == [REJECT]
    assert float(found.spread[0]) == pytest.approx(np.std([1, 1, 0.8, 0.8, 0.8, 0.8]), abs=1e-6)


def test_impostors_that_are_all_alike_have_a_spread_that_divides():
    """Nothing is divided by 0."""
    front = torch.eye(3)
    found = calibrate(front, front, torch.arange(3), torch.zeros(3), far=0.5)
    assert 0 < found.spread[0] < 1e-3 and found.normalised(torch.ones(1), torch.zeros(1)).isfinite().all()


def test_lengths_do_not_matter(faces):
    found, scaled = calibrate(*of(faces)), calibrate(7 * faces.src, 0.1 * faces.front, faces.person, faces.abs_yaw)
    for name in ("thresholds", "mean", "spread"):
        torch.testing.assert_close(getattr(found, name), getattr(scaled, name))


@pytest.mark.parametrize("far", [0.0, 1.0, -0.1, 2.0])
def test_a_rate_out_of_range_is_refused(faces, far):
    with pytest.raises(ValueError, match="a false accept rate lies between 0 and 1, got"):
        calibrate(*of(faces), far=far)


def test_what_recognition_refuses_is_refused(faces):
    with pytest.raises(ValueError, match="a gallery of at least 2 people, got 1"):
        calibrate(faces.src[:3], faces.front[:1], faces.person[:3], faces.abs_yaw[:3])
    with pytest.raises(ValueError, match="must be finite"):
        calibrate(faces.src * math.nan, faces.front, faces.person, faces.abs_yaw)


@pytest.mark.parametrize("how", ["mean", "weighted", "max"])
def test_templates_by_loops(faces, how):
    """Of one to four views each, in no order, of any length."""
    torch.manual_seed(3)
    views = faces.src[:10] * torch.rand(10, 1)
    yaw = torch.tensor([0.0, 20.0, 60.0, 84.0, 85.0, 90.0, 30.0, 100.0, 45.0, 10.0])  # .1 from 84.26 degrees on
    template = torch.tensor([2, 0, 1, 2, 0, 1, 1, 2, 3, 2])
    expected = np.zeros((4, 25))
    for t in range(4):
        rows = [i for i in range(10) if template[i] == t]
        unit = [views[i].double().numpy() / np.linalg.norm(views[i]) for i in rows]
        for p in range(25):
            front = faces.front[p].double().numpy() / np.linalg.norm(faces.front[p])
            if how == "max":
                expected[t, p] = max(x @ front for x in unit)
            else:
                weights = [max(0.1, math.cos(math.radians(float(yaw[i])))) if how == "weighted" else 1.0 for i in rows]
                pooled = sum(w * x for w, x in zip(weights, unit, strict=True))
                expected[t, p] = pooled @ front / np.linalg.norm(pooled)
    found = template_similarities(views, template, 3 * faces.front, yaw, how)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_templates_of_one_view_are_views(faces):
    alone = torch.arange(len(faces))
    cosines = F.normalize(faces.src, dim=1) @ F.normalize(faces.front, dim=1).T
    for how in ("mean", "max", "weighted"):
        found = template_similarities(faces.src, alone, faces.front, faces.abs_yaw, how)
        torch.testing.assert_close(found, cosines, atol=1e-5, rtol=0)


def test_unknown_templates_are_refused(faces):
    template = torch.zeros(len(faces), dtype=torch.long)
    with pytest.raises(ValueError, match="how must be mean, max or weighted, got 'median'"):
        template_similarities(faces.src, template, faces.front, how="median")
    with pytest.raises(ValueError, match=r"weighted by pose need abs_yaw, their \|yaw\| in degrees"):
        template_similarities(faces.src, template, faces.front, how="weighted")
