"""Two GPUs against one:  python benchmarks/gpu/several.py OUT [--batches 512 2048 8192 16384]

Weights: small models without dropout are trained on one GPU, then by torchrun on two; a batch means the same on both,
so they end with the same weights but for the order of sums. A run of two that was resumed is compared with the whole.
Speed: milliseconds a step of the second epoch of whole trainings (mix-up, dropout, bfloat16), as in training.py; both
in one call on one machine, and in OUT/several.csv.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import torch

from viewdiff_nb.faces import FaceViews, Split
from viewdiff_nb.studies.adaptation import COMMON, FULL_PROFILE, LORA_8, load_split
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.training import TrainConfig, train
from viewdiff_nb.training.checkpoint import build_model

EXACT = TrainConfig(
    d_model=64, nhead=4, num_layers=2, dim_feedforward=128, voxel_resolution=8, dropout=0.0, batch_size=16, epochs=3
)
LORA = {"use_lora_attention": True}
CASES = {
    "whole model": {},
    "mix-up": {"mixup": True},
    "a batch that two do not divide": {"batch_size": 15},
    "LoRA and projection": LORA | {"use_projection_layer": True},
    "prior, accumulation": LORA | {"use_prior_preservation": True, "gradient_accumulation_steps": 2},
    "cross-view": {"use_cross_view": True, "n_views": 3, "batch_size": 15},
    "bfloat16": {"use_amp": True},
    "CUDA graphs": LORA | {"use_projection_layer": True, "mixup": True, "use_cuda_graph": True},
}
AGAIN = "resumed"  # beside the whole run it is a part of
TIMED = {"full fine-tuning": {}, "LoRA r=8": LORA_8 | {"min_yaw": 0.0}}
MODES = ("eager", "graph")


def train_all(out: Path, devices: int, train_faces: FaceViews, val_faces: FaceViews) -> dict[str, dict]:
    """The state dict of every case."""
    base, found = out / "base.pth", {}
    if devices == 1:
        torch.save(train(EXACT, train_faces, val_faces, progress=False).model.state_dict(), base)
    for name, changes in CASES.items():
        path = str(base) if "use_lora_attention" in changes else None
        config = replace(EXACT, devices=devices, base_model_path=path, **changes)
        found[name] = train(config, train_faces, val_faces, progress=False).model.state_dict()
    whole = replace(EXACT, devices=devices, epochs=4, save_every=1, save_dir=str(out / f"whole_{devices}"))
    found["whole"] = train(whole, train_faces, val_faces, progress=False).model.state_dict()
    from_epoch_2 = replace(whole, save_dir=None, resume=f"{whole.save_dir}/checkpoint_epoch_2_enhanced.pth")
    found[AGAIN] = train(from_epoch_2, train_faces, val_faces, progress=False).model.state_dict()
    return found


def time_all(out: Path, devices: int, split: Split, batches: list[int], steps: int) -> list[float]:
    """Milliseconds a step, for every batch, model and mode."""
    large, found = out / "large.pth", []
    if devices == 1:  # untrained; a step costs the same
        torch.save(build_model(COMMON, split.train.feature_dim, base=True).state_dict(), large)
    few = split.val.select(torch.arange(20))
    for batch, (_, options), mode in product(batches, TIMED.items(), MODES):
        faces = split.train.where(torch.arange(batch * steps) % len(split.train))
        path = str(large) if options else None
        config = replace(COMMON, epochs=2, batch_size=batch, use_amp=True, base_model_path=path, **options)
        config = replace(config, devices=devices, use_cuda_graph=mode == "graph")
        first, both = train(config, faces, few, progress=False).history["seconds"].tail(2)
        found.append(1e3 * (both - first) / steps)
    return found


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two models' weights."""
    return max((one[name].cpu() - other[name].cpu()).abs().max().item() for name in one)


def report(out: Path, batches: list[int]) -> None:
    """What one GPU and two left in OUT, side by side."""
    one, two = (torch.load(out / f"{count}.pt", map_location="cpu") for count in (1, 2))
    print(f"one GPU against two, largest difference of a weight; {machine()}")
    for name in (*CASES, "whole"):
        print(f"{name:32s} {apart(one[name], two[name]):.1e}")
    for name, models in (("one GPU", one), ("two GPUs", two)):
        print(f"resumed against whole, {name}: {apart(models['whole'], models[AGAIN]):.1e}")
    timed = [json.loads((out / f"{count}.json").read_text(encoding="utf-8")) for count in (1, 2)]
    rows = [
        {"batch_size": batch, "name": name, "mode": mode, "one_ms": alone, "two_ms": both, "times": both / alone}
        for (batch, name, mode), alone, both in zip(product(batches, TIMED, MODES), *timed, strict=True)
    ]
    pd.DataFrame(rows).assign(machine=machine()).to_csv(out / "several.csv", index=False, float_format="%.4g")
    for row in rows:
        print(
            f"batch {row['batch_size']}, {row['name']}, {row['mode']}: {row['one_ms']:.2f} ms a step on one GPU, "
            f"{row['two_ms']:.2f} on two, {row['times']:.2f} times"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", type=int, nargs="*", default=[512, 2048, 8192, 16384])
    parser.add_argument("--steps", type=int, default=60, help="of an epoch")
    arguments = parser.parse_args()
    out, devices = arguments.out, int(os.environ.get("WORLD_SIZE", "1"))
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    split = load_split(FULL_PROFILE)
    people = split.train.select(torch.arange(40)), split.val.select(torch.arange(30))
    found = train_all(out, devices, *people)
    torch.set_float32_matmul_precision("high")
    timed = time_all(out, devices, split, arguments.batches, arguments.steps)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, out / f"{devices}.pt")
        (out / f"{devices}.json").write_text(json.dumps(timed))
    if devices > 1:
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, *sys.argv], check=True)
    report(out, arguments.batches)


if __name__ == "__main__":
    main()
