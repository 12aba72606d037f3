"""What modules earn on real faces, beside their controls:  python benchmarks/cfp_controls.py [SET] [--seeds 3]

SET is a benchmark that `python -m viewdiff_nb.faces.cfp` makes, runs/cfp by default. The small transformer trained on
the shipped synthetic people is adapted to the people of each nine folds, in all the ways of `studies.controls`; every
row chooses its learning rate among the same five inside its training folds. The tenth fold is scored.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from study_arguments import benchmark_and_bases
from torch import nn
from tqdm.auto import tqdm

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.files import CONTROL_RESULTS, RUNS
from viewdiff_nb.studies import real_models, real_tables
from viewdiff_nb.studies.adaptation import Profile
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.candidates import Setting
from viewdiff_nb.studies.control_rows import ROWS, SMALL
from viewdiff_nb.studies.controls import train_row
from viewdiff_nb.studies.real_faces import run_real_faces
from viewdiff_nb.studies.real_rates import names_of, rate_estimate
from viewdiff_nb.studies.significance import holm
from viewdiff_nb.studies.store import code_fingerprint

CODE = code_fingerprint(Path(__file__).parent, (Path(__file__).name,))  # results are stored under it
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
EPOCHS = 4  # of 16 the training folds chose a quarter most often
ADAPTED = (
    *("full fine-tuning", "full fine-tuning + prior 1", "last layer only", "LoRA r=8", "LoRA r=8 without pose"),
    *("projection", "projection, another person's keypoints", "projection, pose not undone", "plain layer"),
    *("LoRA r=8 + projection", "LoRA r=8 + plain layer"),
)
FROM_SCRATCH = ("small transformer", "small transformer + projection")
COMPARISONS = [
    *((name, "base") for name in ("full fine-tuning", "LoRA r=8", "projection")),
    ("LoRA r=8", "full fine-tuning"),
    ("LoRA r=8 + projection", "LoRA r=8"),
    ("LoRA r=8 + projection", "LoRA r=8 + plain layer"),
    ("LoRA r=8", "LoRA r=8 without pose"),
    *(("projection", name) for name in ADAPTED if name.startswith("projection,")),
    ("projection", "plain layer"),
    ("full fine-tuning + prior 1", "full fine-tuning"),
    ("small transformer + projection", "small transformer"),
    ("full fine-tuning", "small transformer"),
    *((name, "canonical correlation") for name in ("full fine-tuning", "LoRA r=8", "LoRA r=8 + projection")),
]


def candidates(
    name: str, profile: Profile, bases: list[Path], faces: FaceViews, seed: int, wanted: real_models.Wanted = None
) -> Mapping[Setting, nn.Module]:
    """A row of `studies.controls` trained on faces with each learning rate."""
    row, base = ROWS[name], str(bases[seed]) if name in ADAPTED else None
    common = replace(profile.common, epochs=EPOCHS, weight_decay=1.0, seed=seed, base_model_path=base)
    split, found = real_models.two_held_back(faces), {}
    for rate in RATES:
        if wanted is not None and (rate, "rate") not in wanted:
            continue
        config = replace(common, **(SMALL | row.options | {"lr": rate, "lora_lr": rate}))
        found[rate, "rate"] = train_row(row, config, split).model.cpu().eval()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, nargs="?", default=RUNS / "cfp")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", type=Path, default=CONTROL_RESULTS)
    arguments = parser.parse_args()
    benchmark, profile, bases = benchmark_and_bases(arguments.set, arguments.seeds)
    closed = real_models.families(profile, bases)
    every = {name: closed[name] for name in ("raw", "canonical correlation")}
    every["base"] = replace(closed["pretrained transformer, not adapted"], rows={"base": real_models.WHOLE})
    for name in (*FROM_SCRATCH, *ADAPTED):
        fit = partial(candidates, name, profile, bases)
        every[f"control {CODE}, {name}"] = real_models.Family(fit, {name: real_models.any_setting}, True, bases)
    results = run_real_faces(benchmark, every, profile, partial(tqdm, desc="trainings"), arguments.workers)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in names_of(results):
        for rate in real_tables.RATES:
            e = rate_estimate(results, name, rate)
            rows.append({"model": name, "rate": rate, "mean": e.mean, "half": e.half, "seeds": e.seeds})
    pd.DataFrame(rows).to_csv(arguments.out / "cfp_rates.csv", index=False, float_format="%.4f")
    rows = []
    for rate in ("FP", "auc", "rank1"):
        for name, other in COMPARISONS:
            e = rate_estimate(results, name, rate, other)
            about = {"family": "CFP", "model": name, "other": other, "rate": rate}
            rows.append(about | {"mean": e.mean, "half": e.half, "seeds": e.seeds, "p": e.p})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row |= {"p_holm": p, "of": len(rows)}
    pd.DataFrame(rows).to_csv(arguments.out / "cfp_differences.csv", index=False, float_format="%.5f")
    print(f"{len(rows)} comparisons; {machine()}")
    print(pd.DataFrame(rows).to_string())


if __name__ == "__main__":
    main()
