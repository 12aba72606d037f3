"""What is scored of a validation set, and sets that a run refuses before it trains."""

from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, people

from viewdiff_nb.modules.adjusted import Summed
from viewdiff_nb.modules.baselines import MLP, MeanFace, RawEmbedding
from viewdiff_nb.training import result
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.losses import LOSSES
from viewdiff_nb.training.result import evaluate, predict, probes_to_score

CROSS = replace(CONFIG, use_cross_view=True, n_views=4, batch_size=16, epochs=1)


def uneven(count=30):
    """People with one to six views."""
    faces = people(count, first=1000)
    return faces.where(torch.arange(len(faces)) % 6 <= faces.person % 6)


@pytest.mark.parametrize("config", [CONFIG, CROSS], ids=["views", "groups"])
def test_as_many_probes_are_told_as_are_scored(config, monkeypatch):
    scored = []
    original = result.recognition_by_yaw
    monkeypatch.setattr(result, "recognition_by_yaw", lambda p, *a: scored.append(len(p)) or original(p, *a))
    faces, model = uneven(), build_model(config, 32)
    evaluate(model, faces, LOSSES["cosine"])
    assert scored == [probes_to_score(config, faces)] == [probes_to_score(model, faces)]
    views = torch.bincount(faces.person).tolist()
    assert scored == [sum(n // 4 for n in views) if config is CROSS else sum(views)]
    assert probes_to_score(MLP(32), faces) == sum(views)


def test_groups_of_views_are_counted_before_training():
    """20 people with 6 views: 2,280 pairs of views with impostors, 380 of groups of four."""
    faces = people(20, first=1000)
    train(replace(CONFIG, epochs=1, monitor="val_tar"), people(40), faces, progress=False)
    told = "20 validation people with 20 predictions make 380 impostor pairs"
    with pytest.raises(ValueError, match=told):
        train(
            replace(CROSS, monitor="val_tar"),
            people(40),
            faces,
            on_epoch=lambda _: pytest.fail("trained"),
            progress=False,
        )


def test_one_validation_person_is_found_before_training():
    with pytest.raises(ValueError, match="validation needs 2 people or more"):
        train(CONFIG, people(40), people(1, first=1000), on_epoch=lambda _: pytest.fail("trained"), progress=False)


def test_one_person_is_nobody_to_be_told_from():
    with pytest.raises(ValueError, match="at least 2 people.*got 1"):
        train(replace(CONFIG, epochs=1), people(1), people(30, first=1000), progress=False)
    faces = people(40)
    seen = faces.where((faces.person == 3) | (faces.abs_yaw > 60))  # one of them below 45 degrees
    with pytest.raises(ValueError, match="at least 2 people.*got 1"):
        train(replace(CONFIG, epochs=1, max_yaw=45.0), seen, people(30, first=1000), progress=False)


def test_predictions_are_as_wide_as_the_model_s_answers():
    """In batches of 7, the last one shorter; two embeddings of 32 beside each other."""
    faces = people(4)
    model = Summed((RawEmbedding(), MeanFace(faces.front)), (0.25, 0.75))
    found = predict(model, faces, batch_size=7)
    mean = torch.nn.functional.normalize(faces.front.mean(0), dim=0).expand(24, 32)
    torch.testing.assert_close(found, torch.cat((0.5 * faces.src, 0.75**0.5 * mean), 1))
