from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import people
from scipy.linalg import eigh, sqrtm

from viewdiff_nb.modules.adjusted import (
    Adjusted,
    CanonicalCorrelation,
    InSpace,
    Summed,
    WithinClassWhitening,
    inverse_root,
    unit_prediction,
)
from viewdiff_nb.modules.baselines import MeanFace, PoseRidge, RawEmbedding, enrolled


def given(faces):
    """What closed forms are fitted to."""
    return faces.src, faces.angles, faces.keypoints_3d, faces.front


def seen(model, faces):
    """(M, width) predictions for unit embeddings, float64."""
    return model(F.normalize(faces.src, dim=1), **faces.conditions(), return_residual=False).double()


def adjusted(faces, model=None, **options):
    return Adjusted(model, *given(faces), **options)


def test_centring_leaves_no_part_of_yaw_in_the_mean():
    """What is left of the training views is orthogonal to every term, as after any least squares."""
    faces = people(30, views=8)
    model = adjusted(faces, step=0.0, centring="even")
    left = model(F.normalize(faces.src, dim=1), faces.angles, faces.keypoints_3d, return_residual=False)
    yaw = faces.angles[:, 1:2]
    for term in (torch.ones_like(yaw), yaw.cos(), (2 * yaw).cos()):
        assert (term * left).mean(0).abs().max() < 1e-4
    torch.testing.assert_close(enrolled(model, faces.front).mean(0), torch.zeros(32), atol=1e-6, rtol=0)


def test_a_step_goes_part_of_the_way():
    faces = people(10, views=4)
    towards = MeanFace(faces.front)
    unit = F.normalize(faces.src, dim=1)
    for step in (0.0, 0.25, 1.0):
        model = adjusted(faces, towards, step=step, centring="none")
        found = model(unit, faces.angles, faces.keypoints_3d, return_residual=False)
        torch.testing.assert_close(found, F.normalize(unit + step * (towards.mean - unit), dim=1))
        torch.testing.assert_close(enrolled(model, faces.front), faces.front)


def test_whitening_makes_people_round():
    """Without shrinkage the covariance within people becomes a multiple of the identity; S^-1/2 is SciPy's."""
    faces = people(200, views=8, width=6)
    centred = adjusted(faces, step=0.0)
    fitted_to = *given(faces), faces.person
    model = WithinClassWhitening(centred, *fitted_to, shrinkage=0.0)

    def within(transform):
        views = transform(F.normalize(faces.src, dim=1), faces.angles, faces.keypoints_3d, return_residual=False)
        x = torch.cat((views, enrolled(transform, faces.front)))
        owner = torch.cat((faces.person, torch.arange(200)))
        means = torch.stack([x[owner == i].mean(0) for i in range(200)])
        return torch.cov((x - means[owner]).T, correction=0).double()

    round_ = within(model)
    torch.testing.assert_close(
        round_, torch.eye(6, dtype=torch.float64) * round_.diagonal().mean(), atol=1e-5, rtol=1e-3
    )
    before = within(centred)
    half = WithinClassWhitening(centred, *fitted_to, shrinkage=0.5)
    mixed = 0.5 * before / before.trace() * 6 + 0.5 * torch.eye(6)
    torch.testing.assert_close(
        half.weight.double(), torch.linalg.inv(torch.from_numpy(sqrtm(mixed.numpy()).real)), atol=1e-4, rtol=1e-3
    )
    still = WithinClassWhitening(centred, *fitted_to, shrinkage=1.0)
    torch.testing.assert_close(still.weight, torch.eye(6), atol=1e-5, rtol=0)


class Scaled(torch.nn.Module):
    """A model whose predictions have another length."""

    def __init__(self, model, length):
        super().__init__()
        self.model, self.length = model, length

    def forward(self, *args, **options):
        return self.length * self.model(*args, **options)


@pytest.fixture(scope="module")
def faces():
    return people(60, views=8, width=6)


