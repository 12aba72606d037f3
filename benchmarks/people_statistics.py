"""How unlike real people the synthetic ones are, to one recogniser:  python benchmarks/people_statistics.py [--cfp SET]

SET is a benchmark that `python -m viewdiff_nb.faces.cfp` makes, runs/cfp by default. Six measures of its people and of
the synthetic validation people in one figure, figures/people_statistics.png, and as numbers in .csv: cosines of
different people's fronts, of profiles with the own front and with others', how many directions the fronts vary in,
whether both vary in the same directions, and where a turn of the head moves the mean embedding.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from torch import Tensor

from viewdiff_nb.files import FIGURES, RUNS
from viewdiff_nb.plots import COLOURS, LEGEND, LINES
from viewdiff_nb.studies.adaptation import FULL_PROFILE, load_split
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.real_benchmark import Benchmark, load_benchmark, stand_in

DIRECTIONS = (1, 2, 4, 8, 16, 32, 64, 128)
HISTOGRAMS = ("cosine of different people's fronts", "cosine of a profile and the own front")
OTHERS = "cosine of a profile and another's front"


class Seen:
    """What the recogniser makes of the people of a benchmark."""

    def __init__(self, benchmark: Benchmark) -> None:
        faces = benchmark.faces
        self.fronts = F.normalize(faces.front, dim=1)
        side = F.normalize(faces.src[:], dim=1)[benchmark.is_profile]
        across = side @ self.fronts.T
        own = F.one_hot(faces.person[benchmark.is_profile], len(self.fronts)).bool()
        off = ~torch.eye(len(self.fronts), dtype=torch.bool)
        cosines = (self.fronts @ self.fronts.T)[off], across[own], across[~own]
        self.cosines = dict(zip((*HISTOGRAMS, OTHERS), cosines, strict=True))
        values, vectors = torch.linalg.eigh(torch.cov(self.fronts.T.double()))
        self.variances, self.directions = values.flip(0).clamp_min(0), vectors.flip(1)  # the largest first
        self.shift = (side.mean(0) - self.fronts.mean(0)).double()

    def participation(self) -> float:
        return (self.variances.sum() ** 2 / self.variances.square().sum()).item()


def overlap(of: Seen, by: Seen, count: int) -> float:
    """Share of the fronts' variance that lies in the first directions of others."""
    centred = (of.fronts - of.fronts.mean(0)).double()
    return ((centred @ by.directions[:, :count]).square().sum() / centred.square().sum()).item()


def figure_of(real: Seen, synthetic: Seen, names: tuple[str, str], note: str) -> plt.Figure:
    fig, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    bins = np.linspace(-0.6, 1, 65)
    for ax, words in zip(axes.flat, (*HISTOGRAMS, OTHERS), strict=False):
        for i, (seen, name) in enumerate(zip((real, synthetic), names, strict=True)):
            look = {"histtype": "step", "density": True, "color": COLOURS[i], "linestyle": LINES[i], "linewidth": 1.6}
            ax.hist(seen.cosines[words].numpy(), bins, label=name, **look)
        ax.set(xlabel=words, ylabel="density")
    for i, (seen, name) in enumerate(zip((real, synthetic), names, strict=True)):
        share = seen.variances.cumsum(0) / seen.variances.sum()
        words = f"{name}: ratio {seen.participation():.0f}"
        axes[1, 0].plot(range(1, len(share) + 1), share, LINES[i], color=COLOURS[i], label=words)
    axes[1, 0].set(
        xscale="log", xlabel="first directions (participation ratio)", ylabel="variance of fronts", ylim=(0, 1.02)
    )
    for i, (by, words) in enumerate(((real, "own directions"), (synthetic, "the synthetic ones'"))):
        shares = [overlap(real, by, count) for count in DIRECTIONS]
        axes[1, 1].plot(DIRECTIONS, shares, LINES[i] + "o", color=COLOURS[i], markersize=4, label=words)
    axes[1, 1].set(xscale="log", xlabel="first directions", ylabel=f"variance of {names[0]}'s fronts", ylim=(0, 1.02))
    _draw_shifts(axes[1, 2], real.shift, synthetic.shift, names)
    for ax in (axes[0, 0], axes[1, 0], axes[1, 1]):
        ax.legend(**LEGEND)
    fig.suptitle(
        "To the same recogniser: real people, and the shipped synthetic ones", x=0.01, ha="left", weight="bold"
    )
    fig.supxlabel(note, fontsize=7.5, color="0.35", x=0.01, ha="left")
    sns.despine(fig)
    return fig


def _draw_shifts(ax: plt.Axes, real: Tensor, synthetic: Tensor, names: tuple[str, str]) -> None:
    """Both mean shifts in the plane that they span, the real one to the right."""
    along = F.normalize(real, dim=0)
    x = (synthetic @ along).item()
    y = (synthetic - x * along).norm().item()
    for i, (end, name) in enumerate((((real.norm().item(), 0.0), names[0]), ((x, y), names[1]))):
        arrow = {"arrowstyle": "->", "color": COLOURS[i], "linestyle": LINES[i], "linewidth": 2}
        ax.annotate("", end, (0, 0), arrowprops=arrow)
        ax.annotate(name, end, color=COLOURS[i], fontsize=8.5, xytext=(4, 2), textcoords="offset points")
    most = 1.25 * max(x, y, real.norm().item())
    ax.set(
        xlim=(-0.05 * most, most),
        ylim=(-0.05 * most, most),
        aspect="equal",
        xlabel="mean profile − mean front",
        ylabel="across",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfp", type=Path, default=RUNS / "cfp")
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    benchmark, people = load_benchmark(arguments.cfp), load_split(FULL_PROFILE).val
    real, synthetic = Seen(benchmark), Seen(stand_in(people))
    names = benchmark.name, "synthetic"
    counts = f"{len(benchmark.faces.names)} people of {names[0]}, {len(people.names)} synthetic validation people"
    note = f"{counts}; {machine()}"
    rows = {}
    for name, seen in zip(names, (real, synthetic), strict=True):
        rows[name] = {words: f"{x.mean():.3f} ± {x.std():.3f} (sd)" for words, x in seen.cosines.items()} | {
            "total variance of fronts": f"{seen.variances.sum():.2f}",
            "participation ratio of fronts": f"{seen.participation():.0f}",
            "share of the real fronts' variance in the first 32 directions": f"{overlap(real, seen, 32):.2f}",
            "length of the mean shift, profile - front": f"{seen.shift.norm():.2f}",
            "cosine of the mean shift with the real one": f"{F.cosine_similarity(seen.shift, real.shift, dim=0):.2f}",
        }
    table = pd.DataFrame(rows).rename_axis(note)
    table.to_csv(arguments.out / "people_statistics.csv")
    figure_of(real, synthetic, names, note).savefig(arguments.out / "people_statistics.png", dpi=130)
    print(table.to_string())


if __name__ == "__main__":
    main()
