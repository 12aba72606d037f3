import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import people
from sklearn.decomposition import PCA
from sklearn.metrics import det_curve, roc_curve

from viewdiff_nb.plots.curves import (
    _over_people,
    cmc,
    embedding_map,
    roc_and_det,
    similarity_by_yaw,
    similarity_histograms,
)
from viewdiff_nb.studies.significance import resampled_people


@pytest.fixture(scope="module")
def faces():
    return people(30, views=12, noise=0.6)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def pairs(faces):
    """Cosines of all probes with all fronts, and which are of the same person."""
    cosines = F.normalize(faces.src, dim=1) @ F.normalize(faces.front, dim=1).T
    return cosines, F.one_hot(faces.person, len(faces.front)).bool()


def test_roc_and_det_are_those_of_scikit_learn(faces, pairs):
    cosines, same = pairs
    figure = roc_and_det({"raw": faces.src}, faces.front, faces.person)
    found = [ax.lines[0].get_xydata() for ax in figure.axes]
    truth, scores = same.flatten().numpy(), cosines.flatten().numpy()
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    expected = [tpr[fpr <= far + 1e-12].max() for far in found[0][:, 0]]
    # a threshold is always a right person's similarity, so that of none is the lowest possible
    np.testing.assert_allclose(found[0][:, 1], expected, atol=1e-9)
    far, frr, _ = det_curve(truth, scores)
    expected = [frr[far <= rate + 1e-12].min() for rate in found[1][:, 0] if (far <= rate + 1e-12).any()]
    np.testing.assert_allclose(found[1][-len(expected) :, 1], expected, atol=1e-9)
    assert found[0][0, 0] == pytest.approx(1 / (360 * 29)) and found[0][:, 1].min() < 0.9


def test_cmc_by_counting(faces, pairs):
    cosines, same = pairs
    rank = (cosines >= cosines[same][:, None]).sum(1).numpy()
    figure = cmc({"raw": faces.src}, faces.front, faces.person, ranks=7)
    found = figure.axes[0].lines[0].get_xydata()
    np.testing.assert_allclose(found, [(k, (rank <= k).mean()) for k in range(1, 8)])


def test_bands_come_from_people_drawn_again(faces):
    values = torch.rand(len(faces), 2).double()
    weights = resampled_people(30, 500)
    mean, low, high = _over_people(values, faces.person, weights)
    drawn = [
        np.concatenate([values[faces.person == p].numpy() for p in np.repeat(np.arange(30), row.long().numpy())]).mean(
            0
        )
        for row in weights
    ]
    np.testing.assert_allclose(low, np.quantile(drawn, 0.025, 0))
    np.testing.assert_allclose(high, np.quantile(drawn, 0.975, 0))
    np.testing.assert_allclose(mean, values.mean(0))


def test_histograms_hold_all_pairs(faces, pairs):
    cosines, same = pairs
    models = {"raw": faces.src, "twice": 2 * faces.src}
    figure = similarity_histograms(models, faces.front, faces.person, {"own": 0.4, "by pose": 0.3})
    for ax in figure.axes:
        heights = np.array([patch.get_height() for patch in ax.patches if hasattr(patch, "get_height")])
        expected, _ = np.histogram(cosines[same].numpy(), np.linspace(-0.5, 1, 76), density=True)
        np.testing.assert_allclose(heights[:75], expected, rtol=1e-5)
        assert [line.get_xdata()[0] for line in ax.lines] == [0.4, 0.3]


def test_similarity_over_yaw(faces, pairs):
    cosines, same = pairs
    yaw = faces.angles[:, 1].rad2deg()
    figure = similarity_by_yaw({"raw": faces.src}, faces.front, faces.person, yaw, width=10)
    own, other = (line.get_xydata() for line in figure.axes[0].lines)
    for row in (0, 5):
        inside = ((yaw / 10).round() * 10) == own[row, 0]
        assert own[row, 1] == pytest.approx(cosines[same][inside].median().item())
        best = cosines.masked_fill(same, -1).amax(1)[inside]
        assert other[row, 1] == pytest.approx(best.median().item())


def test_the_map_is_the_principal_components_of_the_fronts(faces):
    shown = [3, 1, 20, 7]
    figure = embedding_map({"raw": faces.src}, faces.front, faces.person, shown)
    fronts = np.array([figure.axes[0].collections[i].get_offsets()[0] for i in (1, 3, 5, 7)])
    unit = F.normalize(faces.front, dim=1)[shown].numpy()
    expected = PCA(2).fit_transform(unit)
    distances = np.linalg.norm(fronts[:, None] - fronts, axis=-1)
    np.testing.assert_allclose(distances, np.linalg.norm(expected[:, None] - expected, axis=-1), atol=1e-5)
    assert len(figure.axes[0].collections[0].get_offsets()) == 12


def test_curves_are_told_apart_without_colour(faces):
    models = dict.fromkeys(("a", "b", "c"), faces.src)
    figure = cmc(models, faces.front, faces.person)
    assert len({line.get_linestyle() for line in figure.axes[0].lines}) == 3
