"""Pictures of a grid of cells: every one with intervals over seeds, legible in grey and to the colour-blind."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..plots import MARKERS
from .findings import CHOICE, recommend, summary
from .significance import over_seeds, told_apart

COLOURS = sns.color_palette("colorblind")
NAMES = {"rank": "LoRA rank", "voxel_resolution": "voxel resolution", "lambda_prior": "weight of the prior, lambda",
         "test_tar": "TAR at FAR 1e-3", "val_tar": "TAR at FAR 1e-3, validation people", "test_rank1": "rank-1",
         "trainable": "trainable parameters", "memory_mb": "memory of a training step alone, MB",
         "step_ms": "time of a step, its share of the pass, ms"}  # fmt: skip


def heat_map(cells: pd.DataFrame, value: str = "test_tar", title: str | None = None) -> Figure:
    """Rank against voxel resolution; each field with its interval, the recommended one framed."""
    found = summary(cells, CHOICE, value)
    means = found["mean"].unstack("voxel_resolution").sort_index(ascending=False)
    halves = found["half"].unstack("voxel_resolution").reindex_like(means)
    words = [[f"{m:.3f}" + ("" if np.isnan(h) else f"\n± {h:.3f}") for m, h in zip(*row, strict=True)]
             for row in zip(means.to_numpy(), halves.to_numpy(), strict=True)]  # fmt: skip
    fig, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    sns.heatmap(means, annot=words, fmt="", cmap="cividis", linewidths=1, ax=ax,
                cbar_kws={"label": NAMES.get(value, value)})  # fmt: skip
    chosen = recommend(cells)
    row, column = list(means.index).index(chosen.rank), list(means.columns).index(chosen.voxel_resolution)
    ax.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=3))
    ax.set(xlabel="voxels along an edge of the grid", ylabel=NAMES["rank"])
    _title(ax, title or f"Rank {chosen.rank} with {chosen.voxel_resolution}³ voxels is enough")
    return fig


def interaction(cells: pd.DataFrame, x: str, line: str, value: str = "test_tar", title: str | None = None) -> Figure:
    """Means over x, a line for each value of another axis: parallel lines do not interact."""
    found = summary(cells, [line, x], value)
    fig, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    places = list(dict.fromkeys(found.index.get_level_values(x)))
    groups = list(dict.fromkeys(found.index.get_level_values(line)))
    for i, group in enumerate(groups):
        rows = found.loc[group].reindex(places)
        shift = 0.12 * (i - (len(groups) - 1) / 2)
        ax.errorbar(np.arange(len(places)) + shift, rows["mean"], rows["half"].fillna(0), marker=MARKERS[i], capsize=2,
                    color=COLOURS[i], linestyle=("-", "--", ":", "-.")[i % 4], label=f"{group:g}")  # fmt: skip
    ax.set_xticks(range(len(places)), [f"{p:g}" for p in places])
    ax.set(xlabel=NAMES[x], ylabel=NAMES.get(value, value))
    ax.legend(title=NAMES[line], frameon=False, fontsize=8.5)
    _title(ax, title or _interaction_title(cells, x, line, value))
    return fig


def _interaction_title(cells: pd.DataFrame, x: str, line: str, value: str) -> str:
    """Whether the effect of x, first to last value, differs between the first and last line."""
    table = cells.pivot_table(index=[line, x], columns="seed", values=value, aggfunc="mean")
    low, high = (sorted(cells[line].unique())[i] for i in (0, -1))
    first, last = (sorted(cells[x].unique())[i] for i in (0, -1))
    apart = (table.loc[(high, last)] - table.loc[(high, first)]) - (table.loc[(low, last)] - table.loc[(low, first)])
    words = "interact" if told_apart([over_seeds(apart)])[0] else "are not seen to interact"
    short = {"voxel_resolution": "resolution", "lambda_prior": "lambda"}
    return f"{short.get(x, x).capitalize()} and {short.get(line, line)} {words}"


def pareto(cells: pd.DataFrame, cost: str = "trainable", value: str = "test_tar", title: str | None = None) -> Figure:
    """Every rank and resolution by cost and TAR; the front is what nothing cheaper equals."""
    found = summary(cells, CHOICE, value).join(cells.groupby(CHOICE)[cost].mean()).sort_values([cost, "mean"])
    found["front"] = found["mean"] >= found["mean"].cummax()
    fig, ax = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    ranks = sorted(cells["rank"].unique())
    for i, rank in enumerate(ranks):
        rows = found.xs(rank, level="rank")
        ax.errorbar(rows[cost], rows["mean"], rows["half"].fillna(0), linestyle="", marker=MARKERS[i], color=COLOURS[i],
                    capsize=2, label=f"rank {rank}")  # fmt: skip
        for place, (resolution, row) in enumerate(rows.sort_values("mean").iterrows()):
            ax.annotate(f"{resolution}³", (row[cost], row["mean"]), (5, 4 if place else -10),
                        textcoords="offset points", fontsize=8)  # fmt: skip
    front = found[found["front"]]
    ax.plot(front[cost], front["mean"], color="0.5", linewidth=1, zorder=0, drawstyle="steps-post", label="front")
    ax.set(xlabel=NAMES.get(cost, cost), ylabel=NAMES.get(value, value))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.legend(frameon=False, fontsize=8.5)
    rank, resolution = front["mean"].idxmax()
    _title(ax, title or f"Nothing is above rank {rank} with {resolution}³")
    return fig


def loss_bands(cells: pd.DataFrame, by: str = "rank", title: str | None = None) -> Figure:
    """Training loss over epochs, mean with its interval over seeds."""
    rows = [{by: cell[by], "seed": cell["seed"], "epoch": epoch, "loss": loss}
            for _, cell in cells.iterrows() for epoch, loss in enumerate(cell["train_loss"], 1)]  # fmt: skip
    found = summary(pd.DataFrame(rows), [by, "epoch"], "loss")
    fig, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    ends = {}
    for i, group in enumerate(dict.fromkeys(found.index.get_level_values(by))):
        row = found.loc[group]
        half = row["half"].fillna(0)
        ax.fill_between(row.index, row["mean"] - half, row["mean"] + half, color=COLOURS[i], alpha=0.25, linewidth=0)
        ax.plot(row.index, row["mean"], color=COLOURS[i], marker=MARKERS[i], markersize=4, label=f"{group:g}",
                linestyle=("-", "--", ":", "-.")[i % 4])  # fmt: skip
        ends[group] = row["mean"].iloc[-1]
    ax.set(xlabel="epoch", ylabel="training loss")
    ax.legend(title=NAMES[by], frameon=False, fontsize=8.5)
    _title(ax, title or f"{NAMES[by]} {min(ends, key=ends.get):g} fits the training people best")
    return fig


def retention(cells: pd.DataFrame, value: str = "test_tar", title: str | None = None) -> Figure:
    """What is kept below 45° against what is gained beyond, for each weight of the prior."""
    kept, gained = (summary(cells, ["lambda_prior"], f"{value}_{where}") for where in ("0-45", "45-90"))
    fig, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for i, weight in enumerate(kept.index):
        ax.errorbar(gained["mean"][weight], kept["mean"][weight], kept["half"].fillna(0)[weight],
                    gained["half"].fillna(0)[weight], marker=MARKERS[i], color=COLOURS[i], capsize=2, linestyle="",
                    label=f"{weight:g}")  # fmt: skip
    ax.set(xlabel=f"{NAMES[value]}, |yaw| ≥ 45° (adapted)", ylabel=f"{NAMES[value]}, |yaw| < 45° (kept)")
    ax.legend(title=NAMES["lambda_prior"], frameon=False, fontsize=8.5)
    low, high = kept.index[0], kept.index[-1]
    table = cells.pivot_table(index="lambda_prior", columns="seed", values=f"{value}_0-45", aggfunc="mean")
    apart = over_seeds(table.loc[high] - table.loc[low])
    words = f"keeps {apart:+.3f} more" if told_apart([apart])[0] else "keeps as much, as far as is seen,"
    _title(ax, title or f"Lambda {high:g} {words} than {low:g}")
    return fig


def _title(ax: Axes, words: str) -> None:
    ax.set_title(words, loc="left", fontsize=10)
    sns.despine(ax.figure)


def write_all(cells: pd.DataFrame, folder: Path, names: Sequence[str] | None = None) -> dict[str, Figure]:
    """All pictures of a grid as PNG and SVG in folder, by name."""
    drawn = {
        "ablation_heat_map": lambda: heat_map(cells),
        "ablation_interaction": lambda: interaction(cells, "voxel_resolution", "rank"),
        "ablation_pareto_parameters": lambda: pareto(cells),
        "ablation_pareto_memory": lambda: pareto(cells, "memory_mb"),
        "ablation_loss": lambda: loss_bands(cells),
        "ablation_retention": lambda: retention(cells),
    }
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for name in names or drawn:
        figures[name] = drawn[name]()
        figures[name].savefig(folder / f"{name}.png", dpi=150)
        with plt.rc_context({"svg.hashsalt": name}):  # equal pictures, equal files
            figures[name].savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figures[name])
    return figures
