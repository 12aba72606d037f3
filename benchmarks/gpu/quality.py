"""The main study at full length, several trainings at a time on one GPU.

    python benchmarks/gpu/quality.py OUT [--seeds 20] [--workers 8] [--fast]

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

os.environ.setdefault("VIEWDIFF_NB_RUNS", str(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve() / "runs"))

import matplotlib.pyplot as plt
import torch
import torch.multiprocessing as mp

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
Task = tuple[str, int]  # model, seed


def start_worker(fast: bool) -> None:
    """A process with one thread, which knows the split."""
    global _profile, _split
    torch.set_num_threads(1)
    _profile = FAST_PROFILE if fast else FULL_PROFILE
    _split = load_split(_profile)


def work(task: Task) -> tuple[Task, float]:
    """One model of the study; the result goes to the store."""
    started = time.perf_counter()
    run_job(Store(_split), _split, _profile, *task)
    return task, time.perf_counter() - started


def main_tasks(seeds: range) -> list[list[Task]]:
    """In two stages, for the second starts from the bases of the first; within them a seed after the other."""
    bases = [(name, seed) for seed in seeds for name in BASES]
    return [bases, [(name, s) for s in seeds for name in ADAPTED if s == 0 or name not in FIXED]]


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
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then what is running is given up")
    parser.add_argument("--fast", action="store_true")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    started, out = time.perf_counter(), arguments.out
    first, end = arguments.first_seed, arguments.first_seed + arguments.seeds
    stages = main_tasks(range(first, end))
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
                name, seed = task
                spent = time.perf_counter() - started
                print(f"{spent:4.0f} s: {name} seed {seed} in {seconds:.0f} s", flush=True)
            if over:
                break

    wanted = [task for stage in stages for task in stage]
    print(f"{len(done)} of {len(wanted)} tasks are done", flush=True)
    profile = FAST_PROFILE if arguments.fast else FULL_PROFILE
    split = load_split(profile)
    missing = {seed for name, seed in wanted if (name, seed) not in done}
    complete = range(first, min(missing, default=end))
    if complete:
        write_main_tables(out, profile, split, complete)
    if over:
        sys.exit(f"the time was over: {len(complete)} of {arguments.seeds} seeds are complete; start again to go on")


if __name__ == "__main__":
    main()