@pytest.fixture(scope="module")
def centred(faces):
    return adjusted(faces, step=0.0)


@pytest.fixture(scope="module")
def common(centred, faces):
    return CanonicalCorrelation(centred, *given(faces), faces.person, shrinkage=0.3)


@pytest.mark.parametrize("length", [0.01, 40.0])
def test_a_step_is_a_share_of_the_way_whatever_the_length_of_a_prediction(faces, length):
    ridge = PoseRidge(faces.src, faces.angles, faces.target)
    short = adjusted(faces, Scaled(ridge, length), step=0.25)
    torch.testing.assert_close(seen(short, faces), seen(adjusted(faces, ridge, step=0.25), faces), atol=1e-5, rtol=0)
    x, f = (F.normalize(y, dim=1).double().numpy() for y in (faces.src, seen(ridge, faces)))
    way = x + 0.25 * (f - x)
    expected = way / np.linalg.norm(way, axis=1, keepdims=True)
    found = seen(adjusted(faces, Scaled(ridge, length), step=0.25, centring="none"), faces)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_a_prediction_of_length_1_is_that_of_a_model_in_evaluation(faces):
    noisy = torch.nn.Dropout(0.5)
    model = Scaled(RawEmbedding(), 3.0)
    model.noisy = noisy
    unit = F.normalize(faces.src, dim=1)
    found = unit_prediction(model.train(), unit, faces.angles, faces.keypoints_3d)
    torch.testing.assert_close(found, unit)
    assert not noisy.training


def test_the_pose_error_reaches_the_model(faces):
    told = []

    class Listens(RawEmbedding):
        def predict(self, unit, angles, keypoints_3d, pose_error=None):
            told.append(pose_error)
            return unit

    error = torch.full_like(faces.angles, 0.2)
    model = Adjusted(Listens(), *given(faces), pose_error=error)
    InSpace(model, Listens())(*given(faces)[:3], pose_error=2 * error, return_residual=False)
    assert [float(each.mean()) for each in told] == pytest.approx([0.2, 0.4, 0.4])


def test_a_shrunk_root_by_hand():
    """C = [[5, 4], [4, 5]] has values 1, 9 along (1, -1), (1, 1); S has .25 * those / 5 + .75 = .8, 1.2."""
    covariance = torch.tensor([[5.0, 4.0], [4.0, 5.0]], dtype=torch.double)
    low, high = 0.8**-0.5, 1.2**-0.5
    expected = torch.tensor([[high + low, high - low], [high - low, high + low]], dtype=torch.double) / 2
    torch.testing.assert_close(inverse_root(torch.linalg.eigh(covariance), 0.75), expected)


def test_another_shrinkage_is_a_fresh_fit(faces, centred):
    fitted_to = *given(faces), faces.person
    first = WithinClassWhitening(centred, *fitted_to, shrinkage=0.7)
    weight = first.weight.clone()
    other, fresh = first.with_shrinkage(0.2), WithinClassWhitening(centred, *fitted_to, shrinkage=0.2)
    torch.testing.assert_close(seen(other, faces), seen(fresh, faces))
    torch.testing.assert_close(enrolled(other, faces.front), enrolled(fresh, faces.front))
    assert torch.equal(first.weight, weight) and not torch.allclose(other.weight, weight)


