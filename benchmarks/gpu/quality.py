"""The quality studies at full length, several trainings at a time on one GPU.

    python benchmarks/gpu/quality.py OUT [--seeds 20] [--module-seeds 5] [--recipe-seeds 3] [--workers 8] [--fast]

A step of this model leaves most of the GPU idle, so processes that share it get more done than one.
OUT gets the tables as CSV and PNG, of the seeds of which every training is done. Finished trainings are kept in
VIEWDIFF_NB_RUNS, by default OUT/runs: started again, after --seconds or an interrupt, it goes on where it was. Training
times of such a run are not comparable with those of one run at a time.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where module_study and recipe_study are
os.environ.setdefault("VIEWDIFF_NB_RUNS", str(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve() / "runs"))

import matplotlib.pyplot as plt
import torch
import torch.multiprocessing as mp
from module_study import FULL_MODULES, module_study, multi_view_study, write_tables
from recipe_study import MODELS, RECIPES, recipe_study, write_table

from viewdiff_nb.faces.splits import Split
from viewdiff_nb.plots import save_table
from viewdiff_nb.studies import tables
from viewdiff_nb.studies.adaptation import (
    ALL_YAWS,
    BASELINES,
    BASES,
    FAST_PROFILE,
    FIXED,
    FULL_PROFILE,
    STEP_CHOSEN,
    STUDIED,
    Profile,
    load_split,
    run_job,
    run_study,
)
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.candidates import CLOSED_FORMS
from viewdiff_nb.studies.store import Store

OTHERS = (*ALL_YAWS[:-1], *BASELINES, *CLOSED_FORMS, *STUDIED, *STEP_CHOSEN)
ADAPTED = (ALL_YAWS[-1], *(name for name in OTHERS if name not in BASES))
RATES = ("rank1", "tar", "auc", "eer", "cosine")
Task = tuple[str, str, int]  # study, model, seed


def start_worker(fast: bool) -> None:
    """A process with one thread, which knows the split."""
    global _profile, _split
    torch.set_num_threads(1)
    _profile = FAST_PROFILE if fast else FULL_PROFILE
    _split = load_split(_profile)


def work(task: Task) -> tuple[Task, float]:
    """One model of the main study, or one seed of another one; the results go to the store."""
    study, name, seed = task
    started = time.perf_counter()
    if study == "main":
        run_job(Store(_split), _split, _profile, name, seed)
    elif study == "recipe":
        recipe_study(_profile, _split, [seed], names=[name], workers=1)
    else:
        of_study = {"modules": module_study, "views": multi_view_study}[study]
        of_study(FAST_PROFILE if _profile is FAST_PROFILE else FULL_MODULES, _split, [seed], workers=1)
    return task, time.perf_counter() - started


def main_tasks(seeds: range) -> list[list[Task]]:
    """In two stages, for the second starts from the bases of the first; within them a seed after the other."""
    bases = [("main", name, seed) for seed in seeds for name in BASES]
    return [bases, [("main", name, s) for s in seeds for name in ADAPTED if s == 0 or name not in FIXED]]


def write_main_tables(out: Path, profile: Profile, split: Split, seeds: range) -> None:
    """Table 4 in every rate, and the claims, from finished results."""
    note = f"{len(seeds)} seeds, mean ± 95 % interval over seeds and people; {machine()}"
    results = run_study(profile, split, seeds=seeds, workers=1)
    for rate in RATES:
        table, title = tables.recognition_table(results, rate), f"Table 4 · {rate} on test people, by |yaw|"
        plt.close(save_table(table, f"table4_{rate}", out, title, note))
        print(f"{rate}\n{table.iloc[:, :3].to_string()}", flush=True)
    claims = tables.claims(results)
    (out / "claims.md").write_text(f"{claims}\n\n{note}\n")
    print(claims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0, help="of the main study, to share it among machines")
    parser.add_argument("--module-seeds", type=int, default=5, help="at most --seeds: they start from its bases")
    parser.add_argument("--recipe-seeds", type=int, default=3, help="at most --seeds, too")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then what is running is given up")
    parser.add_argument("--fast", action="store_true")
    arguments = parser.parse_args()
    if arguments.first_seed and (arguments.module_seeds or arguments.recipe_seeds):
        parser.error("--first-seed is for the main study: give --module-seeds 0 --recipe-seeds 0")
    if max(arguments.module_seeds, arguments.recipe_seeds) > arguments.seeds:
        parser.error(
            f"--module-seeds and --recipe-seeds must be at most --seeds={arguments.seeds}, got "
            f"{arguments.module_seeds} and {arguments.recipe_seeds}"
        )
    os.environ["OMP_NUM_THREADS"] = "1"
    started, out = time.perf_counter(), arguments.out
    first, end = arguments.first_seed, arguments.first_seed + arguments.seeds
    stages = main_tasks(range(first, end))
    # recipes start from the bases that the main study of the same seed trains
    recipes = [("recipe", name, seed) for seed in range(arguments.recipe_seeds) for name in (*MODELS, *RECIPES)]
    stages.append(recipes + [(s, "", seed) for seed in range(arguments.module_seeds) for s in ("modules", "views")])
    done: set[Task] = set()
    over = False
    with mp.get_context("spawn").Pool(arguments.workers, start_worker, (arguments.fast,)) as pool:
        for stage in stages:
            coming = pool.imap_unordered(work, stage)
            for _ in stage:
                left = max(0.0, arguments.seconds - (time.perf_counter() - started))
                try:
                    task, seconds = coming.next(min(left, 1e6))  # a clock has no infinity
                except mp.TimeoutError:
                    over = True
                    break
                done.add(task)
                study, name, seed = task
                spent = time.perf_counter() - started
                print(f"{spent:4.0f} s: {study} {name} seed {seed} in {seconds:.0f} s", flush=True)
            if over:
                break

    wanted = [task for stage in stages for task in stage]
    print(f"{len(done)} of {len(wanted)} tasks are done", flush=True)
    profile = FAST_PROFILE if arguments.fast else FULL_PROFILE
    split = load_split(profile)
    note = f"mean ± 95 % interval over seeds and people; {machine()}"
    missing = {seed for study, name, seed in wanted if study == "main" and (study, name, seed) not in done}
    complete = range(first, min(missing, default=end))
    if complete:
        write_main_tables(out, profile, split, complete)
    if over:
        sys.exit(f"the time was over: {len(complete)} of {arguments.seeds} seeds are complete; start again to go on")
    if arguments.recipe_seeds:
        seeds = range(arguments.recipe_seeds)
        write_table(recipe_study(profile, split, seeds), out, f"{arguments.recipe_seeds} seeds, {note}")
    if arguments.module_seeds:
        seeds = range(arguments.module_seeds)
        note = f"{arguments.module_seeds} seeds, mean ± 95 % interval over seeds; {machine()}"
        profile = FAST_PROFILE if arguments.fast else FULL_MODULES
        write_tables(module_study(profile, split, seeds), multi_view_study(profile, split, seeds), out, note)


if __name__ == "__main__":
    main()
