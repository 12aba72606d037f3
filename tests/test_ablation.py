"""Small grids, with failures and interruptions; see test_ablation_on_clusters.py for other machines."""

import multiprocessing
import time
from dataclasses import replace

import pandas as pd
import pytest
from studies_fixture import SAME_MASKS, TINY, TOY, small_split

from viewdiff_nb.studies import ablation
from viewdiff_nb.studies.ablation import Grid, run_grid
from viewdiff_nb.studies.store import Store

GRID = Grid(rank=(2, 4), voxel_resolution=(0, 4), lambda_prior=(0.1,), base=(0,), seed=(0, 1))
COLUMNS = ["test_rank1", "test_tar", "val_rank1_0-45", "test_cosine_75-90"]


@pytest.fixture
def split():
    return small_split()


@pytest.fixture
def store(split, tmp_path):
    return Store(split, tmp_path)


def test_every_cell_is_a_row(split, store):
    seen = []
    cells = run_grid(GRID, split, TINY, workers=1, progress=lambda jobs: seen.extend(jobs) or jobs, store=store)
    assert len(cells) == 8 and (cells["error"] == "").all() and len(seen) == 2
    assert cells.groupby(["rank", "voxel_resolution", "seed"]).ngroups == 8
    assert (cells["lora_alpha"] == cells["rank"]).all() and cells["cells_together"].eq(4).all()
    assert cells[COLUMNS].notna().all().all() and (cells[["step_ms", "memory_mb", "seconds"]] > 0).all().all()
    by = cells.set_index(["rank", "voxel_resolution", "seed"])
    assert by.loc[(4, 0, 0), "trainable"] == 2 * by.loc[(2, 0, 0), "trainable"]
    assert by.loc[(2, 4, 0), "trainable"] > by.loc[(2, 0, 0), "trainable"]
    assert cells["train_loss"].map(len).eq(TINY.adapt_epochs).all()


def test_no_pass_had_to_be_trained_one_by_one(split, store):
    """Cells that fail together are tried alone, so a pass that cannot run shows nowhere else."""
    cells = run_grid(replace(GRID, seed=(0,)), split, TINY, workers=1, store=store)
    assert cells["cells_together"].eq(2).all()


def test_together_or_alone_is_the_same(split, tmp_path):
    together, alone = (
        run_grid(GRID, split, SAME_MASKS, 1, cells_per_pass, store=Store(split, tmp_path / str(cells_per_pass)))
        for cells_per_pass in (8, 1)
    )
    assert alone["cells_together"].eq(1).all()
    pd.testing.assert_frame_equal(together[COLUMNS], alone[COLUMNS], atol=5e-3)


def test_a_second_run_does_only_what_is_missing(split, store, monkeypatch):
    first = run_grid(replace(GRID, seed=(0,)), split, TINY, workers=1, store=store)
    seen = []
    original = ablation._train_cells
    monkeypatch.setattr(ablation, "_train_cells", lambda split, job: seen.extend(job) or original(split, job))
    whole = run_grid(GRID, split, TINY, workers=1, store=store)
    assert {config.seed for config in seen} == {1} and len(seen) == 4
    seen.clear()
    pd.testing.assert_frame_equal(run_grid(GRID, split, TINY, workers=1, store=store), whole)
    assert not seen
    pd.testing.assert_frame_equal(whole[whole["seed"] == 0].reset_index(drop=True), first)


def test_a_failed_cell_is_recorded_and_the_others_go_on(split, store, monkeypatch):
    original = ablation._train_cells

    def failing(split, job):
        if any(config.rank == 4 and config.seed == 1 for config in job):
            raise RuntimeError("out of luck")
        return original(split, job)

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "_train_cells", failing)
        cells = run_grid(GRID, split, TINY, workers=1, store=store)
    failed = cells["error"] != ""
    assert (failed == ((cells["rank"] == 4) & (cells["seed"] == 1))).all()
    assert cells.loc[failed, "error"].eq("RuntimeError: out of luck").all()
    assert cells.loc[failed, "test_rank1"].isna().all() and cells.loc[~failed, "test_rank1"].notna().all()
    again = run_grid(GRID, split, TINY, workers=1, store=store)  # failed cells are tried again
    assert again["test_rank1"].notna().all()


def test_processes_give_the_same_table(split, store, tmp_path):
    one = run_grid(GRID, split, TINY, workers=1, store=store)
    other = run_grid(GRID, split, TINY, workers=2, store=Store(split, tmp_path / "other"))
    assert (other["error"] == "").all(), other["error"].tolist()
    pd.testing.assert_frame_equal(one[COLUMNS], other[COLUMNS], atol=5e-3)


def _run_until_killed(folder) -> None:
    split = small_split()
    profile = replace(TINY, common=replace(TOY, device="cpu"))
    run_grid(GRID, split, profile, workers=1, cells_per_pass=1, store=Store(split, folder))


def test_a_killed_grid_repeats_no_finished_cell(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run_until_killed, args=(tmp_path,))
    process.start()
    while process.is_alive() and len(list((tmp_path / "study").glob("*.json"))) < 4:  # the base and three cells
        time.sleep(0.01)
    process.kill()
    process.join()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("*.json")}
    assert 4 <= len(written) < 9
    process = context.Process(target=_run_until_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0 and len(list((tmp_path / "study").glob("*.json"))) == 9
    assert all(path.stat().st_mtime_ns == moment for path, moment in written.items())


def test_alpha_follows_its_rule_and_every_base_has_seeds_of_its_own(split, store):
    grid = Grid((4,), (0,), tuple(ablation.ALPHAS), (0.0,), base=(0, 1), seed=(0, 1))
    cells = run_grid(grid, split, TINY, workers=1, store=store)
    assert len(cells) == 16 and (cells["error"] == "").all()
    alphas = cells.drop_duplicates("alpha").set_index("alpha")["lora_alpha"]
    assert alphas.to_dict() == {"1": 1.0, "rank": 4.0, "2 rank": 8.0, "rsLoRA": 8.0}  # 8 / 4 = 4 / sqrt(4)
    assert cells.groupby("base")["seed"].unique().map(list).to_dict() == {0: [0, 1], 1: [2, 3]}
