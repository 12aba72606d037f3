"""The quality studies at full length, several seeds at a time on one GPU.

    python benchmarks/gpu/quality.py OUT [--seeds 20] [--module-seeds 5] [--recipe-seeds 3] [--workers 8] [--fast]

A step of this model is bound by kernel launches, so processes that share the GPU hardly disturb each other.
OUT gets the tables as CSV and PNG, and its own store of runs: training times of such a run are not
comparable with those of one run at a time.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VIEWDIFF_NB_RUNS", str(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve() / "runs"))

import matplotlib.pyplot as plt
import torch.multiprocessing as mp

from viewdiff_nb.plots import save_table
from viewdiff_nb.studies import tables
from viewdiff_nb.studies.adaptation import FAST, FULL, load_split, run_study
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.module_study import FULL_MODULES, module_study, multi_view_study, write_tables
from viewdiff_nb.studies.recipe_study import MODELS, RECIPES, recipe_study, write_table


def work(task: tuple[str, int, bool]) -> tuple[str, int, float]:
    """One study, or one recipe, for one seed; the results go to the store."""
    study, seed, fast = task
    started = time.perf_counter()
    profile = FAST if fast else FULL
    split = load_split(profile)
    if study == "main":
        run_study(profile, split, seeds=[seed], workers=1)
    elif study in ("modules", "views"):
        of_study = {"modules": module_study, "views": multi_view_study}[study]
        of_study(FAST if fast else FULL_MODULES, split, [seed])
    else:
        recipe_study(profile, split, [seed], names=[study])
    return study, seed, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--module-seeds", type=int, default=5, help="at most --seeds: they start from its bases")
    parser.add_argument("--recipe-seeds", type=int, default=3, help="at most --seeds, too")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--fast", action="store_true")
    arguments = parser.parse_args()
    if max(arguments.module_seeds, arguments.recipe_seeds) > arguments.seeds:
        parser.error(f"--module-seeds and --recipe-seeds must be at most --seeds={arguments.seeds}, got "
                     f"{arguments.module_seeds} and {arguments.recipe_seeds}")  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = "1"
    tasks = [("main", seed, arguments.fast) for seed in range(arguments.seeds)]
    # recipes start from the bases that the main study of the same seed trains
    recipes = [(name, seed, arguments.fast) for seed in range(arguments.recipe_seeds) for name in (*MODELS, *RECIPES)]
    more = [(study, seed, arguments.fast) for seed in range(arguments.module_seeds) for study in ("modules", "views")]
    with mp.get_context("spawn").Pool(arguments.workers) as pool:
        for group in (tasks, recipes + more):
            for study, seed, seconds in pool.imap_unordered(work, group):
                print(f"{study} seed {seed}: {seconds:.0f} s", flush=True)

    profile = FAST if arguments.fast else FULL
    split = load_split(profile)
    note = f"mean ± 95 % interval over seeds and people; {machine()}"
    if arguments.seeds:
        results = run_study(profile, split, seeds=range(arguments.seeds))
        for rate in ("rank1", "tar", "auc", "eer", "cosine"):
            table, title = tables.recognition_table(results, rate), f"Table 4 · {rate} on test people, by |yaw|"
            plt.close(save_table(table, f"table4_{rate}", arguments.out, title, f"{arguments.seeds} seeds, {note}"))
            print(table.to_string(), flush=True)
        (arguments.out / "claims.md").write_text(f"{tables.claims(results)}\n\n{arguments.seeds} seeds, {note}\n")
        print(tables.claims(results))
    if arguments.recipe_seeds:
        seeds = range(arguments.recipe_seeds)
        write_table(recipe_study(profile, split, seeds), arguments.out, f"{arguments.recipe_seeds} seeds, {note}")
    if arguments.module_seeds:
        seeds = range(arguments.module_seeds)
        note = f"{arguments.module_seeds} seeds, mean ± 95 % interval over seeds; {machine()}"
        profile = FAST if arguments.fast else FULL_MODULES
        write_tables(module_study(profile, split, seeds), multi_view_study(profile, split, seeds), arguments.out, note)


if __name__ == "__main__":
    main()
