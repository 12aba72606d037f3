"""What is said of grids whose answer is known by construction."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from viewdiff_nb.files import CONTROL_RESULTS
from viewdiff_nb.studies.ablation import (
    PRIOR_GRID,
    RATE_GRID,
    Grid,
    effect_lines,
    guide_lines,
    paired,
    prior_lines,
    read_cells,
    recommend,
    recommendation_text,
    summary,
)


def made(rank_gain: dict, voxel_gain: dict, noise: float, seeds: int = 5, lambda_gain: float = 0.0) -> pd.DataFrame:
    """TAR .9 + gains + a seed's own level + noise that differs between cells."""
    rows = []
    for (i, rank), (j, voxels), (k, weight), seed in itertools.product(
        enumerate(rank_gain), enumerate(voxel_gain), enumerate((0.05, 0.1, 0.2)), range(seeds)
    ):
        tar = (
            0.9
            + rank_gain[rank]
            + voxel_gain[voxels]
            + 0.01 * seed
            + noise * ((7 * i + 5 * j + 3 * k + 11 * seed) % 5 - 2)
        )
        row = {
            "rank": rank,
            "voxel_resolution": voxels,
            "lora_alpha": float(rank),
            "lambda_prior": weight,
            "seed": seed,
            "error": "",
            "trainable": 1000 * rank,
            "memory_mb": float(voxels**2),
            "step_ms": 1.0,
            "seconds": 1.0,
            "train_loss": [5.0 - 0.1 * rank, 4.0 - 0.1 * rank],
            "machine": "here",
            "cells_together": 8,
        }
        for part in ("val", "test"):
            row |= {
                f"{part}_{rate}{where}": tar + lambda_gain * k * (where == "_0-45")
                for rate in ("tar", "rank1")
                for where in ("", "_0-45", "_45-90")
            }
        rows.append(row)
    return pd.DataFrame(rows)


def test_means_are_over_seeds_and_the_rest_is_averaged_within():
    cells = made({4: 0.0, 8: 0.02}, {8: 0.0}, noise=0.0)
    found = summary(cells, ["rank"], "test_tar")
    assert found.loc[8, "mean"] == pytest.approx(0.94) and found.loc[4, "mean"] == pytest.approx(0.92)
    assert found.loc[4, "half"] == pytest.approx(2.776 * 0.015811 / 5**0.5, rel=1e-3)  # t(.975, 4) s / sqrt(5)
    apart = paired(cells, ["rank"], 8, 4, "test_tar")
    assert apart.mean == pytest.approx(0.02) and apart.half == pytest.approx(0.0, abs=1e-9)  # seeds cancel


def test_the_clear_winner_is_recommended():
    cells = made({4: 0.0, 8: 0.02, 16: 0.05}, {8: 0.0, 16: 0.02}, noise=0.0005)
    found = recommend(cells)
    assert found.chosen == found.best == (16, 16) and found.seeds_won == found.seeds == 5
    text = recommendation_text(cells)
    assert "Take rank 16 with 16³ voxels" in text and "in 5 of 5 seeds" in text
    assert "5 of the 5 other combinations are told from it" in text
    assert "- rank 4 against 8 in TAR: -0.0200 ± 0.00" in effect_lines(cells)
    words = guide_lines(cells)
    assert "rank 8: **disagrees**; 16 is recommended here, in TAR on test people against it: +0.0300" in words
    assert "16³ voxels: **agrees**" in words and "16³ against 8³ in TAR: +0.02" in words


