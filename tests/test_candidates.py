import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import people
from sklearn.metrics import roc_auc_score

from viewdiff_nb.modules.adjusted import Adjusted, CanonicalCorrelation, WithinClassWhitening
from viewdiff_nb.modules.baselines import MLP, Frontaliser, RawEmbedding, enrolled
from viewdiff_nb.studies.candidates import (
    CLOSED_FORMS,
    adjusted,
    adjustments,
    common_candidates,
    held_out_best,
    in_space,
    whitened_and_common,
    whitening_candidates,
)


@pytest.fixture(scope="module")
def faces():
    return people(20, views=8)


@pytest.mark.parametrize(
    ("name", "count", "width"),
    [
        ("centred by pose", 2, 32),
        ("ridge, shrunk to identity", 18, 32),
        ("within-class whitening", 18, 32),
        ("canonical correlation", 18, 32),
        ("whitening + canonical correlation", 18, 64),
    ],
)
def test_every_closed_form_has_its_number_of_trials(faces, name, count, width):
    candidates = CLOSED_FORMS[name](faces)
    assert len(candidates) == count
    for model in candidates.values():
        predicted = model(faces.src, **faces.conditions(), return_residual=False)
        assert predicted.shape == (len(faces), width) and predicted.isfinite().all()
        assert enrolled(model, faces.front).shape == (20, width)
    found = [model(faces.src, **faces.conditions(), return_residual=False) for model in candidates.values()]
    for i, one in enumerate(found):
        assert all(not torch.allclose(one, other) for other in found[:i])


def test_adjustments_share_one_look_at_the_training_views(faces):
    """The residual is computed once, and gives what each would compute by itself."""
    model = MLP(faces.feature_dim)
    torch.nn.init.normal_(model.layers[-1].weight, std=0.02)
    found = adjustments(model, faces)
    assert len(found) == 6
    for (step, centring), one in found.items():
        alone = adjusted(model, faces, step=step, centring=centring)
        torch.testing.assert_close(one.weight, alone.weight)


def fitted_alone(faces, kind, *settings):
    given = faces.src, faces.angles, faces.keypoints_3d, faces.front
    centred = Adjusted(None, *given, step=0.0, centring="even")
    return kind(centred, *given, faces.person, *settings)


def assert_alike(model, other, faces):
    found, expected = (m(faces.src, **faces.conditions(), return_residual=False) for m in (model, other))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(enrolled(model, faces.front), enrolled(other, faces.front))


def test_settings_are_what_they_say(faces):
    """Every candidate is the model that is fitted by itself with the settings of its name."""
    common = common_candidates(faces, (0.1, 0.7), (0.5, 1.0))
    assert list(common) == [(s, power, "common") for s in (0.1, 0.7) for power in (0.5, 1.0)]
    for (shrinkage, power, _), model in common.items():
        assert_alike(model, fitted_alone(faces, CanonicalCorrelation, shrinkage, power), faces)
    for (shrinkage, _), model in whitening_candidates(faces, (0.3, 0.8), ("even",)).items():
        assert_alike(model, fitted_alone(faces, WithinClassWhitening, shrinkage), faces)


def test_the_weight_is_that_of_canonical_correlation(faces):
    both = whitened_and_common(faces)
    whitened, common = fitted_alone(faces, WithinClassWhitening, 0.9), fitted_alone(faces, CanonicalCorrelation, 0.3)
    unit = [F.normalize(m(faces.src, **faces.conditions(), return_residual=False), dim=1) for m in (whitened, common)]
    front = [F.normalize(enrolled(m, faces.front), dim=1) for m in (whitened, common)]
    model = both[0.9, 0.3, 0.7, "summed"]
    found = F.normalize(model(faces.src, **faces.conditions(), return_residual=False), dim=1)
    expected = 0.3 * unit[0] @ front[0].T + 0.7 * unit[1] @ front[1].T
    torch.testing.assert_close(found @ enrolled(model, faces.front).T, expected, atol=1e-5, rtol=0)


class Mixed(Frontaliser):
    """A share of the embedding is replaced by noise; the gallery is turned around if it says so."""

    def __init__(self, share, turned=False):
        super().__init__()
        self.share, self.turned = share, turned

    def predict(self, unit, angles, keypoints_3d, pose_error=None):
        seen = (1 - self.share) * unit + self.share * torch.sin(1e4 * unit)
        return seen.flip(1) if self.turned else seen

    def enrol(self, front):
        return front.flip(1) if self.turned else front


def test_the_best_setting_is_that_of_scikit_learn_s_auc():
    """People are left out in three groups, and only their side views are looked at, with all of their fronts."""
    faces = people(31, views=10, noise=0.8)
    fitted_to = []
    noise = (0.5, 0.25, 0.0, 0.6), (0.5, 0.1, 0.8, 0.6), (0.5, 0.25, 0.8, 0.0)  # each group has another best

    def candidates(some):
        fitted_to.append(some.names)
        shares = noise[len(fitted_to) - 1]
        return {(share,): Mixed(s, share == 1) for share, s in zip((0, 1, 2, 3), shares, strict=True)}

    best = held_out_best(candidates, faces)
    groups = [[i for i in range(31) if i % 3 == left_out] for left_out in range(3)]
    assert fitted_to == [tuple(n for i, n in enumerate(faces.names) if i not in group) for group in groups]
    total = dict.fromkeys(range(4), 0.0)
    unit, yaw = F.normalize(faces.src, dim=1), np.abs(np.rad2deg(faces.angles[:, 1].numpy()))
    for left_out, group in enumerate(groups):
        rows = [i for i in range(len(faces)) if int(faces.person[i]) in group and yaw[i] >= 45]
        own = faces.person[rows][:, None].numpy() == np.array(group)
        for i, share in enumerate(noise[left_out]):
            mixed = (1 - share) * unit[rows] + share * torch.sin(1e4 * unit[rows])
            cosines = F.normalize(mixed, dim=1) @ F.normalize(faces.front[group], dim=1).T
            total[i] += roc_auc_score(own.ravel(), cosines.numpy().ravel())
    assert best == (max(total, key=total.get),) == (1,)


def test_side_views_decide():
    """A model that is right below 45 degrees only is not the best, though most views are there."""

    class Until(RawEmbedding):
        def __init__(self, low, high):
            super().__init__()
            self.low, self.high = low, high

        def predict(self, unit, angles, keypoints_3d, pose_error=None):
            yaw = angles[:, 1:2].abs().rad2deg()
            return torch.where((yaw >= self.low) & (yaw < self.high), unit, -unit)

    faces = people(12, views=10)
    faces = faces.where((faces.abs_yaw < 45) | (faces.abs_yaw > 80))  # four and two of each person
    models = {("near",): Until(0, 45), ("far",): Until(45, 91)}
    assert held_out_best(lambda _: models, faces) == ("far",)


def test_a_set_as_a_space_maps_it(faces):
    """Views and fronts by their own maps, all of length 1; everything else stays."""
    space = fitted_alone(faces, CanonicalCorrelation, 0.4)
    moved = in_space(space, faces)
    for i in (0, 3, 77):
        x = faces.src[i : i + 1] / faces.src[i].norm()
        side = faces.abs_yaw[i] >= 45
        z = space.centred.predict(x, faces.angles[i : i + 1], None)[0] @ (space.of_side if side else space.of_front)
        torch.testing.assert_close(moved.src[i], z / z.norm())
    z = (faces.front[4] - faces.front.mean(0)) @ space.of_front
    torch.testing.assert_close(moved.front[4], z / z.norm())
    assert moved.names == faces.names and moved.person is faces.person and moved.angles is faces.angles
