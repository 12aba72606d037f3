"""Two GPUs against one, weight by weight:  python benchmarks/gpu/several.py OUT

Small models without dropout are trained on one GPU, then by torchrun on two; a batch means the same on both, so they
end with the same weights but for the order of sums. A run of two that was resumed is compared with the whole one.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.studies.adaptation import load_split
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.training import TrainConfig, train

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
}
AGAIN = "resumed"  # beside the whole run it is a part of


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


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two models' weights."""
    return max((one[name].cpu() - other[name].cpu()).abs().max().item() for name in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out, devices = parser.parse_args().out, int(os.environ.get("WORLD_SIZE", "1"))
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    split = load_split()
    people = split.train.select(torch.arange(40)), split.val.select(torch.arange(30))
    found = train_all(out, devices, *people)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, out / f"{devices}.pt")
    if devices > 1:
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, *sys.argv], check=True)
    two = torch.load(out / "2.pt", map_location="cpu")
    print(f"one GPU against two, largest difference of a weight; {machine()}")
    for name in (*CASES, "whole"):
        print(f"{name:32s} {apart(found[name], two[name]):.1e}")
    for name, models in (("one", found), ("two", two)):
        print(f"resumed against whole, {name} GPU{'s' * (name == 'two')}: {apart(models['whole'], models[AGAIN]):.1e}")


if __name__ == "__main__":
    main()
