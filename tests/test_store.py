import multiprocessing
import os
import shutil
from dataclasses import replace

import joblib
import pytest
import torch
from conftest import CONFIG, people
from studies_fixture import small_split

from viewdiff_nb.faces import split_by_person
from viewdiff_nb.studies import store as store_module
from viewdiff_nb.studies.store import (
    PACKAGE,
    RESULT_CODE,
    DamagedResult,
    Store,
    code_fingerprint,
    passes,
    run_jobs,
    train_pass,
)
from viewdiff_nb.training import TrainResult

KEY = "x", CONFIG


@pytest.fixture
def store(tmp_path):
    return Store(split_by_person(people(8), 2, 3), tmp_path)


def test_a_stored_result_is_found(store):
    assert store.find(*KEY) is None
    made = store.get(*KEY, lambda: {"value": 1.5})
    assert made["value"] == 1.5 and store.find(*KEY) == store.get(*KEY, lambda: {"value": 2.5}) == made


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff", b"9" * 5000, b'{"key": {"name": "y"}, "value": 1}'],
)
def test_a_damaged_result_is_made_again(store, content):
    store.get(*KEY, lambda: {"value": 1})
    store.path(*KEY).write_bytes(content)
    with pytest.warns(DamagedResult, match=f"{store.path(*KEY).name}.* made again"):
        assert store.find(*KEY) is None
    with pytest.warns(DamagedResult):
        assert store.get(*KEY, lambda: {"value": 2})["value"] == 2
    assert store.find(*KEY)["value"] == 2


def test_a_flipped_digit_is_not_believed(store):
    store.get(*KEY, lambda: {"rates": [0.5, float("nan")], "names": {"李雷": 1}})
    assert store.find(*KEY)["rates"][0] == 0.5
    path = store.path(*KEY)
    path.write_text(path.read_text(encoding="utf-8").replace("0.5", "0.7"), encoding="utf-8")
    with pytest.warns(DamagedResult, match="checksum"):
        assert store.find(*KEY) is None


def test_a_result_is_stored_under_all_that_made_it(store, tmp_path):
    other_data = Store(split_by_person(people(8, noise=0.4), 2, 3), tmp_path)
    other_code, other_torch = (Store(split_by_person(people(8), 2, 3), tmp_path) for _ in range(2))
    other_code.made_by["code"] = "other"
    other_torch.made_by["torch"] = "other"
    paths = {each.path(*KEY) for each in (store, other_data, other_code, other_torch)}
    assert len(paths) == 4 and store.made_by["code"] == code_fingerprint()
    assert len({store.path(*KEY), store.path("y", CONFIG), store.path("x", replace(CONFIG, lr=2.0))}) == 3
    based = [replace(CONFIG, base_model_path=path) for path in ("here/a.pth", "there/a.pth", "here/b.pth")]
    here, there, other = (store.path("x", config) for config in based)
    assert here == there != other


def test_an_interrupted_result_is_not_kept(store):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get(*KEY, interrupted)
    assert store.get(*KEY, lambda: {"value": 1})["value"] == 1


def test_a_result_without_its_weights_is_made_again(store):
    def make():
        store.checkpoint(*KEY).parent.mkdir(exist_ok=True)
        store.checkpoint(*KEY).write_bytes(b"weights")
        return {"value": 2}

    store.get(*KEY, lambda: {"value": 1})
    assert store.get(*KEY, make, with_weights=True)["value"] == 2
    assert store.find(*KEY, with_weights=True) == store.find(*KEY)
    store.checkpoint(*KEY).unlink()
    assert store.find(*KEY, with_weights=True) is None


CHANGES = {
    "a loss": ("training/losses.py", "TEMPERATURE = 0.05", "TEMPERATURE = 0.06", True),
    "a rate": ("metrics.py", "FOLDS = 10", "FOLDS = 9", True),
    "a module": ("modules/lora.py", "rank: int = 4", "rank: int = 5", True),
    "a comment": ("training/losses.py", "TEMPERATURE = 0.05  #", "TEMPERATURE = 0.05  # another comment,", False),
    "a docstring": ("metrics.py", '"""', '"""In other words: ', False),
    "a table": ("studies/tables.py", "import", "import math\nimport", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_code_makes_results_anew_and_changed_words_do_not(tmp_path, change):
    name, before, after, made_anew = CHANGES[change]
    shutil.copytree(PACKAGE, tmp_path / "package")
    path = tmp_path / "package" / name
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), encoding="utf-8")
    assert (code_fingerprint(tmp_path / "package") != code_fingerprint()) == made_anew