def test_unshrunk_canonical_correlation_is_scipy_s_generalised_eigenproblem():
    """One side view a person, so that the covariances are those of two paired samples, centred by their means."""
    faces = people(300, views=1, width=5, noise=0.4, first=8)  # yaw -85 degrees
    x, y = (F.normalize(z, dim=1).double().numpy() for z in (faces.front, faces.src))
    x, y = x - x.mean(0), y - y.mean(0)
    empty = np.zeros((5, 5))
    values, vectors = eigh(
        np.block([[empty, x.T @ y], [y.T @ x, empty]]) / 300, np.block([[x.T @ x, empty], [empty, y.T @ y]]) / 300
    )
    correlation, of_x, of_y = values[:-6:-1], x @ vectors[:5, :-6:-1], y @ vectors[5:, :-6:-1]
    assert (correlation > 0.05).all() and (np.diff(correlation) < -0.03).all()  # directions are told apart
    for power in (0.5, 1.0):
        model = CanonicalCorrelation(adjusted(faces, step=0.0), *given(faces), faces.person, shrinkage=0.0, power=power)
        for found, expected in ((seen(model, faces), of_y), (enrolled(model, faces.front), of_x)):
            found = found.double().numpy()
            cosine = (found * expected).sum(0) / np.linalg.norm(found, axis=0) / np.linalg.norm(expected, axis=0)
            np.testing.assert_allclose(np.abs(cosine), 1, atol=1e-3)
            spread = found.std(0)
            np.testing.assert_allclose(spread / spread[0], (correlation / correlation[0]) ** power, rtol=1e-2)
        between = np.corrcoef(seen(model, faces).T, enrolled(model, faces.front).T)[:5, 5:]
        np.testing.assert_allclose(between, np.diag(correlation), atol=1e-3)  # of the same sign, too


def test_canonical_correlation_by_loops_over_people(faces, centred, common):
    """Several pictures on either side: S is people's means' covariance plus that of pictures around them."""
    x, yaw = seen(centred, faces).numpy(), np.abs(faces.angles[:, 1].numpy())
    fronts, owner = enrolled(centred, faces.front).double().numpy(), faces.person.numpy()
    means, off = {False: [], True: []}, {False: [], True: []}
    for i in range(60):
        for side in (False, True):
            pictures = x[(owner == i) & ((yaw >= np.pi / 4) == side)]
            pictures = pictures if side else np.vstack((pictures, fronts[i]))
            means[side].append(pictures.mean(0))
            off[side].extend(pictures - pictures.mean(0))
    roots = []
    for side in (False, True):
        m, o = np.array(means[side]), np.array(off[side])
        s = m.T @ m / len(m) + o.T @ o / len(o)
        roots.append(np.linalg.inv(sqrtm(0.7 * s / np.trace(s) * 6 + 0.3 * np.eye(6)).real))
    u, correlation, v = np.linalg.svd(roots[0] @ (np.array(means[False]).T @ np.array(means[True])) @ roots[1])
    weight = (correlation / correlation[0]) ** 2
    torch.testing.assert_close(  # products with the transposed have no sign to choose
        (common.of_front @ common.of_side.T).double(),
        torch.from_numpy(roots[0] @ u * weight @ v @ roots[1]),
        atol=1e-4,
        rtol=1e-3,
    )
    for found, root, basis in ((common.of_front, roots[0], u), (common.of_side, roots[1], v.T)):
        expected = root @ basis * weight @ basis.T @ root
        torch.testing.assert_close((found @ found.T).double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-3)


def test_fully_shrunk_canonical_correlation_by_hand():
    """Sf = Ss = I. Centred, the fronts are (1, 0), (-1, 0), (0, 1/2), (0, -1/2), and the side views the same, turned
    by 90 degrees: C = [[0, -2], [1/2, 0]] up to a factor, whose values are 2 and 1/2."""
    front = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]])
    side = torch.tensor([[0.0, -1.0], [0.0, 1.0], [0.5, 0.0], [-0.5, 0.0]])

    class AsTheyAre(RawEmbedding):
        def predict(self, unit, angles, keypoints_3d, pose_error=None):
            return unit * torch.tensor([1.0, 1.0, 0.5, 0.5])[:, None]

        def enrol(self, front):
            return self.predict(front, None, None)

    angles = torch.tensor([0.0, 1.0, 0.0]).expand(4, 3)
    given = side, angles, torch.zeros(4, 5, 3), front, torch.arange(4)
    model = CanonicalCorrelation(AsTheyAre(), *given, shrinkage=1.0)
    torch.testing.assert_close(model.of_front.abs(), torch.tensor([[1.0, 0.0], [0.0, 0.25]]))  # (1/2) / 2 is a quarter
    torch.testing.assert_close(model.of_side.abs(), torch.tensor([[0.0, 0.25], [1.0, 0.0]]))
    found = model(side, angles, given[2], return_residual=False)  # of lengths 1, and 1/2 which are scaled back
    torch.testing.assert_close(F.normalize(found, dim=1), F.normalize(enrolled(model, front), dim=1))


