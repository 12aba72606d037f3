from dataclasses import replace

import pytest
import torch
from studies_fixture import TINY, small_split

from viewdiff_nb.metrics import COUNTS
from viewdiff_nb.studies import adaptation
from viewdiff_nb.studies import store as store_module
from viewdiff_nb.studies.adaptation import run_study
from viewdiff_nb.studies.significance import RESAMPLES
from viewdiff_nb.studies.store import Store


def test_study_trains_everything_once_and_reuses_it(monkeypatch, tmp_path):
    split = small_split()
    store = Store(split, tmp_path)
    results = run_study(TINY, split, workers=1, store=store)
    rows = (
        *adaptation.BASELINES,
        *adaptation.CLOSED_FORMS,
        *adaptation.STUDIED,
        *adaptation.ALL_YAWS,
        *adaptation.STEP_CHOSEN,
    )
    assert {name for name, _ in results} == {*rows, "base"}
    for result in results.values():
        assert 0 <= result["test"]["all"]["rank1"] <= 1 and result["test"]["all"]["views"] == 40 * 12
        assert set(result["test"]["all"]) - set(result["test_people"]["all"]) == set(COUNTS)
        assert len(result["test_people"]["75-90"]["tar@1e-4"]) == RESAMPLES
    assert results["LoRA r=8", 0]["trainable"] == results["LoRA r=8", 0]["lora"] > 0
    assert results["LoRA r=8 + 3-D projection", 0]["trainable"] > results["LoRA r=8", 0]["trainable"]

    def fail(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(store_module, "train", fail)
    assert run_study(TINY, split, workers=1, store=store) == results
    assert run_study(TINY, split, workers=2, store=store) == results  # nothing is missing, so no process starts
    path, result = adaptation.base_model(store, split, TINY, seed=0)
    assert path.is_file() and result == results["base", 0]


def test_processes_side_by_side_give_the_results_of_one(tmp_path):
    split = small_split()
    names = ("mean face", "MLP", "base", "full fine-tuning")
    one, two = (
        run_study(TINY, split, names=names, workers=workers, store=Store(split, tmp_path / str(workers)))
        for workers in (1, 2)
    )
    for job, result in one.items():
        for part in ("val", "test"):  # another process lays out memory otherwise, which changes last bits
            assert two[job][part]["all"] == pytest.approx(result[part]["all"], abs=1e-3), job
    assert not list((tmp_path / "2/study").glob("*.part")) and len(two) == len(names)


def test_what_is_adapted_needs_no_base_beforehand(tmp_path):
    split = small_split()
    store = Store(split, tmp_path)
    alone = run_study(TINY, split, names=["LoRA r=8"], workers=1, store=store)
    config = adaptation.config_of(store, TINY, "LoRA r=8", 0)
    assert len(alone) == 1 and store.find("base", adaptation.config_of(store, TINY, "base", 0), with_weights=True)
    other = replace(TINY, common=replace(TINY.common, lr=1e-3))
    assert adaptation.config_of(store, other, "LoRA r=8", 0).base_model_path != config.base_model_path


def test_the_shipped_set_loads_and_splits():
    split = adaptation.load_split()
    assert split.train.feature_dim == 384 and len(split.train.names) == 1300
    assert len(split.val.names) == 200 and len(split.test.names) == 300
    smoke = adaptation.load_split(adaptation.FAST_PROFILE)
    assert smoke.test.names == split.test.names and len(smoke.train.names) < 1300
    lengths = split.train.src.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=2e-3)  # float16 on disk