def test_every_study_and_every_training_file_counts():
    """A file that is new among them is added to the list, or named here as one that makes no result."""
    listed = {path for pattern in RESULT_CODE for path in PACKAGE.glob(pattern)}
    drawing = {"__init__", "benchmark", "real_tables", "tables"}
    assert {path.stem for path in set((PACKAGE / "studies").glob("*.py")) - listed} == drawing
    assert set((PACKAGE / "training").glob("*.py")) <= listed and set((PACKAGE / "modules").glob("*.py")) <= listed
    assert all(list(PACKAGE.glob(pattern)) for pattern in RESULT_CODE)


def test_a_result_is_on_the_disk_before_it_has_its_name(store, monkeypatch):
    calls, real = [], (os.fsync, os.replace)
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), real[0](number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), real[1](old, new)))
    store.get(*KEY, lambda: {"value": 1})
    assert calls == ["fsync", "replace"]
    assert [path.name for path in store.folder.iterdir()] == [store.path(*KEY).name]


def test_passes_hold_what_can_be_trained_together():
    lora = replace(CONFIG, use_lora_attention=True, freeze_base=True, base_model_path="base.pth")
    ranks = [replace(lora, rank=rank, seed=seed) for rank in (2, 4) for seed in (0, 1)]
    voxels = [replace(lora, use_projection_layer=True, seed=seed) for seed in (0, 1)]
    alone = [replace(CONFIG, seed=seed) for seed in (0, 1)]
    assert passes([*ranks, *voxels, *alone], 3) == [voxels, ranks[:3], ranks[3:], alone[:1], alone[1:]]
    fine = [replace(config, voxel_resolution=32) for config in voxels]
    assert passes(fine, 8) == [[config] for config in fine]
    assert passes(fine, 16) == [fine]


def test_a_diverged_run_of_a_pass_is_named(monkeypatch):
    lora = replace(CONFIG, use_lora_attention=True, base_model_path="base.pth", lambda_prior=5.0)
    configs = [replace(lora, seed=seed) for seed in (2, 3)]
    results = [TrainResult(None, None, 1.0, 1, how, None) for how in ("finished", "diverged")]
    monkeypatch.setattr("viewdiff_nb.studies.store.train_together", lambda configs, *faces: results)
    with pytest.raises(FloatingPointError, match="lambda 5, seed 3: the loss is not finite"):
        train_pass(configs, small_split())


def whole_quotient(number, divisor):
    return os.getpid(), number // divisor


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_are_done_here_or_in_processes(workers):
    seen = []
    jobs = [(number, 2) for number in range(6)]
    found = run_jobs(whole_quotient, jobs, workers, lambda jobs: seen.extend(jobs) or jobs)
    assert sorted(value for _, value in found) == [0, 0, 1, 1, 2, 2] and seen == jobs
    assert ({process for process, _ in found} == {os.getpid()}) == (workers == 1)
    assert run_jobs(whole_quotient, [], workers) == []
    with pytest.raises(ZeroDivisionError):
        run_jobs(whole_quotient, [(1, 1), (1, 0)], workers)


def test_the_caller_says_where():
    with joblib.parallel_config("threading", n_jobs=2):
        assert {process for process, _ in run_jobs(whole_quotient, [(1, 1)] * 4)} == {os.getpid()}
    with joblib.parallel_config("multiprocessing", n_jobs=2):  # which hands out whole lists only
        assert os.getpid() not in {process for process, _ in run_jobs(whole_quotient, [(1, 1)] * 4)}


@pytest.mark.parametrize(
    ("process", "gpus", "chosen"), [("LokyProcess-6", 4, 2), ("MainProcess", 4, None), ("w-3", 1, None)]
)
def test_a_worker_stays_on_one_of_several_gpus(monkeypatch, process, gpus, chosen):
    asked = []
    monkeypatch.setattr(multiprocessing.current_process(), "name", process)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    assert store_module._on_own_gpu(pow, 2, 3) == 8
    assert asked == ([] if chosen is None else [chosen])
