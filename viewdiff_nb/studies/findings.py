"""What a grid of cells says: means with intervals, a recommendation, and the guide's advice beside it.

Cells are averaged within a seed first, over the axes that are not asked about; intervals are Student's over seeds, so
they tell of other adapters on the same base. What is recommended is chosen on validation people and stated on test
people.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..paths import GPU_RESULTS
from .significance import Estimate, judged_lines, over_seeds, told_apart

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
    found = [over_seeds(row) for row in table.to_numpy()]
    return pd.DataFrame([(e.mean, e.half) for e in found], index=table.index, columns=["mean", "half"])


def paired(cells: pd.DataFrame, by: Sequence[str], one: object, other: object, value: str) -> Estimate:
    """Of value(one) - value(other), over seeds."""
    table = by_seed(cells, by, value)
    return over_seeds(table.loc[one] - table.loc[other])


@dataclass(frozen=True)
class Recommendation:
    """rank, voxel_resolution: the cheapest within margin of the best, by means on validation people.

    best: the rank and resolution with the highest mean. margin: the standard error of such a mean; 0 for one seed.
    seeds_won: in how many of the seeds the recommended one is the best.
    """

    rank: int
    voxel_resolution: int
    best: tuple[int, int]
    margin: float
    seeds_won: int
    seeds: int

    @property
    def chosen(self) -> tuple[int, int]:
        return self.rank, self.voxel_resolution


def recommend(cells: pd.DataFrame, rate: str = "tar") -> Recommendation:
    """The cheapest rank and resolution, fewest voxels first, whose mean is within one standard error of the best.

    The one-standard-error rule (Breiman et al. 1984; Hastie et al., The Elements of Statistical Learning, 7.10). "Not
    told apart from the best" would be no such rule: with few seeds nothing is told apart, and the cheapest always won.
    """
    table = by_seed(cells, CHOICE, f"val_{rate}")
    means, margin = table.mean(axis=1), _standard_error(table)
    best = means.idxmax()
    near = means.index[means >= means[best] - margin]
    chosen = min(near, key=lambda choice: (choice[1], choice[0]))
    won = int((table.idxmax() == chosen).sum())
    return Recommendation(*map(int, chosen), tuple(map(int, best)), margin, won, table.shape[1])


def _standard_error(table: pd.DataFrame) -> float:
    """Of the mean over a row's seeds, pooled over all rows: what neither the row nor the seed explains.

    Two seeds of one row tell next to nothing about their spread; those of nine rows do.
    """
    rows, seeds = table.shape
    if seeds == 1 or rows == 1:
        return 0.0
    rest = table.sub(table.mean(axis=1), axis=0)
    rest = rest - rest.mean(axis=0)
    variance = rest.pow(2).to_numpy().sum() / ((rows - 1) * (seeds - 1))
    return math.sqrt(variance / seeds)


def recommendation_text(cells: pd.DataFrame) -> str:
    """The recommendation in words, with its certainty."""
    found = recommend(cells)
    table = by_seed(cells, CHOICE, "test_tar")
    text = (f"**Take rank {found.rank} with {found.voxel_resolution}³ voxels**: TAR at FAR 1e-3 of "
            f"{over_seeds(table.loc[found.chosen]):.3f} on test people.")  # fmt: skip
    if found.chosen == found.best:
        text += " On validation people it has the highest mean, and nothing cheaper is"
    else:
        text += (f" On validation people rank {found.best[0]} with {found.best[1]}³ has the highest mean, and this is "
                 "the cheapest")  # fmt: skip
    text += (f" within one standard error ({found.margin:.4f}) of that; it is the best cell in {found.seeds_won} of "
             f"{found.seeds} seeds.")  # fmt: skip
    if found.seeds == 1:
        return text + " One seed has no interval: take this for a smoke test."
    others = [choice for choice in table.index if choice != found.chosen]
    apart = sum(told_apart([paired(cells, CHOICE, found.chosen, other, "test_tar") for other in others]))
    return text + f" On test people {apart} of the {len(others)} other combinations are told from it (p after Holm)."


def effect_lines(cells: pd.DataFrame, value: str = "test_tar") -> str:
    """For every axis with several values: each value against the guide's (or the first), as a Markdown list."""
    found: dict[str, Estimate] = {}
    for axis in ("rank", "voxel_resolution", "lambda_prior"):
        values = sorted(cells[axis].unique())
        reference = GUIDE[axis] if GUIDE[axis] in values else values[0]
        for other in values:
            if other != reference:
                words = f"{axis} {_plain(other)} against {_plain(reference)} in TAR"
                found[words] = paired(cells, [axis], other, reference, value)
    return "\n".join(judged_lines(found))


def guide_lines(cells: pd.DataFrame) -> str:
    """The guide's advice, and whether measurement agrees, as a Markdown list."""
    chosen, lines = recommend(cells), []
    found: dict[str, Estimate] = {}
    for axis, words in (("rank", "rank 8"), ("voxel_resolution", "16³ voxels")):
        ours = getattr(chosen, axis)
        if GUIDE[axis] not in set(cells[axis]):
            lines.append(f"- {words}: not in this grid.")
        elif ours == GUIDE[axis]:
            lines.append(f"- {words}: **agrees** with what is recommended here.")
        else:
            words += f": **disagrees**; {_plain(ours)} is recommended here, in TAR on test people against it"
            found[words] = paired(cells, [axis], ours, GUIDE[axis], "test_tar")
    first, *weights = sorted(cells["lambda_prior"].unique())
    for weight in weights:
        for words, side in (("keeps below 45°", "0-45"), ("gains beyond 45°", "45-90")):
            words = f"lambda {_plain(weight)} against {_plain(first)} in TAR {words}"
            found[words] = paired(cells, ["lambda_prior"], weight, first, f"test_tar_{side}")
    finest, coarsest = max(cells["voxel_resolution"]), min(v for v in cells["voxel_resolution"] if v)
    if finest > coarsest:
        words = f"the guide says that finer grids are more precise; {finest}³ against {coarsest}³ in TAR"
        found[words] = paired(cells, ["voxel_resolution"], finest, coarsest, "test_tar")
    return "\n".join(lines + judged_lines(found))


def _plain(value: float) -> str:
    return f"{value:g}"
