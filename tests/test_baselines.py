import math

import pytest
import torch
import torch.nn.functional as F
from conftest import people
from sklearn.linear_model import Ridge

from viewdiff_nb.modules.baselines import DREAM, MLP, MeanFace, PoseRidge, RawEmbedding, enrolled


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


def test_a_transformer_is_enrolled_as_it_is():
    front = torch.randn(3, 16)
    assert enrolled(torch.nn.Identity(), front) is front


def test_an_mlp_adds_what_its_layers_say():
    model = MLP(32, hidden=8).eval()
    torch.nn.init.constant_(model.layers[-1].bias, 0.25)
    faces = people(3)
    predicted = model(faces.src, faces.angles, faces.keypoints_3d, return_residual=False)
    wanted = F.normalize(faces.src, dim=1) + 0.25
    torch.testing.assert_close(F.normalize(predicted, dim=1), F.normalize(wanted, dim=1))


def test_what_a_ridge_sees_by_hand():
    """[x, x sin(yaw), x cos(yaw), sines, cosines, 1], with x scaled to entries of order 1."""
    unit, angles = (
        F.normalize(torch.randn(3, 4), dim=1),
        torch.tensor([[0.1, 0.2, 0.3], [0.0, -1.2, 0.5], [0.4, 0.0, 0.0]]),
    )
    for row, x, (pitch, yaw, roll) in zip(PoseRidge._design(unit, angles), 2 * unit, angles.tolist(), strict=True):
        code = [math.sin(a) for a in (pitch, yaw, roll)] + [math.cos(a) for a in (pitch, yaw, roll)]
        wanted = torch.cat((x, x * math.sin(yaw), x * math.cos(yaw), torch.tensor([*code, 1.0])))
        torch.testing.assert_close(row, wanted)


def test_only_a_residual_ridge_adds_its_input():
    faces = people(20)
    for residual in (False, True):
        model = PoseRidge(faces.src, faces.angles, faces.target, residual=residual)
        unit = F.normalize(faces.src, dim=1)
        wanted = model._design(unit, faces.angles) @ model.weight + residual * unit
        torch.testing.assert_close(model.predict(unit, faces.angles, faces.keypoints_3d), wanted)


def test_dream_by_hand():
    dream, x = DREAM(4), torch.randn(2, 4)
    first, _, second, _ = dream.layers
    wanted = (second.weight @ (first.weight @ x.T + first.bias[:, None]).clamp_min(0) + second.bias[:, None]).T
    torch.testing.assert_close(dream.layers(x), wanted.clamp_min(0))
