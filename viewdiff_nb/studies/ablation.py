"""A grid of LoRA ranks, voxel resolutions and prior weights in one call: every cell trained, scored and kept.

All cells adapt one base, trained on near-frontal views, to side views. Cells that differ only in what
`training.together.FREE` names are trained in one pass. A finished cell is stored under its full config and the data's
fingerprint: a rerun, after whatever ended the last one, does what is missing.
"""

import itertools
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from viewdiff_nb import __version__
from viewdiff_nb.faces.splits import Split
from viewdiff_nb.files import GPU_RESULTS, install_hint
from viewdiff_nb.metrics import COUNTS, recognition_by_yaw
from viewdiff_nb.studies.adaptation import (
    BOUNDARY,
    COMMON,
    FULL_PROFILE,
    Profile,
    base_model,
    default_workers,
    parameter_counts,
)
from viewdiff_nb.studies.benchmark import TrainingStep, machine
from viewdiff_nb.studies.significance import Estimate, judged_lines, over_seeds, told_apart
from viewdiff_nb.studies.store import Store
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import choose_device, with_cuda_graph
from viewdiff_nb.training.evaluation import predict
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.one_pass import refusal, shared_part, train_together
from viewdiff_nb.training.result import TrainResult

AXES = ("rank", "voxel_resolution", "lora_alpha", "lambda_prior", "lora_lr")
PARTS, WHERE = ("val", "test"), ("all", "0-45", "45-90", "75-90")
TOGETHER = {"cpu": 8, "cuda": 32}  # cells of one pass
BACKENDS = ("sequential", "loky", "dask", "ray")


@dataclass(frozen=True)
class Grid:
    """The values of every axis; a cell for each combination.

    rank: of LoRA. voxel_resolution: of the projection; 0 for none. lora_alpha: None for the rank. lambda_prior: of
    prior preservation; 0 for none. seed: of the adapter, its data order and dropout; the base has seed 0.
    """

    rank: Sequence[int] = (4, 8, 16)
    voxel_resolution: Sequence[int] = (8, 16, 32)
    lora_alpha: Sequence[float | None] = (None,)
    lambda_prior: Sequence[float] = (0.05, 0.1, 0.2)
    lora_lr: Sequence[float] = (1e-2,)
    seed: Sequence[int] = tuple(range(5))

    def __len__(self) -> int:
        return len(list(self._cells()))

    def _cells(self) -> Iterator[tuple]:
        return itertools.product(
            self.rank, self.voxel_resolution, self.lora_alpha, self.lambda_prior, self.lora_lr, self.seed
        )

    def configs(self, base: Path, epochs: int, common: TrainConfig) -> list[TrainConfig]:
        """The training run of every cell.

        Raises:
            ValueError: for values that make no run.
        """
        return [
            replace(
                common,
                use_lora_attention=True,
                freeze_base=True,
                min_yaw=BOUNDARY,
                epochs=epochs,
                rank=rank,
                lora_alpha=float(rank if alpha is None else alpha),
                lora_lr=rate,
                seed=seed,
                use_projection_layer=resolution > 0,
                voxel_resolution=resolution or common.voxel_resolution,
                use_prior_preservation=weight > 0,
                lambda_prior=weight,
                base_model_path=str(base),
            )
            for rank, resolution, alpha, weight, rate, seed in self._cells()
        ]


FAST_GRID = Grid(voxel_resolution=(4, 8, 16), lambda_prior=(0.1,), seed=(0, 1))


def run_grid(
    grid: Grid,
    split: Split,
    profile: Profile = FULL_PROFILE,
    backend: str = "loky",
    workers: int | None = None,
    together: int | None = None,
    progress: Callable | None = None,
) -> pd.DataFrame:
    """Train and score the cells that are not stored yet; all of them as a table.

    Args:
        backend: of joblib, one of `BACKENDS`; "dask" uses the client that is open, "ray" the cluster it finds.
        workers: jobs side by side, by default `default_workers`.
        together: cells of one pass at most, by default `TOGETHER`; 1 trains each alone.
        progress: wraps an iterator of jobs, given total; e.g. tqdm.

    Returns:
        a row per cell: `AXES`, seed, epochs, batch_size; every rate as {val, test}_{rate}[_{yaw}]; parameters,
        trainable; step_ms and seconds (a cell's share of its pass), cells_together; memory_mb (of a training step
        alone, see `TrainingStep.memory`); train_loss (a list over epochs); machine, version; error (of a cell that
        failed; its rates are missing).

    Raises:
        ValueError, ImportError: for a backend that is unknown or not installed, before any work.
    """
    parallel = _parallel(backend, default_workers() if workers is None else workers)
    device = choose_device(COMMON.device)
    store = Store(split)
    base, _ = base_model(store, split, profile, seed=0)
    configs = grid.configs(base, profile.adapt_epochs, COMMON)
    missing = [c for c in configs if store.find(_key(c)) is None]
    jobs = _jobs(missing, together or TOGETHER[device.type])
    errors: dict[str, str] = {}
    calls = parallel.returned(_work, [(store, split, job) for job in jobs])
    for failed in progress(calls, total=len(jobs)) if progress else calls:
        errors |= failed
    rows = []
    for config in configs:
        found = store.find(_key(config))
        row = _axes(config) | ({"error": errors.get(str(_key(config)), "")} if found is None else found["cell"])
        rows.append(row)
    return pd.DataFrame(rows)


def _axes(config: TrainConfig) -> dict:
    row = {name: getattr(config, name) for name in (*AXES, "seed", "epochs", "batch_size")}
    return row | {"voxel_resolution": config.voxel_resolution if config.use_projection_layer else 0}