def test_other_settings_are_fresh_fits(faces, centred, common):
    before = common.of_front.clone()
    several = common.with_settings(0.05, (0.5, 1.0, 0.0))
    for model, power in zip(several, (0.5, 1.0, 0.0), strict=True):
        fresh = CanonicalCorrelation(centred, *given(faces), faces.person, 0.05, power)
        torch.testing.assert_close(seen(model, faces), seen(fresh, faces))
        torch.testing.assert_close(enrolled(model, faces.front), enrolled(fresh, faces.front))
    assert torch.equal(common.of_front, before)
    torch.testing.assert_close(common.with_settings(0.3, (1.0,))[0].of_front, before)


@pytest.mark.parametrize(("yaw", "side"), [(44.9, False), (45.1, True), (-44.9, False), (-45.1, True), (170.0, True)])
def test_a_view_is_mapped_by_the_side_of_the_boundary_that_it_is_on(faces, centred, common, yaw, side):
    angles = torch.tensor([[1.0, np.deg2rad(yaw), 1.0]]).float()
    unit, points = F.normalize(faces.src[:1], dim=1), faces.keypoints_3d[:1]
    expected = centred.predict(unit, angles, points) @ (common.of_side if side else common.of_front)
    torch.testing.assert_close(common.predict(unit, angles, points), expected)


def test_the_boundary_can_be_moved_and_somebody_must_be_beyond(faces, centred):
    frontal = faces.where(faces.abs_yaw < 45)
    with pytest.raises(ValueError, match="people with views beyond 45 degrees of yaw"):
        CanonicalCorrelation(centred, *given(frontal), frontal.person, shrinkage=0.5)
    fitted_to = *given(frontal), frontal.person
    model = CanonicalCorrelation(centred, *fitted_to, shrinkage=0.5, boundary=30.0)
    assert model._is_side(frontal.angles).tolist() == (frontal.abs_yaw >= 30).tolist()
    with pytest.raises(ValueError, match="beyond 40 degrees"):
        CanonicalCorrelation(centred, *fitted_to, shrinkage=0.5, boundary=40.0)


def test_people_without_side_views_count_for_nothing(faces, centred):
    """They have no pair of means, and their fronts are left out of the fronts' covariance."""
    some = faces.where((faces.person < 40) | (faces.abs_yaw < 45))
    only = faces.select(torch.arange(40))
    found = CanonicalCorrelation(centred, *given(some), some.person, shrinkage=0.3)
    fresh = CanonicalCorrelation(centred, *given(only), only.person, shrinkage=0.3)
    torch.testing.assert_close(found.of_front @ found.of_side.T, fresh.of_front @ fresh.of_side.T)


def test_in_a_space_no_step_is_the_space_and_a_whole_one_is_the_model(faces, common):
    z = F.normalize(seen(common, faces).float(), dim=1)
    model = Scaled(PoseRidge(z, faces.angles, torch.randn(len(z), 6)), 7.0)
    f = F.normalize(model(z, faces.angles, faces.keypoints_3d, return_residual=False), dim=1)
    way = z.double() + 0.25 * (f - z)
    for step, expected in ((0.0, z), (1.0, f), (0.25, way / way.norm(dim=1, keepdim=True))):
        torch.testing.assert_close(seen(InSpace(common, model, step), faces), expected.double(), atol=1e-5, rtol=0)
    fronts = enrolled(common, faces.front)
    torch.testing.assert_close(
        enrolled(InSpace(common, model, 1.0), faces.front), fronts / fronts.norm(dim=1, keepdim=True)
    )


