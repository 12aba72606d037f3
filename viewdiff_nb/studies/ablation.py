"""A grid of LoRA ranks, voxel resolutions and prior weights: its cells trained, scored and stored; and what they say.

All cells adapt one base, trained on near-frontal views, to side views; as many as possible are trained in one pass.
What is said of them averages within a seed first, over the axes that are not asked about. Intervals are Student's over
seeds, so they tell of other adapters on the same base.
"""

import itertools
import json
import math
import platform
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from viewdiff_nb import __version__
from viewdiff_nb.faces import Split
from viewdiff_nb.metrics import COUNTS, recognition_by_yaw
from viewdiff_nb.studies.adaptation import BOUNDARY, FULL_PROFILE, Profile, base_model, parameter_counts
from viewdiff_nb.studies.benchmark import TrainingStep, machine
from viewdiff_nb.studies.significance import Estimate, judged_lines, over_seeds, told_apart
from viewdiff_nb.studies.store import Store, passes, run_jobs, train_pass
from viewdiff_nb.training import TrainConfig, TrainResult, choose_device, predict
from viewdiff_nb.training.batches import move_if_it_fits

COLUMNS = ("rank", "voxel_resolution", "lora_alpha", "lambda_prior", "lora_lr")
ALPHAS: dict[str, Callable[[int], float]] = {
    "1": lambda rank: 1.0,
    "rank": float,
    "2 rank": lambda rank: 2.0 * rank,
    "rsLoRA": lambda rank: rank**1.5,  # alpha / rank is then sqrt(rank), the scale of rsLoRA with alpha = rank
}
CELLS_PER_PASS = {"cpu": 8, "cuda": 32}
GUIDE = {"rank": 8, "voxel_resolution": 16, "lambda_prior": 0.1}  # and lora_alpha = rank
CHOICE = ["rank", "voxel_resolution"]
LINE = 2**16  # bytes of a line of a table, at most


@dataclass(frozen=True)
class Grid:
    """The values of every axis; a cell for each combination. By default rank and voxels, without a prior."""

    rank: Sequence[int] = (4, 8, 16)
    voxel_resolution: Sequence[int] = (0, 4, 8, 16, 32)  # 0: without the projection
    lora_alpha: Sequence[str] = ("rank",)  # of ALPHAS
    lambda_prior: Sequence[float] = (0.0,)  # 0: without prior preservation
    lora_lr: Sequence[float] = (1e-2,)
    base: Sequence[int] = (0, 1, 2)  # seeds of the bases
    seed: Sequence[int] = (0,)  # of the adapter, its data order and dropout, on each base

    def configs(self, bases: Mapping[int, Path], epochs: int, common: TrainConfig) -> list[TrainConfig]:
        """The training of every cell; values that make none raise a ValueError."""
        adapted = replace(common, use_lora_attention=True, min_yaw=BOUNDARY, epochs=epochs)
        return [
            replace(
                adapted,
                freeze_base=True,
                rank=rank,
                use_projection_layer=resolution > 0,
                voxel_resolution=resolution or common.voxel_resolution,
                lora_alpha=ALPHAS[alpha](rank),
                use_prior_preservation=weight > 0,
                lambda_prior=weight,
                lora_lr=rate,
                base_model_path=str(bases[base]),
                seed=len(self.seed) * base + seed,
            )
            for rank, resolution, alpha, weight, rate, base, seed in itertools.product(*vars(self).values())
        ]

    def alphas(self) -> list[str]:
        """The rule of alpha of every cell."""
        return [values[2] for values in itertools.product(*vars(self).values())]


