"""How far to follow a model whose poses are wrong:  python benchmarks/pose_error.py

Noise of 0 to 30 degrees (standard deviation, each angle by itself) is added to the poses of the synthetic people; their
keypoints are as measured, or unknown, so that they tell nothing of the pose. For every noise the step toward the
shipped network's prediction is chosen on validation people, by rank-1 of views from 45 degrees on, and scored on test
people beside fixed steps. If the right step fell with the noise, a model would gain by being told how sure a pose is.
Writes figures/pose_error.csv and .png.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from pretrain import by_people
from torch import Tensor, nn

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.faces.geometry import mean_keypoints
from viewdiff_nb.files import FIGURES
from viewdiff_nb.metrics import similarity_scores
from viewdiff_nb.modules.adjusted import unit_prediction
from viewdiff_nb.plots import COLOURS, LEGEND, LINES, MARKERS
from viewdiff_nb.pretrained import load_pretrained
from viewdiff_nb.studies.adaptation import FULL_PROFILE, load_split
from viewdiff_nb.studies.benchmark import machine

NOISES = (0.0, 5.0, 10.0, 15.0, 20.0, 30.0)
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def hits(network: nn.Module, faces: FaceViews, noise: float, known: bool) -> dict[float, Tensor]:
    """{step: (M,) 100 where a view has rank 1}; noise in degrees."""
    error = torch.randn(faces.angles.shape, generator=torch.Generator().manual_seed(0))
    angles = faces.angles + noise / 180 * torch.pi * error
    points = faces.keypoints_3d[:] if known else mean_keypoints(angles)
    unit = F.normalize(faces.src[:], dim=1)
    predicted = unit_prediction(network, unit, angles, points)
    found = {}
    for step in STEPS:
        rank = similarity_scores(torch.lerp(unit, predicted, step), faces.front, faces.person).rank
        found[step] = 100 * (rank == 1).double()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    split, network = load_split(FULL_PROFILE), load_pretrained().model
    val, test = (faces.where(faces.abs_yaw >= 45.0) for faces in (split.val, split.test))
    rows = []
    for known in (True, False):
        for noise in NOISES:
            of_val, of_test = hits(network, val, noise, known), hits(network, test, noise, known)
            best = max(STEPS, key=lambda step: of_val[step].mean().item())
            for step in STEPS:
                rate = by_people(of_test[step], test.person, len(test.front))
                words = "measured" if known else "unknown"
                rows.append((words, noise, step, rate.mean, rate.half, step == best))
    columns = ["keypoints", "noise", "step", "rank-1 %", "half", "chosen on validation people"]
    table = pd.DataFrame(rows, columns=columns)
    note = f"{len(test.names)} test people, views from 45°, seed 0; ± 95 % over people; {machine()}"
    table.round(2).rename(columns={"half": f"± ({note})"}).to_csv(arguments.out / "pose_error.csv", index=False)
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 4.0), sharey=True, layout="constrained")
    for ax, words in zip(axes, ("measured", "unknown"), strict=True):
        for i, step in enumerate(STEPS):
            part = table[(table["keypoints"] == words) & (table["step"] == step)]
            look = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 5, "linestyle": LINES[i % len(LINES)]}
            ax.plot(part["noise"], part["rank-1 %"], label=f"step {step:g}", **look)
            low, high = part["rank-1 %"] - part["half"], part["rank-1 %"] + part["half"]
            ax.fill_between(part["noise"], low, high, color=COLOURS[i], alpha=0.08, linewidth=0)
        chosen = table[(table["keypoints"] == words) & table["chosen on validation people"]]
        ax.scatter(chosen["noise"], chosen["rank-1 %"], s=110, facecolors="none", edgecolors="black", label="chosen")
        ax.set(xlabel="error of each angle, degrees (sd)", title=f"keypoints {words}")
    axes[0].set_ylabel("rank-1 of views from 45°, %")
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", **LEGEND)
    fig.supxlabel(note, fontsize=7.5, color="0.35", x=0.01, ha="left")
    sns.despine(fig)
    fig.savefig(arguments.out / "pose_error.png", dpi=130)
    print(table.pivot_table(index=["keypoints", "noise"], columns="step", values="rank-1 %").round(1).to_string())
    print(table[table["chosen on validation people"]][["keypoints", "noise", "step"]].to_string(index=False), note)


if __name__ == "__main__":
    main()
