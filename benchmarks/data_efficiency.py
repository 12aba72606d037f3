"""How many real people an adaptation needs:  python benchmarks/data_efficiency.py [SET] [--seeds 2]

SET is a benchmark that `python -m viewdiff_nb.faces.cfp` makes, runs/cfp by default. The transformer trained on the
shipped synthetic people is adapted with 10 to 450 of the people of each nine folds, by LoRA of several ranks, LoRA and
the 3-D projection, and full fine-tuning, beside training from scratch and closed forms; the tenth fold is scored. 1,450
fits: three minutes on a GPU, hours on two cores; what was done before is reused.

Nothing is chosen: with few people nobody is left to choose on. Networks are trained for two epochs of all people,
longer with fewer, at most eight; every row goes half of the way and is centred by the people that it may use.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from study_arguments import benchmark_and_bases
from torch import nn
from tqdm.auto import tqdm

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.files import FIGURES, RUNS
from viewdiff_nb.modules.baselines import PoseRidge
from viewdiff_nb.plots import DPI, save_table
from viewdiff_nb.plots.rates import efficiency_figure
from viewdiff_nb.studies import real_models, real_tables
from viewdiff_nb.studies.adaptation import FINE_TUNING, PROJECTION, SMALL_OPTIONS, Profile
from viewdiff_nb.studies.candidates import (
    Setting,
    adjustments,
    centred_candidates,
    whitened_and_common,
    whitening_candidates,
)
from viewdiff_nb.studies.real_faces import run_real_faces
from viewdiff_nb.studies.real_models import Candidates, Family, Wanted, closed_candidates, trained_candidates
from viewdiff_nb.studies.real_rates import rate_estimate
from viewdiff_nb.studies.real_tables import RATES
from viewdiff_nb.studies.significance import LEVEL, correction, holm
from viewdiff_nb.studies.store import code_fingerprint

CODE = code_fingerprint(Path(__file__).parent, (Path(__file__).name,))  # results are stored under it
PEOPLE = (10, 25, 50, 100, 225, 450)
RANKS = (1, 2, 4, 8, 16)
FEWEST_EPOCHS, MOST_EPOCHS = 2, 8
HALF_WAY: Setting = (1.0, 0.5, "even")


def of_few(
    candidates: Candidates, people: int, faces: FaceViews, seed: int, wanted: Wanted = None
) -> Mapping[Setting, nn.Module]:
    """Candidates of so many of the people of faces, drawn by the seed; a ValueError if they are fewer."""
    if len(faces.names) < people:
        raise ValueError(f"{people} people are asked for, the training folds have {len(faces.names)}")
    drawn = torch.randperm(len(faces.names), generator=torch.Generator().manual_seed(seed))[:people]
    return candidates(faces.select(drawn.sort().values), seed, wanted)


def ridge_half_way(faces: FaceViews) -> dict[Setting, nn.Module]:
    ridge = PoseRidge(faces.src[:], faces.angles, faces.target, 300.0, residual=True)
    return {HALF_WAY: adjustments(ridge, faces)[0.5, "even"]}


def families(profile: Profile, bases: Sequence[Path], people: int) -> dict[str, Family]:
    """What is compared with so many people of the training folds; names end with their number."""
    epochs = min(MOST_EPOCHS, round(FEWEST_EPOCHS * PEOPLE[-1] / people))
    small = replace(profile.common, epochs=epochs, **SMALL_OPTIONS)  # type: ignore[arg-type]
    tuned = replace(small, lr=FINE_TUNING["lr"])
    lora = replace(
        tuned, use_lora_attention=True, freeze_base=True, lora_lr=FINE_TUNING["lora_lr"], base_model_path="b"
    )
    networks = {f"LoRA r={r}": replace(lora, rank=r, lora_alpha=float(r)) for r in RANKS}
    networks["LoRA r=8 + 3-D projection"] = replace(networks["LoRA r=8"], **PROJECTION)  # type: ignore[arg-type]
    networks["full fine-tuning"] = tuned
    found = {name: (partial(trained_candidates, config, None, bases), bases) for name, config in networks.items()}
    found["from scratch"] = partial(trained_candidates, small, None, ()), ()
    closed: dict[str, tuple] = {
        "centred by pose": (centred_candidates, ("even",)),
        "ridge": (ridge_half_way, HALF_WAY),
        "within-class whitening": (
            partial(whitening_candidates, shrinkages=(0.9,), centrings=("even",)),
            (0.9, "even"),
        ),
        "whitening + canonical correlation": (whitened_and_common, (0.9, 0.3, 0.5, "summed")),
    }
    every = {
        row_of(name, people): Family(
            partial(of_few, candidates, people), {row_of(name, people): HALF_WAY}, True, starts
        )
        for name, (candidates, starts) in found.items()
    }
    for name, (make, setting) in closed.items():
        row = row_of(name, people)
        every[row] = Family(partial(of_few, partial(closed_candidates, make), people), {row: setting}, True)
    return every


def row_of(way: str, people: int) -> str:
    """The row's name in results."""
    return f"{way}, {people} people"