def test_the_model_in_a_space_is_told_keypoints(faces, common):
    class Told(torch.nn.Module):
        def forward(self, src, angles, keypoints_3d, **_):
            return src + 0.01 * keypoints_3d.flatten(1)[:, : src.shape[1]]

    moved = replace(faces, keypoints_3d=faces.keypoints_3d + 5)
    assert not torch.allclose(seen(InSpace(common, Told()), faces), seen(InSpace(common, Told()), moved))


def test_the_cosine_of_a_sum_is_the_weighted_sum_of_cosines(faces, centred, common):
    members, weights = (RawEmbedding(), common, centred), (0.5, 0.2, 0.3)

    def cosines(model):
        a, b = seen(model, faces).numpy(), enrolled(model, faces.front).double().numpy()
        return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)

    expected = sum(weight * cosines(member) for weight, member in zip(weights, members, strict=True))
    np.testing.assert_allclose(cosines(Summed(members, weights)), expected, atol=1e-5)
    np.testing.assert_allclose(cosines(Summed(members[:2], (0.0, 1.0))), cosines(common), atol=1e-5)


@pytest.mark.parametrize("weights", [(0.5, 0.4), (1.0,), (0.5, 0.3, 0.2), (1.2, -0.2), ()])
def test_weights_of_a_sum_add_up_to_1(weights):
    with pytest.raises(ValueError, match="2 members need as many weights that add up to 1, got"):
        Summed((RawEmbedding(), RawEmbedding()), weights)


def test_what_is_summed_moves_and_is_saved_with_it(faces, centred, common):
    model = Summed((common, centred), (0.5, 0.5))
    other = Summed(
        (CanonicalCorrelation(centred, *given(faces), faces.person, 0.9), adjusted(people(20, width=6), step=0.0)),
        (0.5, 0.5),
    )
    assert not torch.allclose(seen(model, faces), seen(other, faces), atol=1e-3)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(seen(other, faces), seen(model, faces))


def test_summed_models_have_no_residual(faces, centred):
    both = Summed((centred, centred), (0.5, 0.5))
    with pytest.raises(ValueError, match="ask for the embeddings with return_residual=False"):
        both(faces.src, **faces.conditions())


def test_centring_is_fitted_to_what_the_model_and_its_step_make_of_the_views(faces):
    """The least squares of u = x + step (f(x) - x) of length 1, given the residual or not."""
    ridge = PoseRidge(faces.src, faces.angles, faces.target, residual=True)
    unit = F.normalize(faces.src, dim=1)
    way = F.normalize(ridge.predict(unit, faces.angles, faces.keypoints_3d), dim=1) - unit
    u = F.normalize(unit + 0.4 * way, dim=1).double().numpy()
    yaw = faces.angles[:, 1].double().numpy()
    terms = np.stack([np.ones_like(yaw), np.cos(yaw), np.cos(2 * yaw)], 1)
    wanted = np.linalg.lstsq(terms, u, rcond=None)[0]
    for residual in (None, way):
        found = adjusted(faces, ridge, step=0.4, residual=residual)
        np.testing.assert_allclose(found.weight.numpy(), wanted, atol=2e-3)
        left = found.predict(unit, faces.angles, faces.keypoints_3d)
        np.testing.assert_allclose(left.numpy(), u - terms @ wanted, atol=2e-3)
    other = adjusted(faces, ridge, step=0.4, residual=-way)  # what is given is believed
    assert np.abs(other.weight.numpy() - wanted).max() > 0.01


def test_a_model_of_a_whole_step_goes_the_whole_way_by_default(faces):
    ridge = PoseRidge(faces.src, faces.angles, faces.target, residual=True)
    unit = F.normalize(faces.src, dim=1)
    found = adjusted(faces, ridge, centring="none").predict(unit, faces.angles, faces.keypoints_3d)
    torch.testing.assert_close(found, F.normalize(ridge.predict(unit, faces.angles, faces.keypoints_3d), dim=1))
