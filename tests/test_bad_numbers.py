"""Numbers that come up by mistake: one clear error, or the right answer."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONFIG, people, sets
from torch import Tensor, nn

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.predict import frontal_embeddings
from viewdiff_nb.training import TrainConfig, TrainingDiverged, train
from viewdiff_nb.training.checkpoint import build_model

ADAPTED = {"use_lora_attention": True, "use_projection_layer": True, "rank": 4}
LINE = torch.linspace(-1, 1, 5)[:, None] * torch.tensor([1.0, 2.0, 3.0])
ONE = replace(CONFIG, epochs=1)


def model(**options) -> nn.Module:
    torch.manual_seed(0)
    built = build_model(replace(CONFIG, **options), 32)
    nn.init.normal_(built.output.weight, std=0.1)
    return built.eval()


def trained(config: TrainConfig = ONE, change: Callable[[FaceViews], FaceViews] = lambda faces: faces) -> float:
    """The loss, of weights that are finite."""
    faces, val = sets()
    result = train(config, change(faces), val, progress=False)
    assert all(p.isfinite().all() for p in result.model.parameters())
    return result.history["train_loss"].iloc[-1]


def with_keypoints(points: Tensor) -> Callable[[FaceViews], FaceViews]:
    return lambda faces: replace(faces, keypoints_3d=points.expand(len(faces), 5, 3).contiguous())


def some(people: int) -> Callable[[FaceViews], FaceViews]:
    return lambda faces: faces.select(torch.arange(people))


TRAINED = {
    "collinear keypoints": (replace(ONE, **ADAPTED), with_keypoints(LINE)),
    "coincident keypoints": (replace(ONE, **ADAPTED), with_keypoints(torch.zeros(5, 3))),
    "all views equal": (ONE, lambda faces: replace(faces, src=faces.src[:1].expand_as(faces.src).contiguous())),
    "one view of each": (ONE, lambda faces: faces.sample_views(1, torch.Generator())),
    "two people": (ONE, some(2)),
    "a batch larger than the set": (replace(ONE, batch_size=4096), lambda faces: faces),
    "rank as large as the layer": (replace(ONE, **ADAPTED | {"rank": 32}), lambda faces: faces),
    "poses far out of range": (ONE, lambda faces: replace(faces, angles=faces.angles + 1e4)),
    "keypoints beyond float16": (
        replace(ONE, use_amp=True, **ADAPTED),
        lambda faces: replace(faces, keypoints_3d=1e6 * faces.keypoints_3d),
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_what_trains(case):
    assert np.isfinite(trained(*TRAINED[case]))


REFUSED = {
    "one person": (lambda: trained(change=some(1)), "at least 2 people, got 1"),
    "nobody": (lambda: trained(change=some(0)), "no training view has"),
    "nobody validates": (lambda: train(ONE, sets()[0], sets()[1].select(torch.arange(0))), "got 0 validation people"),
    "one validates": (lambda: train(ONE, sets()[0], sets()[1].select(torch.arange(1))), "got 1 validation people"),
    "two widths": (
        lambda: train(ONE, sets()[0], people(30, width=16, first=1000)),
        "training embeddings are 32 wide, those to validate with 16",
    ),
    "rank beyond the layer": (lambda: replace(ONE, **ADAPTED | {"rank": 33}), "rank must not exceed 32"),
    "resolution 3": (
        lambda: trained(replace(ONE, **ADAPTED, voxel_resolution=3)),
        "voxel_resolution must be at least 4, got 3",
    ),
    "a pose that is no number": (
        lambda: frontal_embeddings(model(), np.ones((2, 32)), np.array([[0, 0, 0], [0, np.nan, 0]])),
        "row 1: its pose is not finite",
    ),
    "an embedding too long for its prediction": (
        lambda: frontal_embeddings(model(), np.stack((np.ones(32), np.full(32, 1e30))), np.zeros((2, 3))),
        "row 1: its prediction is not finite",
    ),
    "infinite predictions": (
        lambda: rates(torch.full((2, 2), torch.inf), torch.eye(2)),
        "predicted and gallery embeddings must be finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    act, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        act()


DIVERGED = {
    "a huge rate": (replace(ONE, lr=1e30), lambda faces: faces, "is the first that is not finite"),
    "keypoints that are no numbers": (
        replace(ONE, **ADAPTED),
        with_keypoints(torch.full((5, 3), torch.nan)),
        "keypoints_3d is not finite in 16 of 16 samples",
    ),
}


@pytest.mark.parametrize("case", DIVERGED)
def test_what_diverges_says_where(case):
    config, change, message = DIVERGED[case]
    with pytest.raises(TrainingDiverged, match=message):
        trained(config, change)


def rates(predicted: Tensor, gallery: Tensor) -> dict[str, float]:
    person = torch.arange(len(predicted)) % len(gallery)
    return recognition_by_yaw(predicted, gallery, person, torch.zeros(len(predicted)))["all"]


def test_ties_and_lengthless_fronts_are_misses_and_one_impostor_tells_no_rate():
    assert rates(torch.ones(4, 3), torch.ones(2, 3))["rank1"] == 0
    assert rates(torch.ones(2, 2), torch.zeros(2, 2))["rank1"] == 0
    one = rates(torch.tensor([[1.0, 0.0]]), torch.eye(2))
    assert one["rank1"] == one["auc"] == 1 and np.isnan(one["tar"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_short_and_empty_batches_and_large_values_under_autocast(count, dtype):
    faces = people(2)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        for factor in (1.0, 6e4):
            points = factor * faces.keypoints_3d[:count]
            found = model(**ADAPTED)(factor * faces.src[:count], faces.angles[:count], points)
            assert found.shape == (count, 32) and found.isfinite().all()


@pytest.mark.parametrize("points", [LINE, torch.zeros(5, 3)], ids=["collinear", "coincident"])
def test_a_projection_that_reads_the_pose_off_such_keypoints(points):
    layer = model(**ADAPTED).projection
    nn.init.normal_(layer.expand.weight)
    src = people(2).src[:4].requires_grad_()
    layer(src, points.expand(4, 5, 3)).sum().backward()
    assert src.grad.isfinite().all()
