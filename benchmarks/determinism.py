"""Same seed, same bytes?   python benchmarks/determinism.py

In processes of their own: a training with dropout, mix-up, LoRA, projection and prior, twice with one thread and once
with two; and a small grid with its base, twice from nothing. Prints what is equal to the last bit, and how far two
threads are from one. Exits with 1 if something that must be equal is not. Three minutes on two cores.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from viewdiff_nb.studies import adaptation
from viewdiff_nb.studies.ablation import Grid, run_grid
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.store import Store
from viewdiff_nb.training import train
from viewdiff_nb.training.checkpoint import build_model

TOLERANCE = 1e-4  # of weights, between one thread and two
OF_THE_CLOCK = ["step_ms", "seconds", "memory_mb"]  # a grid's columns that are measured


def training(out: Path) -> None:
    """The weights of a training, as a file."""
    split = adaptation.load_split(adaptation.FAST_PROFILE)
    base = out.with_suffix(".base")
    torch.manual_seed(0)
    state = build_model(adaptation.FAST_PROFILE.common, split.train.feature_dim, base=True).state_dict()
    torch.save(state, base)
    options = adaptation.LORA_8 | adaptation.PROJECTION | {"use_prior_preservation": True, "base_model_path": str(base)}
    config = replace(adaptation.FAST_PROFILE.common, epochs=2, device="cpu", **options)
    torch.save(train(config, split.train, split.val, progress=False).model.state_dict(), out)


def grid(out: Path) -> None:
    """The table of a small grid, without what a clock says."""
    profile = adaptation.FAST_PROFILE
    split = adaptation.load_split(profile)
    cells = Grid(rank=(4, 8), voxel_resolution=(0, 4), lambda_prior=(0.0, 0.1), base=(0,))
    found = run_grid(cells, split, profile, workers=1, store=Store(split, out.with_suffix(".runs")))
    found.drop(columns=OF_THE_CLOCK).to_csv(out, index=False)


PARTS = {"training": training, "grid": grid}


def run(part: str, out: Path, threads: int) -> Path:
    surroundings = os.environ | {"OMP_NUM_THREADS": str(threads), "VIEWDIFF_NB_RUNS": str(out.parent)}
    subprocess.run([sys.executable, __file__, "--part", part, "--out", str(out)], check=True, env=surroundings)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # the process of a part
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        return PARTS[arguments.part](arguments.out)
    failed = False
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = [torch.load(run("training", folder / f"{i}.pth", i // 2 + 1), weights_only=True) for i in range(3)]
        apart = [max((weights[0][k] - found[k]).abs().max().item() for k in weights[0]) for found in weights[1:]]
        print(f"a training twice: weights {'equal' if apart[0] == 0 else f'{apart[0]:.1e} apart'}")
        print(f"one thread and two: weights at most {apart[1]:.1e} apart (allowed {TOLERANCE:g})")
        tables = [run("grid", folder / f"{i}.csv", 1).read_bytes() for i in range(2)]
        digest = hashlib.sha256(tables[0]).hexdigest()[:12]
        same = tables[0] == tables[1]
        print(
            f"a grid twice, {len(pd.read_csv(folder / '0.csv'))} cells: {'equal, ' + digest if same else 'it differs'}"
        )
        failed = apart[0] > 0 or apart[1] > TOLERANCE or not same
    sys.exit(failed)


if __name__ == "__main__":
    main()
