import json
from dataclasses import replace

import pytest
import torch
from conftest import people, write_set

from viewdiff_nb.faces.pairs import Pairs, write_pairs
from viewdiff_nb.studies.real_benchmark import embedding_statistics, load_benchmark, stand_in


@pytest.fixture(scope="module")
def benchmark():
    return stand_in(people(40, views=12, noise=0.6))


def write(folder, benchmark, change=lambda pairs: pairs):
    write_set(folder, benchmark.faces)
    for protocol, found in benchmark.pairs.items():
        write_pairs(folder / f"pairs_{protocol}.csv", change(found))


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
    write(tmp_path, benchmark)
    again = load_benchmark(tmp_path)
    assert again.fingerprint == replace(benchmark, is_profile=again.is_profile).fingerprint
    assert again.seen_by == "unknown recogniser; profiles as they were"
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


def test_statistics_tell_worlds_apart():
    near, far = (stand_in(people(30, views=12, noise=noise)) for noise in (0.1, 2.0))
    of_near, of_far = embedding_statistics(near), embedding_statistics(far)
    own = "cosine of profile and own front, mean ± sd"
    assert float(of_near[own].split()[0]) > float(of_far[own].split()[0]) + 0.3
    assert of_near["people"] == "30" and float(of_near["participation ratio of fronts"]) <= 30


def test_what_is_a_profile_the_metadata_say_before_the_yaw_does(tmp_path, benchmark):
    write(tmp_path, benchmark)
    path = tmp_path / "video_metadata.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["metadata"][0]["profile"] = bool(benchmark.faces.abs_yaw[0] < 45)
    content["standard_info"] = {"recogniser": "R", "crops_of_profiles": ["five@1"]}
    path.write_text(json.dumps(content))
    again = load_benchmark(tmp_path)
    assert again.is_profile[0] == (benchmark.faces.abs_yaw[0] < 45)
    assert torch.equal(again.is_profile[1:], benchmark.faces.abs_yaw[1:] >= 45)
    assert again.seen_by == "R; profiles ['five@1']" and again.fingerprint != benchmark.fingerprint


def test_folds_with_gaps_are_refused(tmp_path, benchmark):
    write(tmp_path, benchmark, lambda pairs: replace(pairs, fold=pairs.fold + 1))
    with pytest.raises(ValueError, match=r"FF: folds must count from 0 without gaps, 4 or more, got \[1, 2,"):
        load_benchmark(tmp_path)
