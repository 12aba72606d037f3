"""Rates with wrong inputs, larger galleries, and where density lies."""

from dataclasses import replace

import pytest
import torch
from studies_fixture import TOY, small_split

from viewdiff_nb.faces.geometry import normalise_keypoints, rotation_matrix
from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.modules.projection import KEYPOINT_REACH, KEYPOINT_WIDTH, voxel_centres
from viewdiff_nb.studies.robustness import fused, geometry, robustness
from viewdiff_nb.training.checkpoint import build_model


@pytest.fixture(scope="module")
def split():
    return small_split()


def test_errors_that_a_model_does_not_look_at_cost_nothing(split):
    found = robustness(RawEmbedding(), split)
    faces = split.test
    plain = recognition_by_yaw(faces.src, faces.front, faces.person, faces.abs_yaw)["all"]["rank1"]
    assert {found[name]["rank1"] for name in found if name.startswith(("pose", "keypoints"))} == {plain}
    sizes = [75, 150, 40, 240, 40 + 40 + len(split.train.names)]
    galleries = [int(name.split()[1]) for name in found if name.startswith("gallery")]
    assert set(galleries) <= set(sizes)
    larger = [found[f"gallery {size}"]["rank1"] for size in sorted(set(galleries) - {75, 150})]
    assert larger == sorted(larger, reverse=True)  # more people can only be in the way


def test_errors_that_a_model_looks_at_change_its_answers(split):
    class Turned(RawEmbedding):
        def predict(self, unit, angles, keypoints_3d, pose_error=None):
            return unit * (1 + angles[:, 1:2].sin().sign() * torch.linspace(-3, 3, unit.shape[1]))

    found = robustness(Turned(), split)
    assert found["pose 0°"] != found["pose 20°"] and found["keypoints 20%"] == found["pose 0°"]


def test_groups_are_of_one_person_and_their_mean_is_of_length_one(split):
    predicted, faces = fused(split.test.src, split.test, 3)
    assert len(predicted) == len(faces) == 40 * 4
    torch.testing.assert_close(predicted.norm(dim=1), torch.ones(len(predicted)))
    own = (predicted @ torch.nn.functional.normalize(split.test.front, dim=1).T).argmax(1)
    assert (own == faces.person).float().mean() > 0.5


def test_the_share_of_the_grid_near_a_keypoint(split):
    config = replace(TOY, use_projection_layer=True, voxel_resolution=8)
    found = geometry(build_model(config, split.val.feature_dim), split.val)
    views = split.val.where(torch.arange(0, len(split.val), max(1, len(split.val) // 256)))
    own = normalise_keypoints(views.keypoints_3d[:]) * KEYPOINT_REACH @ rotation_matrix(views.angles)
    apart = (voxel_centres(8).view(1, -1, 1, 3) - own[:, None]).norm(dim=-1).amin(2)
    within = KEYPOINT_WIDTH * (2 * torch.log(torch.tensor(2.0))).sqrt()  # where a Gaussian is one half
    assert found["volume"] == pytest.approx((apart < within).float().mean().item(), abs=1e-3)
    assert 0 < found["stopped"] < 1 and 0 <= found["near"] <= 1
    assert geometry(RawEmbedding(), split.val) == {}