def grid(means: dict, noise: list, seeds: int) -> pd.DataFrame:
    """A cell for each rank and resolution of means: its mean, .05 a seed, and its own noise in each seed."""
    rows = []
    for (i, ((rank, voxels), mean)), seed in itertools.product(enumerate(means.items()), range(seeds)):
        tar = mean + 0.05 * seed + noise[(3 * i + 5 * seed) % len(noise)]
        rows.append(
            {
                "rank": rank,
                "voxel_resolution": voxels,
                "lambda_prior": 0.1,
                "seed": seed,
                "val_tar": tar,
                "test_tar": tar,
            }
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_margin_is_the_standard_error_of_a_two_way_layout(seeds):
    """Against least squares on indicators of cells and seeds."""
    means = {(rank, voxels): 0.8 for rank in (4, 8, 16) for voxels in (8, 16)}
    cells = grid(means, [0.004, -0.001, 0.003, -0.007, 0.002, 0.0005, -0.003], seeds)
    cell, seed = pd.get_dummies(cells["rank"] * 100 + cells["voxel_resolution"]), pd.get_dummies(cells["seed"])
    design = np.hstack((cell, seed)).astype(float)
    fit, _, rank, _ = np.linalg.lstsq(design, cells["val_tar"])
    rest = cells["val_tar"] - design @ fit
    variance = (rest**2).sum() / (len(cells) - rank)
    assert recommend(cells).margin == pytest.approx((variance / seeds) ** 0.5, rel=1e-9)


def test_the_cheapest_within_one_standard_error_of_the_best_is_recommended():
    noise = [0.004, -0.001, 0.003, -0.007, 0.002, 0.0005, -0.003]
    flat = grid({(rank, voxels): 0.8 for rank in (4, 8) for voxels in (8, 16)}, noise, 5)
    table = flat.groupby(["rank", "voxel_resolution"])["val_tar"].mean()
    found = recommend(flat)
    near = [(v, r) for (r, v), mean in table.items() if mean >= table.max() - found.margin]
    assert found.chosen == min(near)[::-1] and found.best == table.idxmax()
    text = recommendation_text(flat)
    assert f"within one standard error ({found.margin:.4f})" in text
    assert ("nothing cheaper" in text) == (found.chosen == found.best)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_few_seeds_do_not_make_the_smallest_the_choice(seeds):
    """Rank 8 is .02 better, five times the noise; two seeds of two cells alone do not tell them apart (t is 12.7)."""
    means = {(rank, voxels): 0.80 + 0.02 * (rank == 8) for rank in (4, 8) for voxels in (8, 16)}
    cells = grid(means, [0.006, -0.006, 0.003, 0.0, -0.003, 0.0045, -0.0045], seeds)
    assert recommend(cells).rank == 8


def test_what_lists_tell_apart_is_corrected_for_their_length():
    """Each rank has an own p of .03 against rank 8."""
    apart = [1.0, 2.0, 3.0, 4.0]
    p = stats.ttest_1samp(apart, 0).pvalue
    assert 0.025 < p < 0.05
    for ranks, words in ((1, f"p {p:.3f}".replace("0.", ".")), (2, "not told apart")):
        cells = pd.DataFrame(
            [
                {
                    "rank": rank,
                    "voxel_resolution": 8,
                    "lambda_prior": 0.1,
                    "seed": seed,
                    "test_tar": (rank != 8) * apart[seed],
                }
                for rank in (8, 16, 32)[: ranks + 1]
                for seed in range(4)
            ]
        )
        lines = effect_lines(cells).splitlines()
        assert len(lines) == ranks + 1 and all(words in line for line in lines[:-1])
        assert f"Holm, {ranks} comparison" in lines[-1]


def test_one_seed_promises_nothing():
    cells = made({4: 0.0, 8: 0.05}, {4: 0.0, 8: 0.0}, noise=0.0, seeds=1)
    assert "take this for a smoke test" in recommendation_text(cells) and recommend(cells).rank == 8
    assert "-0.0500 (one seed)." in effect_lines(cells)


def test_the_weight_of_the_prior_is_reported_both_ways():
    cells = made({8: 0.0}, {8: 0.0}, noise=0.0, lambda_gain=0.01)
    assert "lambda 0.2 against 0.05 in TAR keeps below 45°: +0.0200 ± 0.0000" in prior_lines(cells)
    assert "lambda 0.2 against 0.05 in TAR gains beyond 45°: +0.0000" in prior_lines(cells)
    assert "lambda" not in guide_lines(cells)


@pytest.mark.parametrize(("name", "grid"), [("voxels", Grid()), ("prior", PRIOR_GRID), ("rates", RATE_GRID)])
def test_the_shipped_cells_are_the_whole_grids(name, grid):
    cells = read_cells(CONTROL_RESULTS / f"ablation_{name}.csv")
    keys = ["rank", "voxel_resolution", "alpha", "lambda_prior", "lora_lr", "base", "seed"]
    wanted = itertools.product(*vars(grid).values())
    assert sorted(map(tuple, cells[keys].to_numpy())) == sorted(
        (r, v, a, w, lr, b, b + s) for r, v, a, w, lr, b, s in wanted
    )
    assert cells["train_loss"].map(len).eq(10).all()


def test_a_failed_cell_is_not_read_over(tmp_path):
    cells = made({8: 0.0}, {8: 0.0}, noise=0.0)
    cells.loc[3, "error"] = "MemoryError: too little"
    cells.to_csv(tmp_path / "cells.csv", index=False)
    with pytest.raises(ValueError, match="1 of 15 cells .* failed, e.g. rank 8, resolution 8: MemoryError"):
        read_cells(tmp_path / "cells.csv")
    cells.loc[3, "error"] = "x" * 10_000
    cells.to_csv(tmp_path / "cells.csv", index=False)
    with pytest.raises(ValueError, match="1 of 15 cells") as failed:
        read_cells(tmp_path / "cells.csv")
    assert len(str(failed.value)) < 1000


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"rank," * 20_000, "a line has more than 65,536 bytes"),
        (b"rank,seed\n1," + b"2," * 40_000, "a line has more than 65,536 bytes"),
        (b"rank,seed\n1,2\n", "not in index"),
        (b"\xff\xfe", "codec can't decode"),
        (b"", "No columns to parse"),
    ],
    ids=["a long header", "a long line", "columns missing", "no text", "empty"],
)
def test_a_file_that_is_no_table_of_cells_is_named(tmp_path, content, why):
    path = tmp_path / "cells.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"cells\.csv: no table of a grid's cells \(.*{why}"):
        read_cells(path)