FAST_GRID = Grid(voxel_resolution=(0, 4, 8), lambda_prior=(0.1,), base=(0,), seed=(0, 1))
PRIOR_GRID = Grid(voxel_resolution=(16,), lambda_prior=(0.0, 0.05, 0.1, 0.2, 1.0))
RATE_GRID = Grid((1, 2, 4, 8, 16, 32), (0,), tuple(ALPHAS), (0.0,), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
"""Is a rank better, or its learning rate?"""


def run_grid(
    grid: Grid,
    split: Split,
    profile: Profile = FULL_PROFILE,
    workers: int | None = None,
    cells_per_pass: int | None = None,
    progress: Callable = iter,
    store: Store | None = None,
) -> pd.DataFrame:
    """Train and score the cells that are not stored yet; all of them as a table.

    Args:
        workers: passes side by side, see `store.run_jobs`; a joblib.parallel_config takes them to a cluster.
        cells_per_pass: at most, by default `CELLS_PER_PASS`; 1 trains each alone.
        progress: wraps the list of passes, e.g. tqdm.
        store: by default that of split.

    Returns:
        a row per cell: `COLUMNS`, base, alpha (the rule), seed, epochs, batch_size; every rate as
        {val, test}_{rate}[_{yaw}]; parameters, trainable; step_ms and seconds (a cell's share of its pass),
        cells_together; memory_mb (of a training step alone, see `TrainingStep.memory`); train_loss (a list over
        epochs) and final_train_loss; machine, version; error (of a cell that failed; its rates are missing).
    """
    store = store or Store(split)
    run_jobs(partial(base_model, store, split, profile), [(seed,) for seed in grid.base], workers)
    bases = {seed: base_model(store, split, profile, seed)[0] for seed in grid.base}
    configs = grid.configs(bases, profile.adapt_epochs, profile.common)
    cells = {config: store.find("ablation", config) for config in configs}
    missing = [config for config, found in cells.items() if found is None]
    most = cells_per_pass or CELLS_PER_PASS[choose_device(profile.common.device).type]
    jobs = [(job,) for job in passes(missing, most)]
    errors: dict[TrainConfig, str] = {}
    for failed in run_jobs(partial(_work, store, split), jobs, workers, progress):
        errors |= failed
    cells |= {config: store.find("ablation", config) for config in missing}
    rows = []
    of_base = {str(path): seed for seed, path in bases.items()}
    for config, alpha in zip(configs, grid.alphas(), strict=True):
        row = {name: getattr(config, name) for name in (*COLUMNS, "seed", "epochs", "batch_size")}
        row |= {"base": of_base[str(config.base_model_path)], "alpha": alpha}
        row["voxel_resolution"] *= config.use_projection_layer
        found = cells[config]
        rows.append(row | (found["cell"] if found else {"error": errors.get(config, "")}))
    return pd.DataFrame(rows)


def _work(store: Store, split: Split, job: list[TrainConfig]) -> dict[TrainConfig, str]:
    """Train, score and store the cells of a pass; the errors of those that failed.

    Where cells that are trained together fail, each is tried alone.
    """
    try:
        cells = _train_cells(split, job)
    except Exception as error:  # a grid of many hours goes on; the cell's row says what happened
        if len(job) == 1:
            return {job[0]: f"{type(error).__name__}: {error}"}
        return {cell: why for config in job for cell, why in _work(store, split, [config]).items()}
    for config, cell in zip(job, cells, strict=True):
        store.get("ablation", config, partial(dict, cell=cell))
    return {}


def _train_cells(split: Split, job: list[TrainConfig]) -> list[dict]:
    memory: dict[tuple, float] = {}
    cells = []
    for config, result in zip(job, train_pass(job, split), strict=True):
        kind = config.rank, config.use_prior_preservation
        if kind not in memory:
            faces = split.train.where(torch.arange(config.batch_size)).to(choose_device(config.device))
            step = TrainingStep(replace(config, mixup=False), faces, config.batch_size, config.use_amp)
            memory[kind] = step.memory() / 1e6
        cells.append(_scored(result, split) | {"cells_together": len(job), "memory_mb": memory[kind]})
    return cells


def _scored(result: TrainResult, split: Split) -> dict:
    cell: dict = {}
    device = next(result.model.parameters()).device
    for part, scored in (("val", split.val), ("test", split.test)):
        faces = move_if_it_fits(scored, device)
        found = recognition_by_yaw(predict(result.model, faces), faces.front, faces.person, faces.abs_yaw)
        for where, suffix in (("all", ""), ("0-45", "_0-45"), ("45-90", "_45-90"), ("75-90", "_75-90")):
            rates = {rate: value for rate, value in found[where].items() if rate not in COUNTS}
            cell |= {f"{part}_{rate}{suffix}": round(value, 6) for rate, value in rates.items()}
    counts = parameter_counts(result.model)
    return cell | {
        "parameters": counts["parameters"],
        "trainable": counts["trainable"],
        "step_ms": 1e3 * result.train_seconds / result.steps,
        "seconds": result.train_seconds,
        "final_train_loss": round(result.history["train_loss"].iloc[-1], 5),
        "train_loss": [round(loss, 5) for loss in result.history["train_loss"]],
        "machine": machine(),
        "version": f"viewdiff_nb {__version__}, numpy {np.__version__}, {platform.system()}",
        "error": "",
    }


def read_cells(path: Path) -> pd.DataFrame:
    """The table of `run_grid`, from the CSV file of benchmarks/ablation.py.

    Raises:
        ValueError: that names the file, if it is no such table, or a cell failed.
    """
    try:
        with open(path, "rb") as file:
            if any(len(line) > LINE for line in iter(partial(file.readline, LINE + 1), b"")):
                raise ValueError(f"a line has more than {LINE:,} bytes")  # pandas takes minutes for a million columns
        kinds = {"dtype": {"error": object}, "converters": {"train_loss": json.loads}}
        cells = pd.read_csv(path, index_col=False, **kinds)
        cells[[*GUIDE, "seed"]].astype(float)
        cells["error"] = cells["error"].fillna("")
    except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{path}: no table of a grid's cells ({why}); run benchmarks/ablation.py again") from error
    if len(failed := cells[cells["error"] != ""]):
        rank, resolution, why = (str(failed.iloc[0][name])[:300] for name in (*CHOICE, "error"))
        raise ValueError(
            f"{len(failed)} of {len(cells)} cells in {path} failed, e.g. rank {rank}, resolution {resolution}: {why}; "
            "run the grid again"
        )
    return cells


def by_seed(cells: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """A row per combination of by, a column per seed."""
    return cells.pivot_table(index=list(by), columns="seed", values=value, aggfunc="mean")


def summary(cells: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """A row per combination of by: mean and half (of its 95 % interval over seeds)."""
    table = by_seed(cells, by, value)
    found = [over_seeds(row) for row in table.to_numpy()]
    return pd.DataFrame([(e.mean, e.half) for e in found], index=table.index, columns=["mean", "half"])


def paired(cells: pd.DataFrame, by: Sequence[str], one: Hashable, other: Hashable, value: str) -> Estimate:
    """Of value(one) - value(other), over seeds."""
    rows = by_seed(cells, by, value).T
    return over_seeds(rows[one] - rows[other])


class Recommendation(NamedTuple):
    """The cheapest rank and resolution within margin of the best, by means on validation people."""

    rank: int
    voxel_resolution: int
    best: tuple[int, int]  # the highest mean
    margin: float  # the standard error of such a mean; 0 for one seed
    seeds_won: int  # in how many of the seeds the recommended one is the best
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
    means, margin = dict(zip(table.index, table.mean(axis=1), strict=True)), _standard_error(table)
    best = max(means, key=means.__getitem__)
    near = [choice for choice, mean in means.items() if mean >= means[best] - margin]
    rank, voxel_resolution = min(near, key=lambda choice: (choice[1], choice[0]))
    seeds_won = sum(winner == (rank, voxel_resolution) for winner in table.idxmax())
    return Recommendation(rank, voxel_resolution, best, margin, seeds_won, table.shape[1])


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
    others = [choice for choice in table.index if choice != found.chosen]
    apart = sum(told_apart([paired(cells, CHOICE, found.chosen, other, "test_tar") for other in others]))
    if found.chosen == found.best:
        why = "it has the highest mean, and nothing cheaper is"
    else:
        why = f"{choice_words(*found.best)} has the highest mean, and this is the cheapest"
    if found.seeds == 1:
        certainty = "One seed has no interval: take this for a smoke test."
    else:
        certainty = f"On test people {apart} of the {len(others)} other combinations are told from it (p after Holm)."
    return (
        f"**Take {choice_words(*found.chosen)}**: TAR at FAR 1e-3 of "
        f"{over_seeds(table.T[found.chosen]):.3f} on test people. On validation people {why} within one standard "
        f"error ({found.margin:.4f}) of that; it is the best cell in {found.seeds_won} of {found.seeds} seeds. "
        f"{certainty}"
    )


def choice_words(rank: int, voxel_resolution: int) -> str:
    return f"rank {rank} with {voxel_resolution}³ voxels" if voxel_resolution else f"rank {rank} without voxels"


def effect_lines(cells: pd.DataFrame, value: str = "test_tar") -> str:
    """For every axis with several values: each value against the guide's (or the first), as a Markdown list."""
    found = {}
    for axis, advised in GUIDE.items():
        values = sorted(cells[axis].unique())
        reference = advised if advised in values else values[0]
        for other in values:
            if other != reference:
                words = f"{axis} {other:g} against {reference:g} in TAR"
                found[words] = paired(cells, [axis], other, reference, value)
    return "\n".join(judged_lines(found))


def guide_lines(cells: pd.DataFrame) -> str:
    """The guide's advice on rank and voxels, and whether measurement agrees, as a Markdown list."""
    found, lines = {}, []
    for axis, ours, words in zip(CHOICE, recommend(cells).chosen, ("rank 8", "16³ voxels"), strict=True):
        advised = GUIDE[axis]
        if advised not in set(cells[axis]):
            lines.append(f"- {words}: not in this grid.")
        elif ours == advised:
            lines.append(f"- {words}: **agrees** with what is recommended here.")
        else:
            words += f": **disagrees**; {ours} is recommended here, in TAR on test people against it"
            found[words] = paired(cells, [axis], ours, advised, "test_tar")
    finest, coarsest = max(cells["voxel_resolution"]), min(v for v in cells["voxel_resolution"] if v)
    if finest > coarsest:
        words = f"the guide says that finer grids are more precise; {finest}³ against {coarsest}³ in TAR"
        found[words] = paired(cells, ["voxel_resolution"], finest, coarsest, "test_tar")
    return "\n".join(lines + judged_lines(found))


def prior_lines(cells: pd.DataFrame) -> str:
    """What each weight of the prior keeps below 45 degrees, and gains beyond, against the least, as a Markdown list."""
    first, *weights = sorted(cells["lambda_prior"].unique())
    found = {}
    for weight, (words, side) in itertools.product(weights, (("keeps below", "0-45"), ("gains beyond", "45-90"))):
        words = f"lambda {weight:g} against {first:g} in TAR {words} 45°"
        found[words] = paired(cells, ["lambda_prior"], weight, first, f"test_tar_{side}")
    return "\n".join(judged_lines(found))
