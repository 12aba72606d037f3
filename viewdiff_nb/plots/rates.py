"""Rates of many models side by side, with their intervals."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from viewdiff_nb.plots import COLOURS


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
