"""Rates of many models side by side, with their intervals."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from viewdiff_nb.plots import COLOURS, LEGEND, LINES, MARKERS


def rates_figure(found: pd.DataFrame, title: str, note: str = "") -> Figure:
    """A panel a rate, a line a model; the dotted line is the first model's rate.

    Args:
        found: a row per model and rate: model, rate (its words), mean, half (of a 95 % interval).
    """
    rates, models = list(found["rate"].unique()), list(found["model"].unique())
    size = 3.0 + 2.6 * len(rates), 0.9 + 0.27 * len(models)
    fig, axes = plt.subplots(1, len(rates), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for ax, rate, colour in zip(axes[0], rates, COLOURS, strict=False):
        rows = found[found["rate"] == rate].set_index("model").loc[models]
        ax.errorbar(rows["mean"], range(len(models)), xerr=rows["half"], fmt="o", color=colour, elinewidth=1)
        ax.axvline(rows["mean"].iloc[0], color="0.6", linestyle=":", linewidth=1, zorder=0)
        ax.set(xlabel=rate, yticks=range(len(models)), yticklabels=models)
        ax.grid(axis="y", color="0.93")
    axes[0, 0].invert_yaxis()
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    if note:
        fig.supxlabel(note, fontsize=7.5, color="0.35", x=0.01, ha="left")
    sns.despine(fig)
    return fig


def efficiency_figure(found: pd.DataFrame, title: str, note: str = "") -> Figure:
    """A panel a rate, a curve a way over the number of people (logarithmic); the dotted line is raw.

    A panel ends below raw at twice what the best way gains; a curve that falls deeper leaves it.

    Args:
        found: a row per way, number of people and rate: way, people, rate, mean, half; raw has 0 people.
    """
    rates, raw = list(found["rate"].unique()), found[found["people"] == 0]
    ways = [way for way in found["way"].unique() if way not in set(raw["way"])]
    fig, axes = plt.subplots(1, len(rates), figsize=(1.6 + 4.0 * len(rates), 5.2), layout="constrained", squeeze=False)
    for ax, rate in zip(axes[0], rates, strict=True):
        for i, way in enumerate(ways):
            rows = found[(found["way"] == way) & (found["rate"] == rate)].sort_values("people")
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            ax.plot(rows["people"], rows["mean"], LINES[i // 4 % len(LINES)], label=way, markersize=5, **look)
            low, high = rows["mean"] - rows["half"], rows["mean"] + rows["half"]
            ax.fill_between(rows["people"], low, high, color=look["color"], alpha=0.06, linewidth=0)
        level = raw.loc[raw["rate"] == rate, "mean"].item()
        ax.axhline(level, color="0.4", linestyle=":", label="raw")
        highest = (found["mean"] + found["half"])[found["rate"] == rate].max()
        ax.set_ylim(level - 2 * (highest - level), highest + 0.1 * (highest - level))
        numbers = sorted(found.loc[found["people"] > 0, "people"].unique())
        ax.set(xscale="log", xlabel="real people of the training folds", ylabel=rate)
        ax.set_xticks(numbers, [str(number) for number in numbers])
        ax.minorticks_off()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", **LEGEND)
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    if note:
        fig.supxlabel(note, fontsize=7.5, color="0.35", x=0.01, ha="left")
    sns.despine(fig)
    return fig
