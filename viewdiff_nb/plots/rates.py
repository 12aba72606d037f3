"""Rates of many models side by side, with their intervals."""

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from viewdiff_nb.plots import COLOURS, LEGEND, LINES, MARKERS, model_style, panels
from viewdiff_nb.studies.significance import LEVEL


def rates_figure(found: pd.DataFrame, title: str, note: str = "") -> Figure:
    """A panel a rate, a line a model; the dotted line is the first model's rate.

    Args:
        found: a row per model and rate: model, rate (its words), mean, half (of a 95 % interval).
    """
    rates, models = list(found["rate"].unique()), list(found["model"].unique())
    size = 3.0 + 2.6 * len(rates), 0.9 + 0.27 * len(models)
    fig, axes = panels(1, len(rates), figsize=size, sharey=True, squeeze=False)
    for ax, rate, colour in zip(axes[0], rates, COLOURS, strict=False):
        rows = found[found["rate"] == rate].set_index("model").loc[models]
        ax.errorbar(rows["mean"], range(len(models)), xerr=rows["half"], fmt="o", color=colour, elinewidth=1)
        ax.axvline(rows["mean"].iloc[0], color="0.6", linestyle=":", linewidth=1, zorder=0)
        ax.set(xlabel=rate, yticks=range(len(models)), yticklabels=models)
        ax.grid(axis="y", color="0.93")
    axes[0, 0].invert_yaxis()
    return _titled(fig, title, note)


def efficiency_figure(found: pd.DataFrame, title: str, note: str = "") -> Figure:
    """A panel a rate, a curve a way over the number of people (logarithmic); the dotted line is raw.

    A panel ends below raw at twice what the best way gains; a curve that falls deeper leaves it.

    Args:
        found: a row per way, number of people and rate: way, people, rate, mean, half; raw has 0 people.
    """
    rates, raw = list(found["rate"].unique()), found[found["people"] == 0]
    ways = [way for way in found["way"].unique() if way not in set(raw["way"])]
    fig, axes = panels(1, len(rates), figsize=(1.6 + 4.0 * len(rates), 5.2), squeeze=False)
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
    return _titled(fig, title, note)


def differences_figure(found: pd.DataFrame, title: str, note: str = "") -> Figure:
    """A row a comparison, a panel a rate; filled where the corrected p is below .05, hollow where none is told apart.

    Args:
        found: a row per comparison and rate: model, other, rate (its words), mean, half (of a 95 % interval), p_holm.

    >>> row = {"model": "LoRA", "other": "base", "rate": "rank-1", "mean": 0.15, "half": 0.01, "p_holm": 0.001}
    >>> [text.get_text() for text in differences_figure(pd.DataFrame([row]), "").axes[0].get_yticklabels()]
    ['LoRA − base']
    """
    rates = list(found["rate"].unique())
    pairs = list(dict.fromkeys(zip(found["model"], found["other"], strict=True)))
    size = 4.6 + 2.5 * len(rates), 1.0 + 0.27 * len(pairs)
    fig, axes = panels(1, len(rates), figsize=size, sharey=True, squeeze=False)
    for ax, rate, colour in zip(axes[0], rates, COLOURS, strict=False):
        rows = found[found["rate"] == rate].set_index(["model", "other"]).loc[pairs]
        for i, row in enumerate(rows.itertuples()):
            face = colour if row.p_holm < LEVEL else "white"
            ax.errorbar(row.mean, i, xerr=row.half, fmt="o", color=colour, markerfacecolor=face, elinewidth=1)
        ax.axvline(0, color="0.4", linewidth=1, zorder=0)
        ax.set(xlabel=f"difference in {rate}", yticks=range(len(pairs)), yticklabels=[" − ".join(p) for p in pairs])
        ax.grid(axis="y", color="0.93")
    axes[0, 0].invert_yaxis()
    return _titled(fig, title, note)


def sweep_figure(found: pd.DataFrame, xlabel: str, title: str, note: str = "", log: bool = False) -> Figure:
    """A panel a rate, a line with a band a model over a number.

    Args:
        found: a row per model, rate and number: model, rate (its words), x, mean, half (NaN: no band).
        log: a logarithmic axis.

    >>> rows = [{"model": "MLP", "rate": "rank-1", "x": x, "mean": 0.9, "half": 0.01} for x in (1, 10)]
    >>> sweep_figure(pd.DataFrame(rows), "people", "", log=True).axes[0].get_xscale()
    'log'
    """
    rates, models = list(found["rate"].unique()), list(found["model"].unique())
    size = 1.6 + 3.9 * len(rates), 1.6 + 0.34 * max(6, len(models))
    fig, axes = panels(1, len(rates), figsize=size, squeeze=False)
    for ax, rate in zip(axes[0], rates, strict=True):
        for i, model in enumerate(models):
            rows = found[(found["model"] == model) & (found["rate"] == rate)].sort_values("x")
            look = model_style(model, i)
            ax.plot(rows["x"], rows["mean"], label=model, **look)
            low, high = rows["mean"] - rows["half"], rows["mean"] + rows["half"]
            ax.fill_between(rows["x"], low, high, color=look["color"], alpha=0.12, linewidth=0)
        numbers = sorted(found["x"].unique())
        ax.set(xlabel=xlabel, ylabel=rate, xscale="log" if log else "linear")
        ax.set_xticks(numbers, [f"{number:g}" for number in numbers])
        ax.minorticks_off()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", **LEGEND)
    return _titled(fig, title, note)


def _titled(fig: Figure, title: str, note: str) -> Figure:
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    if note:
        fig.supxlabel(note, fontsize=8, color="0.35", x=0.01, ha="left")
    sns.despine(fig)
    return fig
