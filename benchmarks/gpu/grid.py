"""A whole grid on one GPU and on all of them:  python benchmarks/gpu/grid.py OUT [--bases 0 1 2] [--fast]

Ranks 4, 8, 16, voxels none to 32, prior weights 0, 0.1, 1 on three bases: 135 cells. Each way starts from the same
stored bases, and trains, scores and stores all cells; OUT/grid.csv has their seconds, and how far the tables are apart.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from viewdiff_nb.studies.ablation import FAST_GRID, Grid, run_grid
from viewdiff_nb.studies.adaptation import FAST_PROFILE, FULL_PROFILE, base_model, load_split
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.store import Store, run_jobs

GRID = Grid(lambda_prior=(0.0, 0.1, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bases", type=int, nargs="+", default=GRID.base)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the process that runs the grid one way
    arguments = parser.parse_args()
    out, grid = arguments.out, FAST_GRID if arguments.fast else replace(GRID, base=arguments.bases)
    profile = FAST_PROFILE if arguments.fast else FULL_PROFILE
    split = load_split(profile)
    if arguments.part:
        started = time.perf_counter()
        cells = run_grid(grid, split, profile, store=Store(split, out / arguments.part))
        cells["whole_seconds"] = time.perf_counter() - started
        return cells.to_csv(out / f"{arguments.part}.csv", index=False)
    started, store = time.perf_counter(), Store(split, out / "one")
    run_jobs(partial(base_model, store, split, profile), [(seed,) for seed in grid.base])
    print(f"{machine()}; {len(grid.base)} bases {time.perf_counter() - started:.0f} s", flush=True)
    shutil.copytree(out / "one", out / "all", dirs_exist_ok=True)
    tables = {}
    for part, visible in (("one", "0"), ("all", ",".join(map(str, range(torch.cuda.device_count()))))):
        command = [sys.executable, *sys.argv, "--part", part]
        subprocess.run(command, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": visible})
        tables[part] = pd.read_csv(out / f"{part}.csv")
        spent, failed = tables[part]["whole_seconds"].iloc[0], tables[part]["error"].notna().sum()
        print(f"{visible or 'no GPU'}: {len(tables[part])} cells, {failed} failed, {spent:.0f} s", flush=True)
    apart = (tables["one"]["test_tar"] - tables["all"]["test_tar"]).abs().max()
    rows = [
        {"gpus": n, "cells": len(tables[part]), "seconds": tables[part]["whole_seconds"].iloc[0], "apart": apart}
        for part, n in (("one", 1), ("all", torch.cuda.device_count()))
    ]
    pd.DataFrame(rows).assign(machine=machine()).to_csv(out / "grid.csv", index=False, float_format="%.4g")
    print(f"TAR of a cell is at most {apart:.4f} apart")


if __name__ == "__main__":
    main()
