"""What speed is promised, and what this machine does:  python benchmarks/all.py [--rounds 7] [--out speed.csv]

On a CPU in minutes: training steps of adapters against full fine-tuning, eight adapters in one pass against eight
runs, the two-way loss with more samples than people, voxels, prediction of a million embeddings, and the import. Ratios
are of things that take turns in one process. On a GPU also the rates of 100,000 probes in a gallery of as many; what
else needs a GPU, or two: benchmarks/gpu/run.sh.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.modules.projection import KEYPOINT_WIDTH, LightweightFaceProjectionLayer, gaussian_occupancy
from viewdiff_nb.predict import PredictOptions, predict_file
from viewdiff_nb.studies.adaptation import load_split
from viewdiff_nb.studies.benchmark import TrainingStep, machine, side_by_side, step_config
from viewdiff_nb.training.devices import choose_device
from viewdiff_nb.training.losses import TEMPERATURE, two_way

FULL, LORA, BOTH = "full fine-tuning", "LoRA r=8", "LoRA r=8 + 3-D projection"
GOALS = {  # at batch 32 and 128: how many times as fast as full fine-tuning
    (LORA, 32): 1.5,
    (LORA, 128): 1.4,
    (BOTH, 32): 1.3,
    (BOTH, 128): 1.15,
}
SAMPLES = 8192
Row = tuple[str, str, str]  # what, measured, goal


def steps(rounds: int) -> Iterator[Row]:
    faces = load_split().train.to(choose_device())
    for batch in (32, 128):
        makers = {name: partial(TrainingStep, step_config(name), faces, batch, False) for name in (FULL, LORA, BOTH)}
        timed = side_by_side(makers, rounds, 2)
        for name in (LORA, BOTH):
            pairs = zip(timed[FULL].seconds, timed[name].seconds, strict=True)
            faster = statistics.median(full / own for full, own in pairs)
            memory = timed[name].memory / timed[FULL].memory
            what = f"a step of {name} against {FULL}, batch {batch}"
            yield what, f"{faster:.2f} times as fast, {memory:.0%} of the memory", f"{GOALS[name, batch]:g} times"


def square(predicted: torch.Tensor, gallery: torch.Tensor, person: torch.Tensor) -> torch.Tensor:
    """`two_way` by its definition: every sample's front against every prediction."""
    scaled = F.normalize(predicted, dim=-1) @ F.normalize(gallery, dim=-1).T / TEMPERATURE
    back = scaled[:, person].T
    partners = (person[:, None] == person) & ~torch.eye(len(person), dtype=torch.bool)
    right = back.diagonal() - back.masked_fill(partners, -float("inf")).logsumexp(1)
    return F.cross_entropy(scaled, person, reduction="none") - right


def loss(rounds: int) -> Iterator[Row]:
    predicted, gallery = torch.randn(SAMPLES, 384, requires_grad=True), torch.randn(1300, 384)
    person, ratios = torch.randint(1300, (SAMPLES,)), []
    for _ in range(min(rounds, 3)):
        spent = []
        for of in (square, two_way):
            started = time.perf_counter()
            of(predicted, gallery, person).mean().backward()
            spent.append(time.perf_counter() - started)
        ratios.append(spent[1] / spent[0])
    what = f"the two-way loss, {SAMPLES:,} samples of 1,300 people, against its definition"
    yield what, f"{statistics.median(ratios):.2f} of the time", "linear in the samples"


def in_space(layer: LightweightFaceProjectionLayer, points: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """The projection's CNN by its definition: torch's convolutions of the occupancy."""
    occupancy = gaussian_occupancy(points, layer.voxel_resolution, KEYPOINT_WIDTH)
    return layer.refine(gains[..., None, None, None] * occupancy)


def voxels(rounds: int) -> Iterator[Row]:
    device = choose_device()
    for resolution, batch in ((8, 128), (16, 32)):
        layer = LightweightFaceProjectionLayer(64, 5, resolution).to(device)
        points = torch.rand(batch, 5, 3, device=device) - 0.5
        gains, ratios = torch.rand(batch, 5, device=device, requires_grad=True), []
        for _ in range(rounds + 2):  # the first two warm up
            spent = []
            for of in (in_space, LightweightFaceProjectionLayer.scene):
                started = time.perf_counter()
                of(layer, points, gains).square().mean().backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent.append(time.perf_counter() - started)
            ratios.append(spent[1] / spent[0])
        what = f"voxels {resolution}³ of {batch} faces, forward and backward, against convolutions in space"
        yield what, f"{statistics.median(ratios[2:]):.2f} of the time", "less"


def prediction(rows: int = 10**6) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        src = np.lib.format.open_memmap(folder / "in.npy", "w+", np.float16, (rows, 384))
        for start in range(0, rows, 50_000):
            src[start : start + 50_000] = rng.standard_normal((len(src[start : start + 50_000]), 384))
        src.flush()
        np.save(folder / "poses.npy", rng.uniform(-80, 80, (rows, 3)).astype(np.float32))
        options = PredictOptions(folder / "poses.npy", device="cpu")
        report = predict_file("mobilefacenet", folder / "in.npy", folder / "out.npy", options)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    yield (
        f"prediction of {rows:,} embeddings with the shipped weights",
        f"{rows / report['seconds']:,.0f} a second; the whole program at most {memory:.1f} GB",
        "20,000 a second",
    )


def evaluation(people: int = 100_000) -> Iterator[Row]:
    if not torch.cuda.is_available():
        return
    gallery = torch.randn(people, 384, device="cuda")
    probes, person = gallery + 1.5 * torch.randn_like(gallery), torch.arange(people, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    recognition_by_yaw(probes, gallery, person, torch.rand(people, device="cuda") * 90)
    seconds, memory = time.perf_counter() - started, torch.cuda.max_memory_allocated() / 1e9
    yield f"all rates of {people:,} probes in a gallery of as many", f"{seconds:.1f} s, {memory:.1f} GB", "10 s"


def one_pass() -> Iterator[Row]:
    command = [sys.executable, Path(__file__).with_name("one_pass.py"), "--adapters", "8", "--rounds", "2"]
    done = subprocess.run([*command, "--batches", "10"], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines()[1:]:
        what, _, measured = line.partition(": ")
        yield f"one pass, {what}", measured, "0.4 times"


def imported(rounds: int) -> Iterator[Row]:
    program = "import torch, time; s = time.perf_counter(); import viewdiff_nb; print(time.perf_counter() - s)"
    spent = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in range(rounds)
    ]
    yield "import viewdiff_nb, torch there already", f"{1e3 * statistics.median(spent):.0f} ms", "50 ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="the table as CSV, too")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    rows, parts = (
        [],
        (
            prediction(),
            imported(arguments.rounds),
            steps(arguments.rounds),
            loss(arguments.rounds),
            voxels(arguments.rounds),
            evaluation(),
            one_pass(),
        ),
    )
    for part in parts:
        for row in part:
            rows.append(row)
            print(f"- {row[0]}: {row[1]} (goal: {row[2]})", flush=True)
    if arguments.out:
        pd.DataFrame(rows, columns=["what", "measured", "goal"]).to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
