"""Small grids, on every backend, with failures and interruptions."""

import multiprocessing
import time
from dataclasses import replace

import pandas as pd
import pytest
from conftest import people

from viewdiff_nb.faces import split_by_person
from viewdiff_nb.studies import ablation, adaptation
from viewdiff_nb.studies.ablation import Grid, run_grid
from viewdiff_nb.studies.store import Store

GRID = Grid(rank=(2, 4), voxel_resolution=(0, 4), lambda_prior=(0.1,), seed=(0, 1))
COLUMNS = ["test_rank1", "test_tar", "val_rank1_0-45", "test_cosine_75-90"]


@pytest.fixture
def toy(small, monkeypatch):
    monkeypatch.setattr(ablation, "COMMON", adaptation.COMMON)
    return small


def test_every_cell_is_a_row(toy, tiny):
    cells = run_grid(GRID, toy, tiny, backend="sequential")
    assert len(cells) == len(GRID) == 8 and (cells["error"] == "").all()
    assert cells.groupby(["rank", "voxel_resolution", "seed"]).ngroups == 8
    assert (cells["lora_alpha"] == cells["rank"]).all() and cells["cells_together"].eq(4).all()
    assert cells[COLUMNS].notna().all().all() and (cells[["step_ms", "memory_mb", "seconds"]] > 0).all().all()
    by = cells.set_index(["rank", "voxel_resolution", "seed"])
    assert by.loc[(4, 0, 0), "trainable"] == 2 * by.loc[(2, 0, 0), "trainable"]
    assert by.loc[(2, 4, 0), "trainable"] > by.loc[(2, 0, 0), "trainable"]
    assert cells["train_loss"].map(len).eq(tiny.adapt_epochs).all()


def test_together_or_alone_is_the_same(toy, tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(ablation, "COMMON", replace(adaptation.COMMON, dropout=0.0))
    found = []
    for together in (8, 1):
        monkeypatch.setattr(Store.__init__, "__defaults__", (tmp_path / str(together),))
        found.append(run_grid(GRID, toy, tiny, backend="sequential", together=together))
    assert found[1]["cells_together"].eq(1).all()
    pd.testing.assert_frame_equal(found[0][COLUMNS], found[1][COLUMNS], atol=5e-3)


def test_a_second_run_does_only_what_is_missing(toy, tiny, monkeypatch):
    smaller = replace(GRID, seed=(0,))
    first = run_grid(smaller, toy, tiny, backend="sequential")
    seen = []
    original = ablation._train_job
    monkeypatch.setattr(ablation, "_train_job", lambda split, job: seen.extend(job) or original(split, job))
    whole = run_grid(GRID, toy, tiny, backend="sequential")
    assert {config.seed for config in seen} == {1} and len(seen) == 4
    seen.clear()
    pd.testing.assert_frame_equal(run_grid(GRID, toy, tiny, backend="sequential"), whole)
    assert not seen
    pd.testing.assert_frame_equal(whole[whole["seed"] == 0].reset_index(drop=True), first)


def test_a_failed_cell_is_recorded_and_the_others_go_on(toy, tiny, monkeypatch):
    original = ablation._train_job

    def failing(split, job):
        if any(config.rank == 4 and config.seed == 1 for config in job):
            raise RuntimeError("out of luck")
        return original(split, job)

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "_train_job", failing)
        cells = run_grid(GRID, toy, tiny, backend="sequential")
    failed = cells["error"] != ""
    assert (failed == ((cells["rank"] == 4) & (cells["seed"] == 1))).all()
    assert (
        cells.loc[failed, "error"].eq("RuntimeError: out of luck").all()
        and cells.loc[failed, "test_rank1"].isna().all()
    )
    assert cells.loc[~failed, "test_rank1"].notna().all()
    again = run_grid(GRID, toy, tiny, backend="sequential")  # failed cells are tried again
    assert again["test_rank1"].notna().all()


@pytest.mark.parametrize("backend", ["loky", "dask", "ray"])
def test_every_backend_gives_the_same_table(toy, tiny, monkeypatch, tmp_path, backend):
    one = run_grid(GRID, toy, tiny, backend="sequential")
    monkeypatch.setattr(Store.__init__, "__defaults__", (tmp_path / backend,))
    if backend == "dask":
        from distributed import Client

        with Client(n_workers=2, threads_per_worker=1, dashboard_address=None):
            other = run_grid(GRID, toy, tiny, backend=backend, workers=2)
    elif backend == "ray":
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            other = run_grid(GRID, toy, tiny, backend=backend, workers=2)
        finally:
            ray.shutdown()
    else:
        other = run_grid(GRID, toy, tiny, backend=backend, workers=2)
    assert (other["error"] == "").all(), other["error"].tolist()
    pd.testing.assert_frame_equal(one[COLUMNS], other[COLUMNS], atol=5e-3)


def test_a_backend_that_is_not_there_is_found_before_any_work(toy, tiny, monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of sequential, loky, dask, ray, got 'spark'"):
        run_grid(GRID, toy, tiny, backend="spark")
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[cluster\]"'):
        run_grid(GRID, toy, tiny, backend="dask")
    assert not list(Store(toy).folder.glob("*"))


def _run_until_killed(folder, profile) -> None:
    Store.__init__.__defaults__ = (folder,)
    sizes = {"d_model": 32, "nhead": 4, "num_layers": 2, "dim_feedforward": 48, "voxel_resolution": 4, "device": "cpu"}
    for module in (ablation, adaptation):
        module.COMMON = replace(adaptation.COMMON, **sizes)
    split = split_by_person(people(110, views=12), val=40, test=40)
    run_grid(GRID, split, profile, backend="sequential", together=1)


def test_a_killed_grid_repeats_no_finished_cell(tiny, tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run_until_killed, args=(tmp_path, tiny))
    process.start()
    while process.is_alive() and len(list((tmp_path / "study").glob("*.json"))) < 4:  # the base and three cells
        time.sleep(0.01)
    process.kill()
    process.join()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("*.json")}
    assert 4 <= len(written) < 9
    process = context.Process(target=_run_until_killed, args=(tmp_path, tiny))
    process.start()
    process.join()
    assert process.exitcode == 0 and len(list((tmp_path / "study").glob("*.json"))) == 9
    assert all(path.stat().st_mtime_ns == moment for path, moment in written.items())
