"""The protocol of real benchmarks, on synthetic people whose rates are known."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import people
from studies_fixture import TINY

from viewdiff_nb.faces import split_by_person
from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.studies import real_faces, real_models
from viewdiff_nb.studies.real_benchmark import stand_in
from viewdiff_nb.studies.real_faces import choose, ranks, run_real_faces, score_fold, similarities
from viewdiff_nb.studies.real_models import Family, any_setting
from viewdiff_nb.studies.store import Store


@pytest.fixture(scope="module")
def benchmark():
    return stand_in(people(40, views=12, noise=0.6))


def test_one_front_is_the_first_frontal_picture(benchmark):
    faces = benchmark.faces
    first = [int(((faces.person == i) & (faces.abs_yaw < 45)).nonzero()[0]) for i in range(len(faces.names))]
    rows = ((faces.abs_yaw >= 45) & (benchmark.fold[faces.person] == 2)).nonzero()[:, 0]
    cosine = F.normalize(faces.src[rows], dim=1) @ F.normalize(faces.src[first], dim=1).T
    rank = (cosine >= cosine.gather(1, faces.person[rows, None])).sum(1)
    assert ranks(RawEmbedding(), benchmark, 2)["rank1_one"] == rank.tolist()


def test_settings_are_chosen_without_the_tested_fold(benchmark):
    """People who are tested are neither fitted nor looked at when a setting is chosen."""
    seen = []

    def candidates(faces, seed, wanted):
        seen.append(set(faces.names))
        return {("raw",): RawEmbedding(), ("other",): RawEmbedding()}

    tested = {benchmark.faces.names[i] for i in (benchmark.fold == 4).nonzero()[:, 0]}
    assert choose(Family(candidates, {"row": any_setting}), benchmark, 4, 0) == {"row": ("raw",)}
    assert len(seen) == 3 and not any(tested & names for names in seen)
    left_out = [set(benchmark.faces.names) - names - tested for names in seen]
    assert sum(map(len, left_out)) == 36 and len(set().union(*left_out)) == 36  # each once
    seen.clear()
    choose(Family(candidates, {"row": any_setting}, random=True), benchmark, 4, 1)
    assert [set(benchmark.faces.names) - names - tested for names in seen] == [left_out[1]]


def test_the_better_setting_is_chosen(benchmark):
    class Noise(RawEmbedding):
        def predict(self, unit, angles, keypoints_3d, pose_error=None):
            return torch.randn_like(unit)

    family = Family(lambda faces, seed, wanted: {(1.0,): Noise(), (2.0,): RawEmbedding()}, {"row": any_setting})
    assert choose(family, benchmark, 0, 0) == {"row": (2.0,)}
    assert score_fold(family, benchmark, 0, 0)["row"]["setting"] == "(2.0,)"


class Blurred(RawEmbedding):
    """The less of the embedding is left, the worse."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def predict(self, unit, angles, keypoints_3d, pose_error=None):
        return (1 - self.share) * unit + self.share * torch.sin(1e4 * unit)


def test_rows_choose_among_the_settings_that_they_admit(benchmark):
    """A row that names its setting does not choose, and what it names need not be good."""
    shares = {("a", 1): 0.9, ("a", 2): 0.3, ("b", 1): 0.0, ("b", 2): 0.6}
    wanted_at_last = []

    def candidates(faces, seed, wanted):
        wanted_at_last.append(wanted)
        return {setting: Blurred(share) for setting, share in shares.items()}

    rows = {
        "b only": lambda setting: setting[0] == "b",
        "a only": lambda setting: setting[0] == "a",
        "second": lambda setting: setting[1] == 2,
        "named": ("a", 1),
        "any": any_setting,
    }
    family = Family(candidates, rows)
    expected = {"b only": ("b", 1), "a only": ("a", 2), "second": ("a", 2), "any": ("b", 1)}
    assert choose(family, benchmark, 3, 0) == expected
    found = score_fold(family, benchmark, 3, 0)
    assert {row: values["setting"] for row, values in found.items()} == {
        row: str(setting) for row, setting in (expected | {"named": ("a", 1)}).items()
    }
    assert list(found) == list(rows) and set(wanted_at_last[-1]) == {("a", 1), ("a", 2), ("b", 1)}
    keep = benchmark.pairs["FP"].fold == 3
    for row, share in (("named", 0.9), ("second", 0.3)):
        assert found[row]["FP"] == similarities(Blurred(share), benchmark, "FP", keep).tolist()


def test_rows_that_name_their_settings_choose_nothing(benchmark, monkeypatch):
    monkeypatch.setattr(real_faces, "choose", lambda *_: pytest.fail("nothing is to be chosen"))
    family = Family(lambda faces, seed, wanted: {s: Blurred(s[0]) for s in wanted}, {"one": (0.1,), "other": (0.9,)})
    found = score_fold(family, benchmark, 0, 0)
    assert found["one"]["setting"] == "(0.1,)" and found["one"]["FP"] != found["other"]["FP"]


def test_the_pose_error_reaches_the_model(benchmark):
    told = []

    class Listens(torch.nn.Module):
        def forward(self, src, angles, keypoints_3d, pose=None, return_residual=True, pose_error=None):
            told.append(pose_error)
            return src

    unsure = replace(benchmark, faces=replace(benchmark.faces, pose_error=torch.full((len(benchmark.faces), 3), 0.2)))
    similarities(Listens(), unsure, "FP", unsure.pairs["FP"].fold == 0)
    assert told[0].shape[1] == 3 and (told[0] == 0.2).all()


def test_the_study_trains_once_and_goes_on(tmp_path, benchmark, monkeypatch):
    split = split_by_person(people(60, views=12, noise=0.6, first=5000), val=10, test=10)
    store = Store(split, tmp_path)
    bases = [real_models.synthetic_base(TINY, split, 0, store)]
    profile = replace(TINY, real_epochs=1, real_seeds=1)
    every = real_models.families(profile, bases)
    ours = Store(benchmark.as_split, tmp_path / "benchmark")
    chosen = {name: every[name] for name in ("raw", "centred by pose", "MLP", "pretrained, LoRA r=8")}
    results = run_real_faces(benchmark, chosen, profile, workers=1, store=ours)
    assert {name for name, _ in results} == {row for family in chosen.values() for row in family.rows}
    assert results["centred by pose", 0]["auc"][0] > results["raw", 0]["auc"][0] - 0.05
    monkeypatch.setattr(real_faces, "score_fold", lambda *_: pytest.fail("scored again"))
    flipped = replace(benchmark, pairs={name: replace(p, same=~p.same) for name, p in benchmark.pairs.items()})
    key, config = real_faces._key(profile, benchmark, every, ("raw", 0, 0))
    assert ours.find(key, config) and not ours.find(*real_faces._key(profile, flipped, every, ("raw", 0, 0)))
    again = run_real_faces(benchmark, chosen, profile, workers=1, store=ours)
    assert str(again) == str(results)  # in which rates that few pairs cannot tell are NaN
