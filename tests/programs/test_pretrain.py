"""What the programs around the shipped weights measure with, by counting."""

from dataclasses import replace

import numpy as np
import pose_error
import pretrain
import pytest
import torch
import torch.nn.functional as F
import zero_shot
from conftest import CONFIG, network_that_moves, people

from viewdiff_nb.faces.geometry import MEAN_FACE, rotation_matrix
from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.studies.adaptation import FULL_PROFILE
from viewdiff_nb.training.checkpoint import build_model, prepare_model, save_checkpoint


@pytest.fixture(scope="module")
def faces():
    return people(40, views=16, noise=0.6)


def test_half_of_the_views_tell_no_keypoints(faces):
    found = pretrain.without_keypoints(faces).keypoints_3d
    turned = torch.stack([torch.tensor(MEAN_FACE) @ rotation_matrix(a).T for a in faces.angles])
    unknown = torch.isclose(found, turned, atol=1e-5).flatten(1).all(1)
    assert torch.equal(found[~unknown], faces.keypoints_3d[~unknown]) and 0.4 < unknown.float().mean() < 0.6


def test_rates_at_a_threshold_by_counting(faces):
    rows = pretrain.rows_of(RawEmbedding(), faces, 0.3)
    a, b = (F.normalize(x, dim=1).numpy() for x in (faces.src, faces.front))
    inside = (faces.abs_yaw >= 45).numpy()
    right, wrong, first, own = [], [], [], []
    for view, person in zip(a[inside], faces.person[inside].tolist(), strict=True):
        cosines = b @ view
        own.append(cosines[person])
        right.append(cosines[person] >= 0.3)
        wrong.append(np.delete(cosines >= 0.3, person).mean())
        first.append(cosines.argmax() == person)
    means = [float(cell.split(" ± ")[0]) for cell in rows["45-90"].values()]
    np.testing.assert_allclose(
        means, [100 * np.mean(right), 100 * np.mean(wrong), 100 * np.mean(first), np.mean(own)], atol=0.06
    )
    assert 0 < np.mean(right) < 1 and 0 < np.mean(first) < 1 and np.mean(wrong) > 0


def test_fewer_people_and_views_make_as_many_samples(faces):
    half, quarter = zero_shot.Row(people=0.5), zero_shot.Row(views=0.25)
    some = zero_shot.fewer(faces, half)
    assert some.names == faces.names[:20] and len(some) == 20 * 16
    some = zero_shot.fewer(faces, quarter)
    assert len(some.names) == 40 and torch.bincount(some.person).tolist() == [4] * 40
    assert some.abs_yaw.max() > 60 and some.abs_yaw.min() < 30  # from all over the range
    epochs = [zero_shot.config_of(FULL_PROFILE, row, 0, None).epochs for row in (zero_shot.Row(), half, quarter)]
    assert epochs == [16, 32, 64]


def test_several_fronts_are_the_mean_of_what_is_near(faces):
    found = zero_shot.several_fronts(faces).front
    near = (faces.person == 7) & (faces.abs_yaw < 15)
    assert near.sum() == 2
    total = F.normalize(faces.front[7], dim=0) + F.normalize(faces.src[near], dim=1).sum(0)
    torch.testing.assert_close(found[7], total / total.norm())


def test_the_prior_toward_raw_preserves_the_raw_embedding(faces, tmp_path):
    """The base is a model without training, whose residual is zero."""
    untrained = build_model(CONFIG, faces.feature_dim, base=True)
    save_checkpoint(tmp_path / "base.pth", {"model": untrained.state_dict()})
    row = zero_shot.Row(options=zero_shot.toward_raw(1.0, 180.0))
    config = zero_shot.config_of(FULL_PROFILE, row, 0, tmp_path / "base.pth")
    assert config.use_prior_preservation and config.lambda_prior == 1.0 and config.prior_max_yaw == 180.0
    config = replace(CONFIG, base_model_path=config.base_model_path, use_prior_preservation=True)
    model, base = prepare_model(config, faces.feature_dim)
    for each in (model, base):
        residual = each.eval()(faces.src, faces.angles, faces.keypoints_3d)
        assert torch.equal(residual, torch.zeros_like(residual))
    assert model.requires_grad_ and any(p.requires_grad for p in model.parameters())


def test_the_mean_of_several_networks():
    x = F.normalize(torch.randn(3, 4), dim=1)
    found = zero_shot.Mean([RawEmbedding(), RawEmbedding()]).predict(x, torch.zeros(3, 3), torch.zeros(3, 5, 3))
    torch.testing.assert_close(found, x)


def test_a_step_of_zero_knows_no_pose(faces):
    network = network_that_moves(faces.feature_dim)
    exact, wrong = (pose_error.hits(network, faces, noise, True) for noise in (0.0, 20.0))
    assert torch.equal(exact[0.0], wrong[0.0]) and not torch.equal(exact[1.0], wrong[1.0])
