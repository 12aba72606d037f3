"""Words and pictures of grids whose answer is known by construction."""

import itertools
import warnings

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from viewdiff_nb.studies import grid_plots
from viewdiff_nb.studies.findings import (
    effect_lines,
    guide_lines,
    paired,
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
        tar = 0.9 + rank_gain[rank] + voxel_gain[voxels] + 0.01 * seed + noise * ((7 * i + 5 * j + 3 * k + 11 * seed) % 5 - 2)
        row = {"rank": rank, "voxel_resolution": voxels, "lora_alpha": float(rank), "lambda_prior": weight, "seed": seed,
               "error": "", "trainable": 1000 * rank, "memory_mb": float(voxels**2), "step_ms": 1.0, "seconds": 1.0,
               "train_loss": [5.0 - 0.1 * rank, 4.0 - 0.1 * rank], "machine": "here", "cells_together": 8}  # fmt: skip
        for part in ("val", "test"):
            row |= {f"{part}_{rate}{where}": tar + lambda_gain * k * (where == "_0-45")
                    for rate in ("tar", "rank1") for where in ("", "_0-45", "_45-90")}  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


def test_means_are_over_seeds_and_the_rest_is_averaged_within():
    cells = made({4: 0.0, 8: 0.02}, {8: 0.0}, noise=0.0)
    found = summary(cells, ["rank"], "test_tar")
    assert found.loc[8, "mean"] == pytest.approx(0.94) and found.loc[4, "mean"] == pytest.approx(0.92)
    assert found.loc[4, "half"] == pytest.approx(2.776 * 0.015811 / 5**0.5, rel=1e-3)  # t(.975, 4) s / sqrt(5)
    mean, half = paired(cells, ["rank"], 8, 4, "test_tar")
    assert mean == pytest.approx(0.02) and half == pytest.approx(0.0, abs=1e-9)  # seeds cancel


def test_the_clear_winner_is_recommended():
    cells = made({4: 0.0, 8: 0.02, 16: 0.05}, {8: 0.0, 16: 0.02}, noise=0.0005)
    found = recommend(cells)
    assert found.chosen == found.best == (16, 16) and found.seeds_won == found.seeds == 5
    text = recommendation_text(cells)
    assert "Take rank 16 with 16³ voxels" in text and "in 5 of 5 seeds" in text
    assert "5 of the 5 other combinations are told from it" in text
    assert "- rank 4 against 8: -0.0200 ± 0.00" in effect_lines(cells)
    words = guide_lines(cells)
    assert "rank 8: **disagrees**; 16 is recommended here, +0.0300" in words and "are told apart" in words
    assert "16³ voxels: **agrees**" in words and "16³ against 8³ is +0.02" in words and "**higher precision**" in words


def test_what_cannot_be_told_from_the_best_and_is_cheaper_is_recommended():
    cells = made({4: 0.0, 8: 0.0005}, {8: 0.0, 16: 0.0002}, noise=0.01)
    found = recommend(cells)
    assert found.voxel_resolution == 8 and found.rank == 4
    if found.best != found.chosen:
        assert "cannot be told from it" in recommendation_text(cells)
    assert "not told apart" in effect_lines(cells)


def test_one_seed_promises_nothing():
    cells = made({4: 0.0, 8: 0.05}, {4: 0.0, 8: 0.0}, noise=0.0, seeds=1)
    assert "take this for a smoke test" in recommendation_text(cells)
    assert "nan" in effect_lines(cells) and "not told apart" in effect_lines(cells)


def test_the_weight_of_the_prior_is_reported_both_ways():
    cells = made({8: 0.0}, {8: 0.0}, noise=0.0, lambda_gain=0.01)
    assert "lambda 0.2 against 0.05: keeps +0.0200 ± 0.0000 in TAR below 45°, gains +0.0000" in guide_lines(cells)
    assert "Lambda 0.2 keeps +0.020" in grid_plots.retention(cells).axes[0].get_title("left")
    plt.close("all")


def test_the_shipped_cells_are_the_whole_default_grid():
    cells = read_cells()
    assert len(cells) == 135 and cells.groupby(["rank", "voxel_resolution", "lambda_prior"]).size().eq(5).all()
    assert cells["train_loss"].map(len).eq(7).all() and "H200" in cells["machine"].iloc[0]


def test_a_failed_cell_is_not_read_over(tmp_path):
    cells = made({8: 0.0}, {8: 0.0}, noise=0.0)
    cells.loc[3, "error"] = "MemoryError: too little"
    cells.to_csv(tmp_path / "cells.csv", index=False)
    with pytest.raises(ValueError, match="1 of 15 cells .* failed, e.g. rank 8, resolution 8: MemoryError"):
        read_cells(tmp_path / "cells.csv")


@pytest.mark.parametrize("seeds", [1, 5])
def test_every_picture_is_written_twice_and_says_what_it_shows(tmp_path, seeds):
    cells = made({4: 0.0, 8: 0.05}, {4: 0.0, 8: 0.0}, noise=0.001, seeds=seeds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = grid_plots.write_all(cells, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    titles = {name: fig.axes[0].get_title("left") for name, fig in figures.items()}
    assert titles["ablation_heat_map"] == "Rank 8 with 4³ voxels is enough" or seeds == 1
    assert titles["ablation_loss"] == "LoRA rank 8 fits the training people best"
    again = {p.name: p.read_bytes() for p in tmp_path.glob("*.svg")}
    grid_plots.write_all(cells, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.svg")} == again


def test_interaction_is_told_from_none():
    cells = made({4: 0.0, 8: 0.0}, {8: 0.0, 16: 0.0}, noise=0.0)
    assert grid_plots.interaction(cells, "voxel_resolution", "rank").axes[0].get_title("left") == (
        "Resolution and rank are not seen to interact")  # fmt: skip
    crossed = (cells["rank"] == 8) & (cells["voxel_resolution"] == 16)
    cells.loc[crossed, "test_tar"] += 0.05
    assert grid_plots.interaction(cells, "voxel_resolution", "rank").axes[0].get_title("left") == (
        "Resolution and rank interact")  # fmt: skip
    plt.close("all")
