from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import people
from studies_fixture import TINY

from viewdiff_nb.modules.baselines import Frontaliser, RawEmbedding
from viewdiff_nb.studies import real_points
from viewdiff_nb.studies.operating_points import RULES
from viewdiff_nb.studies.real_benchmark import stand_in
from viewdiff_nb.studies.real_points import fold_models, run_points
from viewdiff_nb.studies.store import Store


class Other(Frontaliser):
    """Side views are drawn to one direction, so that impostors are the closer the larger the yaw."""

    def predict(self, unit, angles, keypoints_3d, pose_error=None):
        return 3 * (unit + 0.5 * angles[:, 1:2].abs() * F.normalize(torch.ones_like(unit), dim=1))


@pytest.fixture(scope="module")
def benchmark():
    return stand_in(people(60, views=12, noise=0.6))


def test_models_know_neither_the_fold_nor_those_who_choose(benchmark, monkeypatch):
    fitted, chosen, configs = [], [], []

    def trained(config, build, bases, faces, seed, wanted):
        configs.append((config, bases))
        fitted.append(faces.names)
        yield 1.0, RawEmbedding()

    def choose(model, train, val, far=0.0):
        fitted.append(train.names)
        chosen.append(val.names)
        return RawEmbedding()

    monkeypatch.setattr(real_points, "trainings", trained)
    monkeypatch.setattr(real_points, "drop_in", choose)
    monkeypatch.setattr(real_points, "base_model", lambda config, base, width: Other())
    models, val = fold_models(benchmark, replace(TINY, real_epochs=8), ["base"], 3)
    names = ["ridge", "transformer", "pretrained transformer", "pretrained, fine-tuned"]
    assert list(models) == ["raw", *(full for name in names for full in (name, f"{name}, drop-in"))]
    tested = {benchmark.faces.names[i] for i in (benchmark.fold == 3).nonzero()[:, 0]}
    assert len(set(fitted)) == len(set(chosen)) == 1 and val.names == chosen[0]
    train = set(fitted[0])
    assert not tested & train and not tested & set(val.names) and not train & set(val.names)
    assert (len(tested), len(train), len(val.names)) == (6, 36, 18)
    (small, none), (tuned, base) = configs
    assert small.epochs == tuned.epochs == 2 and (none, base) == ((), ["base"]) and tuned.lr < small.lr
    assert list(fold_models(benchmark, TINY, [], 3)[0])[-1] == "transformer, drop-in"


def test_what_was_counted_is_reused(tmp_path, benchmark, monkeypatch):
    """Every person is tested once, by models of the other folds; a second run makes nothing."""
    profile, store = replace(TINY, real_epochs=1), Store(benchmark.as_split, tmp_path)
    found = run_points(benchmark, profile, workers=1, store=store)
    assert {model for model, _ in found} == {
        "raw", "ridge", "ridge, drop-in", "transformer", "transformer, drop-in"
    }  # fmt: skip
    views = torch.bincount(benchmark.faces.person, minlength=60)
    order = torch.cat([(benchmark.fold == fold).nonzero()[:, 0] for fold in range(10)])
    for counts in found.values():
        assert counts.shape == (5, 60, 6)
        assert counts[:, :, 1].sum(0).tolist() == views[order].tolist()
        assert torch.equal(counts[:, :, 3], 5 * counts[:, :, 1])
    own, cosine = found["raw", RULES[0]].sum(0)[:, [1, 5]].T
    faces = benchmark.faces
    raw = (F.normalize(faces.src, dim=1) * F.normalize(faces.target, dim=1)).sum(1)
    expected = torch.stack([raw[faces.person == i].mean() for i in order.tolist()]).double()
    torch.testing.assert_close(cosine / own, expected, atol=1e-5, rtol=0)
    monkeypatch.setattr(real_points, "fold_models", lambda *_: pytest.fail("made again"))
    again = run_points(benchmark, profile, workers=1, store=store)
    assert list(again) == list(found) and all(torch.equal(again[key], found[key]) for key in found)
    with pytest.raises(pytest.fail.Exception, match="made again"):
        run_points(benchmark, replace(profile, real_epochs=5), workers=1, store=store)


@pytest.mark.parametrize("folds", [4, 5, 7])
def test_few_folds_leave_people_to_train_on(benchmark, monkeypatch, folds):
    few = replace(benchmark, fold=benchmark.fold % folds)
    monkeypatch.setattr(real_points, "trainings", lambda *_: iter([(1.0, RawEmbedding())]))
    monkeypatch.setattr(real_points, "drop_in", lambda model, train, val: model)
    _, val = fold_models(few, TINY, [], 0)
    assert 0 < len(val.names) <= len(few.faces.names) / 2
