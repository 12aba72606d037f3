import pytest
import torch
import torch.nn.functional as F
from conftest import people
from scipy.linalg import sqrtm
from sklearn.linear_model import Ridge

from viewdiff_nb.modules.baselines import (
    DREAM,
    MLP,
    Adjusted,
    MeanFace,
    PoseRidge,
    RawEmbedding,
    WithinClassWhitening,
    enrolled,
)


def all_baselines(faces):
    return [
        RawEmbedding(),
        MeanFace(faces.front),
        PoseRidge(faces.src, faces.angles, faces.target),
        DREAM(faces.feature_dim),
        MLP(faces.feature_dim).eval(),
    ]


def test_behave_as_the_model_does():
    faces = people(10)
    for model in all_baselines(faces):
        frontal = model(faces.src, **faces.conditions(), return_residual=False)
        residual = model(faces.src, **faces.conditions())
        assert frontal.shape == faces.src.shape
        torch.testing.assert_close(faces.src + residual, frontal)
        torch.testing.assert_close(model(3 * faces.src, **faces.conditions(), return_residual=False), 3 * frontal)


def test_raw_and_mean_face():
    faces = people(10)
    assert torch.equal(RawEmbedding()(faces.src, **faces.conditions()), torch.zeros_like(faces.src))
    mean = MeanFace(7 * faces.front)(faces.src, **faces.conditions(), return_residual=False)
    torch.testing.assert_close(mean[3], F.normalize(faces.front.mean(0), dim=0))


def test_ridge_equals_scikit_learn():
    faces = people(30)
    z = PoseRidge._design(faces.src, faces.angles)
    reference = Ridge(alpha=2.0, fit_intercept=False, solver="cholesky").fit(z.double().numpy(), faces.target.numpy())
    model = PoseRidge(faces.src, faces.angles, faces.target, strength=2.0)
    torch.testing.assert_close(model.weight.T, torch.from_numpy(reference.coef_).float(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="strength must be positive, got 0"):
        PoseRidge(faces.src, faces.angles, faces.target, strength=0)


def test_dream_gate_is_closed_at_the_front_and_open_at_the_side():
    dream, x = DREAM(16), F.normalize(torch.randn(3, 16), dim=1)
    angles = torch.zeros(3, 3)
    angles[:, 1] = torch.tensor([0.0, 45.0, -90.0]).deg2rad()
    residual = dream(x, angles, torch.zeros(3, 5, 3))
    full = dream.layers(x * 4) / 4
    torch.testing.assert_close(residual, full * torch.tensor([[4.54e-5], [0.5], [1 - 4.54e-5]]), rtol=1e-4, atol=1e-6)


def test_a_residual_ridge_is_scikit_learn_s():
    faces = people(20, views=8)
    model = PoseRidge(faces.src, faces.angles, faces.target, strength=5.0, residual=True)
    unit = F.normalize(faces.src, dim=1)
    design = PoseRidge._design(unit, faces.angles).double().numpy()
    missing = (F.normalize(faces.target, dim=1) - unit).double().numpy()
    expected = unit + torch.from_numpy(Ridge(5.0, fit_intercept=False).fit(design, missing).predict(design)).float()
    found = model(unit, faces.angles, faces.keypoints_3d, return_residual=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    strong = PoseRidge(faces.src, faces.angles, faces.target, strength=1e12, residual=True)
    torch.testing.assert_close(strong(unit, faces.angles, faces.keypoints_3d, return_residual=False), unit)


def adjusted(faces, model=None, **options):
    return Adjusted(model, faces.src, faces.angles, faces.keypoints_3d, faces.front, **options)


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
    given = faces.src, faces.angles, faces.keypoints_3d, faces.front, faces.person
    model = WithinClassWhitening(centred, *given, shrinkage=0.0)

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
    half = WithinClassWhitening(centred, *given, shrinkage=0.5)
    mixed = 0.5 * before / before.trace() * 6 + 0.5 * torch.eye(6)
    torch.testing.assert_close(
        half.weight.double(), torch.linalg.inv(torch.from_numpy(sqrtm(mixed.numpy()).real)), atol=1e-4, rtol=1e-3
    )
    still = WithinClassWhitening(centred, *given, shrinkage=1.0)
    torch.testing.assert_close(still.weight, torch.eye(6), atol=1e-5, rtol=0)


def test_a_transformer_is_enrolled_as_it_is():
    front = torch.randn(3, 16)
    assert enrolled(torch.nn.Identity(), front) is front
