"""The shipped set of another recogniser, 192 numbers wide: nothing may assume 512."""

import pytest
import torch
from mirror import has_mirrored_halves

from viewdiff_nb.faces import load_face_views, split_by_person
from viewdiff_nb.files import HEADS
from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.result import predict

HEADS_192 = HEADS.with_name("heads_192")
SMALL = {"d_model": 64, "nhead": 4, "num_layers": 2, "dim_feedforward": 96, "voxel_resolution": 4}


@pytest.fixture(scope="module")
def faces():
    return load_face_views(HEADS_192)


def test_the_set_is_what_its_card_says(faces):
    assert len(faces.names) == 400 and len(faces) == 6400 and faces.feature_dim == 192
    assert torch.bincount(faces.person).unique().tolist() == [16]
    assert not has_mirrored_halves(HEADS_192)  # the crop's embedding alone
    torch.testing.assert_close(faces.front.norm(dim=1), torch.ones(400), atol=1e-3, rtol=0)


def test_its_people_are_not_those_of_the_first_set(faces):
    first = load_face_views(HEADS, mmap=True)
    assert not torch.equal(first.angles[:6400], faces.angles)


@pytest.mark.parametrize("folder", [HEADS, HEADS_192], ids=lambda folder: folder.name)
def test_raw_rates_are_those_of_the_card(folder):
    faces = load_face_views(folder)
    rates = recognition_by_yaw(faces.src, faces.front, faces.person, faces.abs_yaw)
    card = (folder / "README.md").read_text(encoding="utf-8")
    for name in ("0-30", "30-45", "45-60", "60-75", "75-90"):
        row = next(line for line in card.splitlines() if line.startswith(f"| {name.replace('-', '–')}°"))
        published = [float(cell) for cell in row.split("|")[2:-1]]
        measured = [rates[name][rate] for rate in ("cosine", "rank1", "tar", "auc")]
        assert measured == pytest.approx(published, abs=6e-4), name


@pytest.mark.parametrize("modules", [("use_lora_attention", "use_projection_layer"), ("use_cross_view",)])
def test_a_model_trains_on_it_and_predicts(faces, modules):
    split = split_by_person(faces, val=60, test=80)
    config = TrainConfig(**SMALL, epochs=1, batch_size=100, n_views=5, **dict.fromkeys(modules, True))
    run = train(config, split.train, split.val, progress=False)
    assert run.history["train_loss"].notna().all() and run.steps >= 39
    test = split.test
    predicted = predict(run.model, test)
    assert predicted.shape == test.src.shape == (80 * 16, 192) and predicted.isfinite().all()
    assert not torch.equal(predicted, test.src)
    rates = recognition_by_yaw(predicted, test.front, test.person, test.abs_yaw)
    assert rates["all"]["views"] == len(test) and 5 / 80 < rates["all"]["rank1"] <= 1
