"""The protocol of real benchmarks, on synthetic people whose rates are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import people, write_set
from sklearn.metrics import roc_auc_score
from studies_fixture import TINY

from viewdiff_nb.faces import Split, split_by_person
from viewdiff_nb.faces.pairs import Pairs, write_pairs
from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.studies import real_faces, real_models
from viewdiff_nb.studies.real_faces import (
    choose,
    embedding_statistics,
    fold_rates,
    load_benchmark,
    ranks,
    rate_estimate,
    run_real_faces,
    score_fold,
    similarities,
    stand_in,
)
from viewdiff_nb.studies.real_models import Family
from viewdiff_nb.studies.store import Store


@pytest.fixture(scope="module")
def benchmark():
    return stand_in(people(40, views=12, noise=0.6))


def test_a_stand_in_has_pairs_within_folds_of_different_people(benchmark):
    faces, pairs = benchmark.faces, benchmark.pairs
    assert benchmark.folds == 10 and torch.bincount(benchmark.fold).tolist() == [4] * 10
    assert ((faces.abs_yaw < 25) | (faces.abs_yaw >= 60)).all()
    for protocol, found in pairs.items():
        first, second = faces.person[found.first], faces.person[found.second]
        assert torch.equal(first == second, found.same) and (found.first != found.second).all()
        assert torch.equal(benchmark.fold[first], found.fold) and torch.equal(benchmark.fold[second], found.fold)
        assert (faces.abs_yaw[found.first] < 25).all()
        assert ((faces.abs_yaw[found.second] >= 60) == (protocol == "FP")).all()
        assert found.same.sum() * 2 == len(found)


def test_a_benchmark_is_read_from_its_folder(tmp_path, benchmark):
    write_set(tmp_path, benchmark.faces)
    for protocol, found in benchmark.pairs.items():
        write_pairs(tmp_path / f"pairs_{protocol}.csv", found)
    again = load_benchmark(tmp_path)
    assert torch.equal(again.fold, benchmark.fold) and again.folds == 10
    assert torch.equal(again.pairs["FP"].second, benchmark.pairs["FP"].second)


def test_a_person_in_two_folds_is_refused(tmp_path, benchmark):
    write_set(tmp_path, benchmark.faces)
    for protocol, found in benchmark.pairs.items():
        fold = found.fold.clone()
        fold[0] = (fold[0] + 1) % 10
        write_pairs(tmp_path / f"pairs_{protocol}.csv", replace(found, fold=fold))
    with pytest.raises(ValueError, match=r"FF: person person_00\d\d is in fold \d and \d"):
        load_benchmark(tmp_path)


def test_a_person_without_pairs_is_named(tmp_path, benchmark):
    write_set(tmp_path, benchmark.faces)
    for protocol, found in benchmark.pairs.items():
        of_first = (benchmark.faces.person[found.first] == 0) | (benchmark.faces.person[found.second] == 0)
        rest = Pairs(*(getattr(found, name)[~of_first] for name in ("first", "second", "same", "fold")))
        write_pairs(tmp_path / f"pairs_{protocol}.csv", rest)
    with pytest.raises(ValueError, match="person person_0000 is in no pair"):
        load_benchmark(tmp_path)


def test_raw_rates_are_those_of_numpy_and_scikit_learn(benchmark):
    raw = Family(real_models.raw_candidates, {"raw": ("raw",)})
    parts = [score_fold(raw, benchmark, fold, 0)["raw"] | {"machine": "here"} for fold in range(10)]
    found = fold_rates(benchmark, parts)
    unit = F.normalize(benchmark.faces.src, dim=1).numpy()
    pairs = benchmark.pairs["FP"]
    cosine = (unit[pairs.first] * unit[pairs.second]).sum(1)
    same, fold = pairs.same.numpy(), pairs.fold.numpy()
    assert found["auc"][0] == pytest.approx(roc_auc_score(same, cosine), abs=1e-6)
    assert found["auc"][1][3] == pytest.approx(roc_auc_score(same[fold != 3], cosine[fold != 3]), abs=1e-6)
    accuracies = []
    for i in range(10):
        rest = fold != i
        best = max(np.unique(cosine[rest]), key=lambda t: ((cosine[rest] >= t) == same[rest]).mean())
        accuracies.append(((cosine[~rest] >= best) == same[~rest]).mean())
    assert found["FP"][0] == pytest.approx(
        np.mean(accuracies), abs=0.02
    )  # equally good thresholds may decide otherwise
    own = unit @ F.normalize(benchmark.faces.front, dim=1).numpy().T
    profile = (benchmark.faces.abs_yaw >= 45).numpy()
    hit = own[profile].argmax(1) == benchmark.faces.person.numpy()[profile]
    of_fold = benchmark.fold.numpy()[benchmark.faces.person.numpy()[profile]]
    assert found["rank1"][0] == pytest.approx(np.mean([hit[of_fold == i].mean() for i in range(10)]), abs=1e-6)
    assert found["settings"] == {"('raw',)": 10} and found["machines"] == ["here"]


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
    assert choose(Family(candidates, {"row": None}), benchmark, 4, 0) == ("raw",)
    assert len(seen) == 3 and not any(tested & names for names in seen)
    left_out = [set(benchmark.faces.names) - names - tested for names in seen]
    assert sum(map(len, left_out)) == 36 and len(set().union(*left_out)) == 36  # each once
    seen.clear()
    choose(Family(candidates, {"row": None}, random=True), benchmark, 4, 1)
    assert [set(benchmark.faces.names) - names - tested for names in seen] == [left_out[1]]


def test_the_better_setting_is_chosen(benchmark):
    class Noise(RawEmbedding):
        def predict(self, unit, angles, keypoints_3d, pose_error=None):
            return torch.randn_like(unit)

    family = Family(lambda faces, seed, wanted: {(1.0,): Noise(), (2.0,): RawEmbedding()}, {"row": None})
    assert choose(family, benchmark, 0, 0) == (2.0,)
    assert score_fold(family, benchmark, 0, 0)["row"]["setting"] == "(2.0,)"


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
    ours = Store(Split(benchmark.faces, benchmark.faces, benchmark.faces), tmp_path / "benchmark")
    chosen = {name: every[name] for name in ("raw", "centred by pose", "MLP", "pretrained, LoRA r=8")}
    results = run_real_faces(benchmark, chosen, profile, workers=1, store=ours)
    assert {name for name, _ in results} == {row for family in chosen.values() for row in family.rows}
    assert results["centred by pose", 0]["auc"][0] > results["raw", 0]["auc"][0] - 0.05
    monkeypatch.setattr(real_faces, "score_fold", lambda *_: pytest.fail("scored again"))
    again = run_real_faces(benchmark, chosen, profile, workers=1, store=ours)
    assert str(again) == str(results)  # in which rates that few pairs cannot tell are NaN


def test_intervals_are_the_jackknife_s():
    values = [0.9, 0.92, 0.95, 0.91, 0.94, 0.9, 0.93, 0.96, 0.89, 0.9]
    without = [(sum(values) - v) / 9 for v in values]
    results = {("a", 0): {"FP": (sum(values) / 10, without)}, ("b", 0): {"FP": (0.5, [0.5] * 10)}}
    found = rate_estimate(results, "a", "FP")
    standard_error = 100 * np.std(values, ddof=1) / math.sqrt(10)  # of a mean the jackknife's is the usual one
    assert found.mean == pytest.approx(92.0) and found.people_error == pytest.approx(standard_error)
    assert found.people == 10 and found.seeds_error == 0
    apart = rate_estimate(results, "a", "FP", "b")
    assert apart.mean == pytest.approx(42.0) and apart.people_error == pytest.approx(standard_error)


def test_seeds_add_their_own_spread():
    of_seed = {0: 0.9, 1: 0.92, 2: 0.94}
    results = {("a", s): {"FP": (v, [v] * 10)} for s, v in of_seed.items()} | {("b", 0): {"FP": (0.9, [0.9] * 10)}}
    found = rate_estimate(results, "a", "FP", "b")  # one without seeds is compared with each
    assert (
        found.mean == pytest.approx(2.0) and found.seeds_error == pytest.approx(2 / math.sqrt(3)) and found.seeds == 3
    )


def test_statistics_tell_worlds_apart():
    near, far = (stand_in(people(30, views=12, noise=noise)) for noise in (0.1, 2.0))
    of_near, of_far = embedding_statistics(near), embedding_statistics(far)
    own = "cosine of profile and own front, mean ± sd"
    assert float(of_near[own].split()[0]) > float(of_far[own].split()[0]) + 0.3
    assert of_near["people"] == "30" and float(of_near["participation ratio of fronts"]) <= 30
