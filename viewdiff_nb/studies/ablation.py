"""A grid of LoRA ranks, voxel resolutions and prior weights in one call: every cell trained, scored and kept.

    python -m viewdiff_nb.studies.ablation [--fast] [--out figures] [--backend loky]

All cells adapt one base, trained on near-frontal views, to side views. Cells that differ only in what
`training.together.FREE` names are trained in one pass. A finished cell is stored under its full config and the data's
fingerprint: a rerun, after whatever ended the last one, does what is missing.
"""

import argparse
import itertools
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import __version__
from ..faces.splits import Split
from ..metrics import COUNTS, recognition_by_yaw
from ..paths import install_hint
from ..training.config import TrainConfig, choose_device
from ..training.evaluation import predict
from ..training.parallel import with_cuda_graph
from ..training.together import refusal, shared_part, train_together
from ..training.trainer import TrainResult, train
from .adaptation import BOUNDARY, COMMON, FAST, FULL, Profile, base_model, default_workers, load_split, parameter_counts
from .benchmark import TrainingStep, machine
from .command import study_arguments
from .store import Store

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
        return itertools.product(self.rank, self.voxel_resolution, self.lora_alpha, self.lambda_prior, self.lora_lr,
                                 self.seed)  # fmt: skip

    def configs(self, base: Path, epochs: int, common: TrainConfig) -> list[TrainConfig]:
        """The training run of every cell.

        Raises:
            ValueError: for values that make no run.
        """
        return [
            replace(common, use_lora_attention=True, freeze_base=True, min_yaw=BOUNDARY, epochs=epochs, rank=rank,
                    lora_alpha=float(rank if alpha is None else alpha), lora_lr=rate, seed=seed,
                    use_projection_layer=resolution > 0, voxel_resolution=resolution or common.voxel_resolution,
                    use_prior_preservation=weight > 0, lambda_prior=weight, base_model_path=str(base))
            for rank, resolution, alpha, weight, rate, seed in self._cells()
        ]  # fmt: skip


FAST_GRID = Grid(voxel_resolution=(4, 8, 16), lambda_prior=(0.1,), seed=(0, 1))


def run_grid(
    grid: Grid,
    split: Split,
    profile: Profile = FULL,
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
    return sorted(jobs, key=lambda job: -len(job) * job[0].voxel_resolution**3 * job[0].use_projection_layer)


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
        "parameters": counts["parameters"], "trainable": counts["trainable"],
        "step_ms": 1e3 * result.train_seconds / result.steps, "seconds": result.train_seconds,
        "train_loss": [round(loss, 5) for loss in result.history["train_loss"]], "machine": machine(),
        "version": f"viewdiff_nb {__version__}, numpy {np.__version__}, {platform.system()}", "error": "",
    }  # fmt: skip


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


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="loky")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--together", type=int, help="cells of one pass at most")


def main() -> None:
    from tqdm.auto import tqdm

    arguments = study_arguments(__doc__, more=_flags)
    profile, grid, out = *((FAST, FAST_GRID) if arguments.fast else (FULL, Grid())), arguments.out
    cells = run_grid(grid, load_split(profile), profile, arguments.backend, arguments.workers, arguments.together, tqdm)
    out.mkdir(parents=True, exist_ok=True)
    cells.to_csv(out / "ablation_cells.csv", index=False)
    print(f"{len(cells)} cells, {(cells['error'] != '').sum()} failed: {out / 'ablation_cells.csv'}")


if __name__ == "__main__":
    main()
