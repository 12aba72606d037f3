"""How much is too much?   python benchmarks/load.py [PART ...] [--size 1.0] [--work FOLDER]

Each part is a process of its own, whose time and peak memory are printed:
    faces     a face set of 5 million views, 1,000 numbers wide (10 GB), loaded and trained on memory-mapped, an epoch
    gallery   all rates of 200 probes in a gallery of a million
    grid      a grid of 10,000 finished cells, read again
    predict   10 million embeddings, predicted from a file to a file with the shipped weights
With --size 0.01 a hundredth of each. FOLDER, a temporary one by default, needs 30 GB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from viewdiff_nb.faces import load_face_views
from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.predict import PredictOptions, predict_file
from viewdiff_nb.studies import adaptation
from viewdiff_nb.studies.ablation import Grid, run_grid
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.store import Store
from viewdiff_nb.training import TrainConfig, train

WIDE, VIEWS_EACH = 1000, 500


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what}: {time.perf_counter() - started:.1f} s; the process at most {memory:.2f} GB so far", flush=True)


def rows_on_disk(path: Path, shape: tuple[int, ...], draw: Callable[[int], np.ndarray], kind: type) -> None:
    rows = np.lib.format.open_memmap(path, "w+", kind, shape)
    for start in range(0, len(rows), 20_000):
        part = rows[start : start + 20_000]
        part[:] = draw(len(part))
        rows.flush()


def make_faces(folder: Path, size: float) -> None:
    """Face set of random people; its metadata is written line by line."""
    rng, people = np.random.default_rng(0), max(40, round(10_000 * size))
    for kind, each in (("front", 1), ("video", VIEWS_EACH)):
        count = people * each
        rows_on_disk(
            folder / f"{kind}_feature.npy", (count, WIDE), lambda n: rng.standard_normal((n, WIDE)), np.float16
        )
        rows_on_disk(
            folder / f"{kind}_keypoints.npy", (count, 5, 3), lambda n: rng.uniform(0, 256, (n, 5, 3)), np.float32
        )
        with open(folder / f"{kind}_metadata.json", "w", encoding="utf-8") as file:
            file.write(f'{{"num_samples":{count},"feature_dim":{WIDE},"poses":[\n')
            angles = np.round(rng.uniform(-80, 80, (count, 3)), 1)
            file.write(",\n".join(json.dumps(row) for row in angles.tolist()))
            names = (f'{{"person_name":"person_{i // each:06d}"}}' for i in range(count))
            file.write('\n],"metadata":[\n' + ",\n".join(names) + "\n]}\n")


def faces(folder: Path, size: float) -> None:
    with timed("loaded"):
        found = load_face_views(folder, mmap=True)
    config = TrainConfig(
        d_model=64, nhead=4, num_layers=1, dim_feedforward=64, batch_size=4096, epochs=1, val_every=1, device="cpu"
    )
    few = found.select(torch.arange(20))
    rest = found.select(torch.arange(20, len(found.names)))
    with timed(f"trained on {len(rest):,} views"):
        train(config, rest, few, progress=False)


def gallery(folder: Path, size: float) -> None:
    count, probes = round(10**6 * size), 200
    people = torch.randn(count, 384)
    person = torch.randint(count, (probes,))
    with timed(f"all rates of {probes:,} probes among {count:,}"):
        recognition_by_yaw(people[person] + torch.randn(probes, 384), people, person, torch.rand(probes) * 90)


def grid(folder: Path, size: float) -> None:
    profile = replace(adaptation.FAST_PROFILE, base_epochs=1)
    split = adaptation.load_split(profile)
    store, cells = (
        Store(split, folder),
        Grid(rank=(4,), voxel_resolution=(0,), base=(0,), seed=range(round(10**4 * size))),
    )
    base, _ = adaptation.base_model(store, split, profile, 0)
    cell = {"test_tar": 0.5, "val_tar": 0.5, "error": "", "train_loss": [5.0] * 10}
    with timed("stored"):
        for config in cells.configs({0: base}, profile.adapt_epochs, profile.common):
            store.get("ablation", config, partial(dict, cell=cell))
    with timed("read again"):
        print(f"{len(run_grid(cells, split, profile, store=store)):,} cells")


def predicted(folder: Path, size: float) -> None:
    count = round(10**7 * size)
    with timed(f"predicted {count:,}"):
        options = PredictOptions(folder / "poses.npy", device="cpu")
        predict_file("mobilefacenet", folder / "in.npy", folder / "out.npy", options)


def make_embeddings(folder: Path, size: float) -> None:
    rng, count = np.random.default_rng(0), round(10**7 * size)
    rows_on_disk(folder / "in.npy", (count, 384), lambda n: rng.standard_normal((n, 384)), np.float16)
    rows_on_disk(folder / "poses.npy", (count, 3), lambda n: rng.uniform(-80, 80, (n, 3)), np.float32)


PARTS = {"faces": faces, "gallery": gallery, "grid": grid, "predict": predicted}
MADE = {"faces": make_faces, "predict": make_embeddings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART")
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)  # the process of a part
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}, only {', '.join(PARTS)}")
    if arguments.within:
        return PARTS[arguments.parts[0]](arguments.within, arguments.size)
    print(machine(), flush=True)
    for part in arguments.parts:
        with tempfile.TemporaryDirectory(dir=arguments.work) as name:
            MADE.get(part, lambda folder, size: None)(Path(name), arguments.size)
            print(f"- {part}", flush=True)
            command = [sys.executable, __file__, part, "--size", str(arguments.size), "--within", name]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
