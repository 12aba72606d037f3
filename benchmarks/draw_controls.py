"""The pictures of data/results/controls:  python benchmarks/draw_controls.py [--out figures]

Writes controls_*.png from the CSV files that controls.py, ablation.py, cfp_controls.py and any_pose.py left there.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from viewdiff_nb.files import CONTROL_RESULTS, FIGURES
from viewdiff_nb.plots.rates import differences_figure, sweep_figure

WORDS = {"rank1": "rank-1", "tar": "TAR at FAR 1e-3", "FP": "frontal-profile accuracy, %", "auc": "AUC, %"}
TITLES = {
    "from scratch": "Models of all views, equal trials and samples",
    "modules": "Modules on a near-frontal base, equal trials and samples",
    "3-D": "The projection against what it should not do without",
    "cross-view": "Several views: do they have to meet?",
    "prior": "Prior preservation: what it changes, term by term",
    "ways to adapt": "Other ways to adapt, against LoRA of rank 8",
    "recipe": "Losses of the small transformer, against two-way with mix-up",
}


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(CONTROL_RESULTS / f"{name}.csv", dtype={"yaw": str})


def rank_and_rate() -> pd.DataFrame:
    """Of each rank and learning rate the best trial on validation people, and of the small grid the mean."""
    trials = read("trials")
    trials = trials[trials["model"].str.fullmatch(r"(rs)?LoRA r=\d+")]
    best = trials.groupby(["model", "lr"], sort=False)["tar all"].max().reset_index()
    return best.rename(columns={"lr": "x", "tar all": "mean"}).assign(half=float("nan"), rate="TAR, validation people")


def figures(machine: str) -> Iterator[tuple[str, Figure]]:
    found = read("differences")
    found = found[(found["yaw"] == "all")]
    found = found.assign(rate=found["rate"].map(WORDS))
    for family, title in TITLES.items():
        rows = found[found["family"] == family]
        if len(rows):
            few, most = rows["seeds"].min(), rows["seeds"].max()
            seeds = f"{few}" if few == most else f"{few} or {most}"
            note = f"test people, {seeds} seeds; 95 % over seeds and people; filled: p < .05 after Holm; {machine}"
            yield family.replace(" ", "_").lower(), differences_figure(rows, title, note)
    note = f"the best of four trials, one seed; {machine}"
    yield "rank_and_rate", sweep_figure(rank_and_rate(), "learning rate", "Rank or learning rate?", note, log=True)
    robust = read("robust")
    robust["rate"] = robust["rate"].map(WORDS)
    for kind, words in (("pose", "error of the pose, degrees (sd)"), ("keypoints", "error of the keypoints, % (sd)")):
        rows = robust[robust["measure"].str.startswith(kind)]
        rows = rows.assign(x=rows["measure"].str.extract(r"(\d+)")[0].astype(float))
        note = f"test people, 5 seeds, bands: 95 % over seeds; {machine}"
        yield f"robust_{kind}", sweep_figure(rows, words, f"What an error of the {kind} costs", note)
    rows = robust[robust["measure"].str.startswith("gallery")]
    rows = rows.assign(x=rows["measure"].str.extract(r"(\d+)")[0].astype(float))
    note = f"test people; from 500 on with validation and training people in the gallery; 5 seeds; {machine}"
    yield "robust_gallery", sweep_figure(rows, "people in the gallery", "How rank-1 falls with the gallery", note, True)
    growth = read("growth")
    growth["rate"] = growth["rate"].map(WORDS)
    for x, fixed, words in (("people", "views", "training people"), ("views", "people", "views a person")):
        rows = growth[growth[fixed] == growth[fixed].max()].rename(columns={x: "x"})
        note = f"test people, 3 seeds, bands: 95 % over them; as many samples, the same settings everywhere; {machine}"
        yield f"growth_{x}", sweep_figure(rows, words, f"How results grow with {words}", note, True)
    curves = read("curves").rename(columns={"epochs": "x"})
    curves["rate"] = curves["rate"].map(WORDS)
    note = f"validation people, 3 seeds, bands: 95 % over them; every point a training of its own schedule; {machine}"
    yield "curves", sweep_figure(curves, "epochs", "Trained to the end?", note, True)
    rows = read("any_pose_differences").rename(columns={"measure": "rate"})
    note = f"test people, 4 seeds; 95 % over seeds and people; filled: p < .05 after Holm; {machine}"
    yield (
        "any_pose",
        differences_figure(rows[rows["rate"] != "turned cosine"], "Does a target pose earn anything?", note),
    )
    rows = read("cfp_differences")
    rows = rows.assign(rate=rows["rate"].map(WORDS | {"rank1": "rank-1, %"}))
    note = f"CFP, ten folds of 50 people, {rows['seeds'].max()} seeds; 95 % over both; filled: p < .05 after Holm"
    yield "cfp", differences_figure(rows, "The same controls on real faces", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = (CONTROL_RESULTS / "made_by.txt").read_text(encoding="utf-8").partition(";")[0]
    for name, figure in figures(machine):
        figure.savefig(arguments.out / f"controls_{name}.png", dpi=130)
        plt.close(figure)
        print(arguments.out / f"controls_{name}.png")


if __name__ == "__main__":
    main()