def efficiency_table(results: Mapping[tuple[str, int], dict], rates: Sequence[str] = ("rank1", "auc")) -> pd.DataFrame:
    """A row per way, number of people and rate: mean and half of its interval, percent; raw has 0 people."""
    rows = []
    for row in dict.fromkeys(name for name, _ in results):
        way, _, number = row.removesuffix(" people").rpartition(", ") if row.endswith(" people") else (row, "", "0")
        for rate in rates:
            found = rate_estimate(dict(results), row, rate)
            rows.append((way, int(number), RATES[rate], found.mean, found.half))
    return pd.DataFrame(rows, columns=["way", "people", "rate", "mean", "half"])


def wide_table(found: pd.DataFrame) -> pd.DataFrame:
    """`efficiency_table` to read: a row per rate and way, a column per number of people."""
    cells = found.assign(
        cell=[f"{mean:.1f} ± {half:.1f}" for mean, half in zip(found["mean"], found["half"], strict=True)]
    )
    table = cells.pivot_table(index=["rate", "way"], columns="people", values="cell", aggfunc="first", sort=False)
    return table[sorted(table)].fillna("").rename(columns=lambda people: f"{people} people" if people else "none")


def findings(results: Mapping[tuple[str, int], dict]) -> str:
    """Whether LoRA is told apart from full fine-tuning, training from scratch, closed forms and raw; Markdown."""
    rows = dict.fromkeys(name for name, _ in results)
    numbers = sorted({int(row.split()[-2]) for row in rows if row.endswith(" people")})
    compared = {
        (other, people): rate_estimate(
            dict(results), row_of("LoRA r=8", people), "rank1", other if other == "raw" else row_of(other, people)
        )
        for other in ("full fine-tuning", "from scratch", "ridge", "within-class whitening", "raw")
        for people in numbers
    }
    p_values = dict(zip(compared, holm([difference.p for difference in compared.values()]), strict=True))
    lines = []
    for other in dict.fromkeys(other for other, _ in compared):
        told = [
            f"{people} people: {compared[other, people]:+.1f}{'' if p_values[other, people] < LEVEL else ' (not told)'}"
            for people in numbers
        ]
        lines.append(f"- LoRA r=8 against {other}, points of rank-1: {'; '.join(told)}.")
    return "\n".join([*lines, f"- ({correction(len(compared))})"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, nargs="?", default=RUNS / "cfp")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--people", type=int, nargs="+", default=PEOPLE)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    benchmark, profile, bases = benchmark_and_bases(arguments.set, arguments.seeds)
    every = {"raw": real_models.families(profile, bases)["raw"]}
    for people in arguments.people:
        of_few_people = families(profile, bases, people)
        every |= {f"few people {CODE}, {name}": family for name, family in of_few_people.items()}
    results = run_real_faces(benchmark, every, profile, partial(tqdm, desc="trainings"), arguments.workers)
    found = efficiency_table(results)
    note = (
        f"{benchmark.name}, {benchmark.folds} folds, {arguments.seeds} seeds; bands: 95 % over people and seeds; "
        f"{real_tables.machines(results)}"
    )
    wide = wide_table(found)
    plt.close(save_table(wide, "cfp_data_efficiency", arguments.out, "Rank-1 and AUC by real people", note))
    efficiency_figure(found, f"{benchmark.name}: what real people are worth", note).savefig(
        arguments.out / "cfp_data_efficiency_curves.png", dpi=DPI
    )
    print(f"{note}\n{wide.to_string()}\n{findings(results)}")


if __name__ == "__main__":
    main()
