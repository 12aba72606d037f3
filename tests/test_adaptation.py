from functools import partial

import pytest
import torch
from studies_fixture import TINY, small_split

from viewdiff_nb.metrics import COUNTS
from viewdiff_nb.studies import adaptation
from viewdiff_nb.studies import store as store_module
from viewdiff_nb.studies.adaptation import run_job
from viewdiff_nb.studies.significance import RESAMPLES
from viewdiff_nb.studies.store import Store, run_jobs


def test_a_model_is_trained_once_and_reused(monkeypatch, tmp_path):
    split = small_split()
    store = Store(split, tmp_path)
    results = {name: run_job(store, split, TINY, name, 0) for name in adaptation.MODELS}
    for result in results.values():
        assert 0 <= result["test"]["all"]["rank1"] <= 1 and result["test"]["all"]["views"] == 40 * 12
        assert set(result["test"]["all"]) - set(result["test_people"]["all"]) == set(COUNTS)
        assert len(result["test_people"]["75-90"]["tar@1e-4"]) == RESAMPLES

    def fail(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(store_module, "train", fail)
    assert {name: run_job(store, split, TINY, name, 0) for name in adaptation.MODELS} == results
    path, result = adaptation.base_model(store, split, TINY, seed=0)
    assert path.is_file() and result == results["base"]


def test_processes_side_by_side_give_the_results_of_one(tmp_path):
    split = small_split()
    names = ("mean face", "MLP", "base")
    found = {}
    for workers in (1, 2):
        store = Store(split, tmp_path / str(workers))
        run_jobs(partial(run_job, store, split, TINY), [(name, 0) for name in names], workers)
        found[workers] = {name: run_job(store, split, TINY, name, 0) for name in names}
    for name in names:
        for part in ("val", "test"):  # another process lays out memory otherwise, which changes last bits
            one, two = (found[workers][name][part]["all"] for workers in (1, 2))
            assert two == pytest.approx(one, abs=1e-3), name
    assert not list((tmp_path / "2/study").glob("*.part"))


def test_the_shipped_set_loads_and_splits():
    split = adaptation.load_split()
    assert split.train.feature_dim == 384 and len(split.train.names) == 1300
    assert len(split.val.names) == 200 and len(split.test.names) == 300
    smoke = adaptation.load_split(adaptation.FAST_PROFILE)
    assert smoke.test.names == split.test.names and len(smoke.train.names) < 1300
    lengths = split.train.src.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=2e-3)  # float16 on disk