def _key(config: TrainConfig) -> dict:
    return {"name": "ablation", "config": replace(config, base_model_path=Path(config.base_model_path).name).to_dict()}


def _jobs(configs: Sequence[TrainConfig], together: int) -> list[list[TrainConfig]]:
    """Cells that are trained in one pass, the ranks of a seed side by side; expensive jobs first."""
    groups: dict[TrainConfig, list[TrainConfig]] = {}
    for config in configs:
        alone = together == 1 or refusal(config)
        groups.setdefault(config if alone else shared_part(config), []).append(config)
    jobs = [group[i : i + together] for group in groups.values() for i in range(0, len(group), together)]
    return sorted(jobs, key=lambda job: -len(job) * job[0].voxel_resolution ** 3 * job[0].use_projection_layer)


def _work(store: Store, split: Split, job: list[TrainConfig]) -> dict[str, str]:
    """Train, score and store the cells of a job; {key: error} of those that failed.

    Where cells that are trained together fail, each is tried alone.
    """
    try:
        cells = _train_job(split, job)
    except Exception as error:  # a grid of many hours goes on; the cell's row says what happened
        if len(job) == 1:
            return {str(_key(job[0])): f"{type(error).__name__}: {error}"}
        failed: dict[str, str] = {}
        for config in job:
            failed |= _work(store, split, [config])
        return failed
    for config, cell in zip(job, cells, strict=True):
        store.get(_key(config), lambda _, cell=cell: {"cell": cell})
    return {}


def _train_job(split: Split, job: list[TrainConfig]) -> list[dict]:
    if len(job) == 1:
        results = [train(with_cuda_graph(job[0]), split.train, split.val, progress=False)]
    else:
        results = train_together([with_cuda_graph(config) for config in job], split.train, split.val)
        if any(result.stopped == "diverged" for result in results):
            raise FloatingPointError("a run of the pass has no finite loss")
    memory: dict[tuple, float] = {}
    cells = []
    for config, result in zip(job, results, strict=True):
        step = config.rank, config.use_prior_preservation
        if step not in memory:
            memory[step] = _memory(config, split)
        cells.append(_scored(result, split) | {"cells_together": len(job), "memory_mb": memory[step]})
    return cells


def _memory(config: TrainConfig, split: Split) -> float:
    faces = split.train.where(torch.arange(config.batch_size)).to(choose_device(config.device))
    return TrainingStep(replace(config, mixup=False), faces, config.batch_size, config.use_amp).memory() / 1e6


def _scored(result: TrainResult, split: Split) -> dict:
    cell: dict = {}
    for part in PARTS:
        faces = getattr(split, part)
        rates = recognition_by_yaw(predict(result.model, faces), faces.front, faces.person, faces.abs_yaw)
        for where in WHERE:
            suffix = "" if where == "all" else f"_{where}"
            cell |= {f"{part}_{rate}{suffix}": round(v, 6) for rate, v in rates[where].items() if rate not in COUNTS}
    counts = parameter_counts(result.model)
    return cell | {
        "parameters": counts["parameters"],
        "trainable": counts["trainable"],
        "step_ms": 1e3 * result.train_seconds / result.steps,
        "seconds": result.train_seconds,
        "train_loss": [round(loss, 5) for loss in result.history["train_loss"]],
        "machine": machine(),
        "version": f"viewdiff_nb {__version__}, numpy {np.__version__}, {platform.system()}",
        "error": "",
    }


@dataclass(frozen=True)
class _Parallel:
    backend: str
    workers: int

    def returned(self, function: Callable, arguments: list[tuple]) -> Iterator:
        """function(*each) of arguments, as they are done where the backend can tell."""
        import joblib

        if self.backend == "sequential" or (self.workers == 1 and self.backend == "loky"):
            return (function(*each) for each in arguments)
        with joblib.parallel_config(backend=self.backend, n_jobs=self.workers):
            run = joblib.Parallel(return_as="generator_unordered" if self.backend == "loky" else "list", batch_size=1)
            return iter(run(joblib.delayed(function)(*each) for each in arguments))


def _parallel(backend: str, workers: int) -> _Parallel:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    try:
        if backend == "dask":
            from distributed import default_client

            default_client()  # raises ValueError if there is none
        elif backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
    except ImportError as error:
        raise ImportError(f"the {backend} backend needs more packages: {install_hint('cluster')}") from error
    return _Parallel(backend, workers)


# ---- What a grid of cells says: means with intervals, a recommendation, and the guide's advice beside it.
# Cells are averaged within a seed first, over the axes that are not asked about; intervals are Student's over seeds, so
# they tell of other adapters on the same base. What is recommended is chosen on validation people and stated on test
# people.

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
        raise ValueError(
            f"{len(failed)} of {len(cells)} cells in {path} failed, e.g. rank {first['rank']}, resolution "
            f"{first['voxel_resolution']}: {first['error']}; run the grid again"
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
    text = (
        f"**Take rank {found.rank} with {found.voxel_resolution}³ voxels**: TAR at FAR 1e-3 of "
        f"{over_seeds(table.loc[found.chosen]):.3f} on test people."
    )
    if found.chosen == found.best:
        text += " On validation people it has the highest mean, and nothing cheaper is"
    else:
        text += (
            f" On validation people rank {found.best[0]} with {found.best[1]}³ has the highest mean, and this is "
            "the cheapest"
        )
    text += (
        f" within one standard error ({found.margin:.4f}) of that; it is the best cell in {found.seeds_won} of "
        f"{found.seeds} seeds."
    )
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
