"""What a grid of cells says: means with intervals, a recommendation, and the guide's advice beside it.

Cells are averaged within a seed first, over the axes that are not asked about; intervals are Student's over seeds, so
they tell of other adapters on the same base. What is recommended is chosen on validation people and stated on test
people.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..paths import GPU_RESULTS
from .tables import mean_interval

SHIPPED = GPU_RESULTS / "ablation_cells.csv"  # the whole default grid, on one GPU
GUIDE = {"rank": 8, "voxel_resolution": 16, "lambda_prior": 0.1}  # and lora_alpha = rank
CHOICE = ["rank", "voxel_resolution"]


def read_cells(path: Path = SHIPPED) -> pd.DataFrame:
    """The table that `ablation.run_grid` makes, from the CSV file of its command.

    Raises:
        ValueError: if a cell has failed.
    """
    cells = pd.read_csv(path, converters={"train_loss": json.loads}, dtype={"error": object})
    cells["error"] = cells["error"].fillna("")
    if len(failed := cells[cells["error"] != ""]):
        first = failed.iloc[0]
        raise ValueError(f"{len(failed)} of {len(cells)} cells in {path} failed, e.g. rank {first['rank']}, resolution "
                         f"{first['voxel_resolution']}: {first['error']}; run the grid again")  # fmt: skip
    return cells


def by_seed(cells: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """A row per combination of by, a column per seed."""
    return cells.pivot_table(index=list(by), columns="seed", values=value, aggfunc="mean")


def summary(cells: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """A row per combination of by: mean and half (of its 95 % interval over seeds)."""
    table = by_seed(cells, by, value)
    rows = [mean_interval(row) for row in table.to_numpy()]
    return pd.DataFrame(rows, index=table.index, columns=["mean", "half"])


def paired(cells: pd.DataFrame, by: Sequence[str], one: object, other: object, value: str) -> tuple[float, float]:
    """Mean of value(one) - value(other) over seeds, and half of its interval."""
    table = by_seed(cells, by, value)
    return mean_interval(table.loc[one] - table.loc[other])


def told_apart(mean: float, half: float) -> bool:
    return abs(mean) > half  # false for a single seed, whose half is nan


@dataclass(frozen=True)
class Recommendation:
    """rank, voxel_resolution: the cheapest that validation people do not tell from the best. best: that one."""

    rank: int
    voxel_resolution: int
    best: tuple[int, int]
    seeds_won: int
    seeds: int

    @property
    def chosen(self) -> tuple[int, int]:
        return self.rank, self.voxel_resolution


def recommend(cells: pd.DataFrame, rate: str = "tar") -> Recommendation:
    """Which rank and resolution to take; fewest voxels first, then the lowest rank."""
    table = by_seed(cells, CHOICE, f"val_{rate}")
    best = table.mean(axis=1).idxmax()
    for choice in sorted(table.index, key=lambda pair: (pair[1], pair[0])):
        if choice == best or not told_apart(*paired(cells, CHOICE, best, choice, f"val_{rate}")):
            won = int((table.idxmax() == choice).sum())
            return Recommendation(*(int(v) for v in choice), tuple(int(v) for v in best), won, table.shape[1])
    raise AssertionError("the best is never told from itself")


def recommendation_text(cells: pd.DataFrame) -> str:
    """The recommendation in words, with its certainty."""
    found = recommend(cells)
    at = summary(cells, CHOICE, "test_tar").loc[found.chosen]
    text = (f"**Take rank {found.rank} with {found.voxel_resolution}³ voxels**: TAR at FAR 1e-3 of "
            f"{_with_half(at['mean'], at['half'])} on test people.")  # fmt: skip
    if found.chosen != found.best:
        text += (f" Rank {found.best[0]} with {found.best[1]}³ has the highest mean on validation people, and cannot "
                 "be told from it there.")  # fmt: skip
    text += f" It is the best cell on validation people in {found.seeds_won} of {found.seeds} seeds."
    if found.seeds == 1:
        return text + " One seed has no interval: take this for a smoke test."
    others = [c for c in by_seed(cells, CHOICE, "test_tar").index if tuple(c) != found.chosen]
    apart = [c for c in others if told_apart(*paired(cells, CHOICE, found.chosen, c, "test_tar"))]
    return text + f" On test people {len(apart)} of the {len(others)} other combinations are told from it."


def effect_lines(cells: pd.DataFrame, value: str = "test_tar") -> str:
    """For every axis with several values: each value against the guide's (or the first), as a Markdown list."""
    lines = []
    for axis in ("rank", "voxel_resolution", "lambda_prior"):
        values = sorted(cells[axis].unique())
        reference = GUIDE[axis] if GUIDE[axis] in values else values[0]
        for other in values:
            if other != reference:
                mean, half = paired(cells, [axis], other, reference, value)
                certain = "told apart" if told_apart(mean, half) else "not told apart"
                lines.append(f"- {axis} {_plain(other)} against {_plain(reference)}: {mean:+.4f} ± {half:.4f} in TAR, "
                             f"{certain}.")  # fmt: skip
    return "\n".join(lines)


def guide_lines(cells: pd.DataFrame) -> str:
    """The guide's advice, and whether measurement agrees, as a Markdown list."""
    found = recommend(cells)
    lines = []
    for axis, words in (("rank", "rank 8"), ("voxel_resolution", "16³ voxels")):
        ours = getattr(found, axis)
        if GUIDE[axis] not in set(cells[axis]):
            lines.append(f"- {words}: not in this grid")
        elif ours == GUIDE[axis]:
            lines.append(f"- {words}: **agrees** with what is recommended here")
        else:
            mean, half = paired(cells, [axis], ours, GUIDE[axis], "test_tar")
            sure = "and the two are told apart" if told_apart(mean, half) else "and the two are not told apart"
            lines.append(f"- {words}: **disagrees**; {_plain(ours)} is recommended here, {mean:+.4f} ± {half:.4f} in "
                         f"TAR against it on test people, {sure}")  # fmt: skip
    weights = sorted(cells["lambda_prior"].unique())
    if len(weights) > 1:
        kept = {w: paired(cells, ["lambda_prior"], w, weights[0], "test_tar_0-45") for w in weights[1:]}
        gained = {w: paired(cells, ["lambda_prior"], w, weights[0], "test_tar_45-90") for w in weights[1:]}
        for w in weights[1:]:
            lines.append(f"- lambda {_plain(w)} against {_plain(weights[0])}: keeps {kept[w][0]:+.4f} ± "
                         f"{kept[w][1]:.4f} in TAR below 45°, gains {gained[w][0]:+.4f} ± {gained[w][1]:.4f} beyond"
                         + ("" if told_apart(*kept[w]) or told_apart(*gained[w]) else ": not told apart"))  # fmt: skip
    finest, coarsest = max(cells["voxel_resolution"]), min(v for v in cells["voxel_resolution"] if v)
    if finest > coarsest:
        mean, half = paired(cells, ["voxel_resolution"], finest, coarsest, "test_tar")
        better = "**higher precision**" if mean > half else "**not higher precision**"
        lines.append(f"- the guide says that finer grids are more precise: {finest}³ against {coarsest}³ is "
                     f"{mean:+.4f} ± {half:.4f} in TAR, {better}")  # fmt: skip
    return "\n".join(f"{line}." for line in lines)


def _with_half(mean: float, half: float) -> str:
    return f"{mean:.3f}" if pd.isna(half) else f"{mean:.3f} ± {half:.3f}"


def _plain(value: float) -> str:
    return f"{value:g}"
