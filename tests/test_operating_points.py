"""What is counted, by brute force, on synthetic people."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import people
from scipy import stats
from sklearn.metrics import roc_auc_score

from viewdiff_nb.drop_in import DropIn
from viewdiff_nb.modules.adjusted import Adjusted
from viewdiff_nb.modules.baselines import Frontaliser, MeanFace, PoseRidge, RawEmbedding
from viewdiff_nb.studies.operating_points import (
    COUNTS,
    GROUPS,
    RULES,
    count,
    drop_in,
    joined,
    points_table,
    share,
    template_table,
)
from viewdiff_nb.studies.significance import resampled_people

FAR = 0.02
EDGES = ((0, 30), (30, 45), (45, 60), (60, 75), (75, 91))


class Squeezed(Frontaliser):
    """Side views are drawn to one direction, so that impostors are the closer the larger the yaw."""

    def predict(self, unit, angles, keypoints_3d, pose_error=None):
        return 3 * (unit + 0.5 * angles[:, 1:2].abs() * F.normalize(torch.ones_like(unit), dim=1))


def some_people(first, count=20, noise=0.5):
    return people(count, views=20, noise=noise, first=first)


def cosines(model, faces):
    unit = F.normalize(faces.src, dim=1)
    seen = F.normalize(model.predict(unit, faces.angles, faces.keypoints_3d), dim=1)
    return (seen.double() @ F.normalize(faces.front, dim=1).double().T).numpy()


def parts(faces):
    """Of each view, in NumPy: its bin, its person, and (M, P) which comparison is with the own front."""
    yaw, person = faces.abs_yaw.numpy(), faces.person.numpy()
    bins = np.array([next(i for i, (low, high) in enumerate(EDGES) if low <= y < high) for y in yaw])
    return bins, person, person[:, None] == np.arange(len(faces.front))


def lowest(genuine, impostor, far=FAR):
    """The lowest of the genuine cosines at which a share far of the impostors, or less, is accepted; else infinite."""
    return min((t for t in genuine if (impostor >= t).mean() <= far), default=np.inf)


@pytest.fixture(scope="module")
def val():
    return some_people(1000)


@pytest.fixture(scope="module")
def test_people():
    return some_people(0)


@pytest.mark.parametrize("model", [RawEmbedding(), Squeezed()], ids=["raw", "squeezed"])
def test_counts_by_brute_force(model, val, test_people):
    """Rule by rule: one threshold of raw near-frontal views, one of each bin, one of normalised scores."""
    found = count({"model": model}, val, test_people, FAR)
    assert list(found) == [("model", rule) for rule in RULES]
    raw, seen = cosines(RawEmbedding(), val), cosines(model, val)
    bins, _, own = parts(val)
    one = lowest(raw[bins == 0][own[bins == 0]], raw[bins == 0][~own[bins == 0]])
    impostors = [seen[bins == i][~own[bins == i]] for i in range(5)]
    of_bin = [lowest(seen[own], impostor) for impostor in impostors]
    scaled = np.sort(np.concatenate([(x - x.mean()) / x.std() for x in impostors]))[::-1]
    highest = scaled[int(FAR * len(scaled))]  # so many are above it
    tested, (bins, person, own) = cosines(model, test_people), parts(test_people)
    expected = torch.zeros(3, 5, 20, 6)
    for v in range(len(tested)):
        i, who = bins[v], person[v]
        normal = (tested[v] - impostors[i].mean()) / impostors[i].std()
        for rule, yes in enumerate((tested[v] >= one, tested[v] >= of_bin[i], normal > highest)):
            found_here = [yes[who], 1, yes.sum() - yes[who], 19, 0, tested[v, who]]
            expected[rule, i, who] += torch.tensor([float(x) for x in found_here])
    for rule, name in enumerate(RULES):
        torch.testing.assert_close(found["model", name].float(), expected[rule], atol=1e-4, rtol=0)
    assert (expected[:, :, :, :3].sum((1, 2)) > 0).all() and not torch.equal(expected[0], expected[1])


def test_where_the_rate_cannot_be_stated_the_recogniser_alone_decides(val, test_people):
    """Without validation views of a bin both other rules abstain there; elsewhere they do not."""
    found = count({"raw": RawEmbedding()}, val.where(val.abs_yaw < 60), test_people, FAR)
    views = torch.bincount(torch.from_numpy(parts(test_people)[0])).tolist()
    for rule in RULES:
        of_bin = found["raw", rule].sum(1)
        silent = [0.0] * 5 if rule == RULES[0] else [0.0, 0.0, 0.0, *map(float, views[3:])]
        assert of_bin[:, COUNTS.index("abstained")].tolist() == silent
        assert of_bin[:, COUNTS.index("own")].tolist() == views
        if rule != RULES[0]:
            assert (found["raw", rule][3:, :, [0, 2]] == 0).all()
        assert (of_bin[:3, 0] > 0).all()


def test_people_of_several_folds_are_counted_together():
    a, b = ({("m", "r"): torch.randn(5, n, 6), ("n", "r"): torch.randn(5, n, 6)} for n in (3, 4))
    found = joined(iter([a, b]))
    assert list(found) == list(a) and found["m", "r"].shape == (5, 7, 6)
    assert torch.equal(found["n", "r"][:, 2], a["n", "r"][:, 2]) and torch.equal(
        found["n", "r"][:, 3], b["n", "r"][:, 0]
    )


def test_a_share_is_a_ratio_of_sums_with_its_spread_over_people_drawn_again():
    counts = torch.rand(5, 12, 6, generator=torch.Generator().manual_seed(2)).double()
    found = share(counts, [1, 3], "false accepts", "impostors")
    top, bottom = (counts[1, :, i] + counts[3, :, i] for i in (2, 3))
    assert found.mean == pytest.approx(100 * float(top.sum() / bottom.sum()))
    ratios = []
    for drawn in resampled_people(12).int().tolist():
        who = [i for i, times in enumerate(drawn) for _ in range(times)]
        ratios.append(100 * sum(float(top[i]) for i in who) / sum(float(bottom[i]) for i in who))
    assert found.people_error == pytest.approx(np.std(ratios, ddof=1))
    assert found.half == pytest.approx(stats.t.ppf(0.975, 11) * np.std(ratios, ddof=1))
    assert np.isnan(share(counts[:, :4], [1, 3], "false accepts", "impostors").half)  # too few people


def test_a_table_has_rows_of_bins_with_views_only():
    """By hand: 3 of 4 own views accepted below 30 degrees, 1 of 4 in 60-75, nothing elsewhere."""
    counts = torch.zeros(5, 6, 6).double()
    counts[0, :2] = torch.tensor([[1.0, 2.0, 1.0, 40.0, 0.0, 1.5], [2.0, 2.0, 0.0, 40.0, 0.0, 1.7]])
    counts[3, :2] = torch.tensor([[0.0, 2.0, 0.0, 40.0, 2.0, 0.5], [1.0, 2.0, 3.0, 40.0, 0.0, 0.3]])
    table = points_table({("raw", RULES[1]): counts})
    assert table.index.tolist() == [("raw", RULES[1], yaw) for yaw in ("0-30", "60-75", "all")]
    assert table.index.names == ["model", "rule", "|yaw|"]
    near, side, every = (table.loc["raw", RULES[1], yaw] for yaw in ("0-30", "60-75", "all"))
    assert [row["TAR %"].split()[0] for row in (near, side, every)] == ["75.0", "25.0", "50.0"]
    assert [row["FAR %"].split()[0] for row in (near, side, every)] == ["1.25", "3.75", "2.50"]
    assert list(table["abstained %"]) == ["0", "50", "25"]
    assert list(table["cosine with the own front"]) == ["0.80", "0.20", "0.50"]
    assert list(points_table({("raw", RULES[1]): counts}, {"far": GROUPS["60-75"]})["abstained %"]) == ["50"]


@pytest.mark.parametrize("model", [RawEmbedding(), Squeezed()], ids=["raw", "squeezed"])
def test_templates_of_all_side_views_by_brute_force(model):
    faces = some_people(0, count=40, noise=1.0)
    table = template_table({"model": model}, faces, size=20).loc["model"]
    sides = faces.where(faces.abs_yaw >= 45)
    unit, fronts = F.normalize(sides.src, dim=1), F.normalize(faces.front, dim=1).numpy()
    seen = F.normalize(model.predict(unit, sides.angles, sides.keypoints_3d), dim=1).numpy()
    each = [np.flatnonzero(sides.person.numpy() == i) for i in range(40)]
    turn = np.cos(np.deg2rad(sides.abs_yaw.numpy()))

    def cosine(pooled):
        return np.array([x @ fronts.T / np.linalg.norm(x) for x in pooled])

    alone = cosine(seen)
    scores = {
        "one view": (alone, sides.person.numpy()),
        "mean": (cosine([seen[rows].mean(0) for rows in each]), np.arange(40)),
        "weighted by pose": (
            cosine([(np.maximum(0.1, turn[rows])[:, None] * seen[rows]).sum(0) for rows in each]),
            np.arange(40),
        ),
        "most similar": (np.array([alone[rows].max(0) for rows in each]), np.arange(40)),
    }
    assert list(table.index) == list(scores)
    for how, (similarity, person) in scores.items():
        own = person[:, None] == np.arange(40)
        row = table.loc[how]
        assert row["templates"] == str(len(person))
        assert float(row["rank-1 %"]) == pytest.approx(100 * (similarity.argmax(1) == person).mean(), abs=0.051)
        auc = roc_auc_score(own.ravel(), similarity.ravel())
        assert float(row["AUC %"]) == pytest.approx(100 * auc, abs=0.0051)
        tar = (similarity[own] >= lowest(similarity[own], similarity[~own], 1e-3)).mean()
        assert float(row["TAR@1e-3 %"]) == pytest.approx(100 * tar, abs=0.051)
    assert float(table.loc["mean", "rank-1 %"]) > float(table.loc["one view", "rank-1 %"])


def test_templates_have_a_size_and_those_of_one_view_are_views():
    faces = some_people(0, count=12)  # 10 side views each
    four = template_table({"raw": RawEmbedding()}, faces, size=4)
    assert list(four["templates"]) == ["120", "36", "36", "36"] and four.index.names[1] == "template of 4"
    one = template_table({"raw": RawEmbedding()}, faces, size=1)
    assert all(len(set(one[column])) == 1 for column in one)


def test_a_drop_in_is_fitted_to_training_people_and_chosen_on_others(val):
    train = some_people(500)
    ridge = PoseRidge(train.src, train.angles, train.target, 300.0, residual=True)
    given = train.src, train.angles, train.keypoints_3d, train.front
    model = drop_in(ridge, train, val, FAR)
    for way in set(model.ways):
        step, centring = way
        alone = Adjusted(ridge if step else None, *given, step=step, centring=centring)
        rows = torch.isin(torch.from_numpy(parts(val)[0]), torch.tensor([i for i in range(5) if model.ways[i] == way]))
        some = val.where(rows)
        expected = DropIn.of({way: alone}, [way] * 5)(some.src, **some.conditions(), return_residual=False)
        torch.testing.assert_close(model(some.src, **some.conditions(), return_residual=False), expected)
    assert any(step > 0 for step, _ in model.ways)
    harmful = drop_in(MeanFace(train.front), train, val, FAR)
    assert harmful.ways[0] == (0.0, "none")
