import pytest
import torch
from conftest import people

from viewdiff_nb.faces import split_by_person
from viewdiff_nb.metrics import COUNTS
from viewdiff_nb.studies import adaptation
from viewdiff_nb.studies.adaptation import run_study
from viewdiff_nb.studies.significance import RESAMPLES
from viewdiff_nb.studies.store import Store


def test_study_trains_everything_once_and_reuses_it(small, tiny, monkeypatch):
    results = run_study(tiny, small, workers=1)
    assert {name for name, _ in results} == {*adaptation.BASELINES, "base", *adaptation.STUDIED, *adaptation.ALL_YAWS}
    for result in results.values():
        assert 0 <= result["test"]["all"]["rank1"] <= 1 and result["test"]["all"]["views"] == 40 * 12
        assert set(result["test"]["all"]) - set(result["test_people"]["all"]) == set(COUNTS)
        assert len(result["test_people"]["75-90"]["tar@1e-4"]) == RESAMPLES
    assert results["LoRA r=8", 0]["trainable"] == results["LoRA r=8", 0]["lora"] > 0
    assert results["LoRA r=8 + 3-D projection", 0]["trainable"] > results["LoRA r=8", 0]["trainable"]

    def fail(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(adaptation, "train", fail)
    assert run_study(tiny, small, workers=1) == results
    assert run_study(tiny, small, workers=2) == results  # nothing is missing, so no process starts


def test_processes_side_by_side_give_the_results_of_one(tiny, monkeypatch, tmp_path):
    split = split_by_person(people(110, views=12), val=40, test=40)
    names = ("mean face", "MLP", "base")
    found = []
    for workers in (1, 2):
        monkeypatch.setattr(Store.__init__, "__defaults__", (tmp_path / str(workers),))
        monkeypatch.setenv("VIEWDIFF_NB_RUNS", str(tmp_path / str(workers)))  # the processes' own default
        found.append(run_study(tiny, split, names=names, workers=workers))
    for job, result in found[0].items():
        for part in ("val", "test"):  # another process lays out memory otherwise, which changes last bits
            assert found[1][job][part]["all"] == pytest.approx(result[part]["all"], abs=1e-3), job
    assert not list((tmp_path / "2/study").glob("*.part")) and len(found[1]) == 3


def test_a_result_is_stored_under_all_that_made_it(small):
    store = Store(small)
    key = {"name": "x", "config": {"lr": 1.0}}
    made = []
    for k in (key, key, {"name": "x", "config": {"lr": 2.0}}):
        store.get(k, lambda path: made.append(path) or {"value": len(made)})
    assert len(made) == 2 and made[0] != made[1]
    other = Store(split_by_person(people(110, views=12, noise=0.4), val=40, test=40))
    assert other.path(key) != store.path(key)


def test_an_interrupted_result_is_not_kept(small):
    store = Store(small)

    def interrupted(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get({"name": "y"}, interrupted)
    assert store.get({"name": "y"}, lambda path: {"value": 1})["value"] == 1


def test_the_shipped_set_loads_and_splits():
    split = adaptation.load_split()
    assert split.train.feature_dim == 512 and len(split.train.names) == 1300
    assert len(split.val.names) == 200 and len(split.test.names) == 300
    smoke = adaptation.load_split(adaptation.FAST_PROFILE)
    assert smoke.test.names == split.test.names and len(smoke.train.names) < 1300
    lengths = split.train.src.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=2e-3)  # float16 on disk
