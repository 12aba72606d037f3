"""Static figures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from torch import nn

from viewdiff_nb.faces.geometry import KEYPOINT_NAMES, YAW_BINS
from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.modules.lora import evaluation_mode, lora_layers
from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.studies.ablation import CHOICE, recommend, summary
from viewdiff_nb.studies.forgetting import GAINED, KEPT, RATES
from viewdiff_nb.studies.significance import over_seeds, told_apart

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
BIN_NAMES = [f"{low}-{high}" for low, high in YAW_BINS]


def table_figure(table: pd.DataFrame, title: str, note: str = "") -> Figure:
    """A table as a picture: its index as the first column, the guide's columns in grey."""
    cells = table.reset_index()
    widths = [max(len(str(v)) for v in (column, *cells[column])) for column in cells]
    fig, ax = plt.subplots(figsize=(0.085 * sum(widths) + 0.3 * len(widths), 0.32 * (len(cells) + 1) + 0.9))
    ax.axis("off")
    drawn = ax.table(
        cells.astype(str).values.tolist(),
        colLabels=list(cells),
        cellLoc="center",
        loc="center",
        colWidths=[w + 3 for w in widths],
        bbox=(0, 0, 1, 1),
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for (row, column), cell in drawn.get_celld().items():
        cell.set_edgecolor("0.85")
        cell.set_linewidth(0.6)
        guide = cells.columns[column].startswith("guide")
        cell.get_text().set_color("0.5" if guide else "0.1")
        if row == 0:
            cell.set_facecolor("0.93")
            cell.get_text().set_weight("bold")
        if column == 0:
            cell.get_text().set_horizontalalignment("left")
    ax.set_title(title, loc="left", fontsize=11, weight="bold")
    if note:
        fig.text(0.01, 0.01, note, fontsize=7.5, color="0.35", ha="left", va="bottom")
    margins = (0.3 if note else 0.05) / fig.get_figheight(), 1 - 0.35 / fig.get_figheight()
    fig.subplots_adjust(left=0.01, right=0.99, bottom=margins[0], top=margins[1])
    return fig


def recognition_curves(found: pd.DataFrame, rate: str, title: str) -> Figure:
    """A rate over |yaw| bins for several models, with 95 % intervals over seeds and people.

    Args:
        found: columns model, yaw (a name of `BIN_NAMES`), mean and half, as `tables.estimates` gives them.
    """
    fig, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
    models, bins = list(found["model"].unique()), list(found["yaw"].unique())
    for i, (model, marker) in enumerate(zip(models, MARKERS[: len(models)], strict=True)):
        rows = found[found["model"] == model].set_index("yaw")
        shift = 0.25 * (i / max(1, len(models) - 1) - 0.5)
        ax.errorbar(
            [x + shift for x in range(len(bins))],
            rows["mean"],
            rows["half"],
            label=model,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            elinewidth=1.2,
            color=sns.color_palette("colorblind")[i],
        )
    ax.set_xticks(range(len(bins)), bins)
    ax.set(xlabel="|yaw| of the side view, degrees", ylabel=rate, ylim=(0, 1.02))
    ax.set_title(title, loc="left", fontsize=11)
    ax.legend(title=None, frameon=False, fontsize=8.5, loc="lower left")
    sns.despine(fig)
    return fig


def learning_curves(history: pd.DataFrame, fig: Figure | None = None) -> Figure:
    """Loss and recognition over epochs.

    Args:
        history: of `training.trainer.TrainResult`, or a part of it.
        fig: to draw on anew; a new one if None.
    """
    fig = fig or plt.figure(figsize=(9, 3.2), layout="constrained")
    fig.clear()
    left, right = fig.subplots(1, 2)
    colours = sns.color_palette("colorblind")
    lines = [
        (left, "train_loss", "training", 0, "-"),
        (left, "val_loss", "validation", 1, "--"),
        (left, "prior_loss", "prior", 2, ":"),
        (right, "val_rank1", "rank-1", 0, "-"),
        (right, "val_tar", "TAR at FAR 1e-3", 1, "--"),
        (right, "val_cosine", "cosine", 2, ":"),
    ]
    for ax, column, label, colour, style in lines:
        if column in history:
            shown = history.dropna(subset=[column])
            ax.plot(
                shown["epoch"],
                shown[column],
                style,
                label=label,
                color=colours[colour],
                linewidth=1.6,
                marker=MARKERS[colour],
                markersize=3.5,
            )
    for ax, title in ((left, "loss"), (right, "validation people")):
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if ax.lines:
            ax.legend(frameon=False, fontsize=8.5)
    right.set_ylim(0, 1.02)
    sns.despine(fig)
    return fig


class LiveCurves:
    """`learning_curves` of a run under way, one picture in a notebook that is drawn anew after every epoch.

    Give it to `train(..., on_epoch=LiveCurves())`.
    """

    def __init__(self) -> None:
        self.fig: Figure | None = None
        self.handle = None

    def __call__(self, history: pd.DataFrame) -> None:
        from IPython.display import display  # there where notebooks are

        self.fig = learning_curves(history, self.fig)
        plt.close(self.fig)  # shown here, and not once more when the cell ends
        if self.handle is None:
            self.handle = display(self.fig, display_id=True)
        else:
            self.handle.update(self.fig)


def save_table(table: pd.DataFrame, name: str, folder: Path, title: str, note: str = "") -> Figure:
    """Write NAME.csv and NAME.png to the folder; returns the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv")
    fig = table_figure(table, title, note)
    fig.savefig(folder / f"{name}.png", dpi=150)
    return fig


# ---- Static figures of what single modules do: the update that LoRA learned, and the projection step by step.


FLAT = 1e-6  # singular values below this share of the largest are rounding


@torch.no_grad()
def lora_spectra(model: nn.Module) -> pd.DataFrame:
    """Singular values of the update s B A_x of every LoRA layer, beside those of its frozen W.

    Returns:
        one row per (layer, number): update and frozen, falling; share, the update's part of its squared norm; and
        relative, the update's Frobenius norm over that of W, the same in all rows of a layer.
    """
    rows = []
    for name, layer in lora_layers(model).items():
        update, frozen = (torch.linalg.svdvals(w.float()).cpu().numpy() for w in (layer.delta_weight(), layer.weight))
        relative = np.linalg.norm(update) / np.linalg.norm(frozen)
        energy = max((update**2).sum(), np.finfo(np.float32).tiny)
        rows += [
            {
                "layer": name,
                "number": i + 1,
                "update": update[i],
                "frozen": frozen[i],
                "share": update[i] ** 2 / energy,
                "relative": relative,
            }
            for i in range(len(update))
        ]
    return pd.DataFrame(rows)


def effective_rank(spectrum: pd.DataFrame) -> pd.Series:
    """By layer, exp of the entropy of the update's shares: how many directions it truly uses, 0 to its rank."""
    share = spectrum["share"].where(spectrum["share"] > FLAT**2, np.nan)
    entropy = -(share * np.log(share)).groupby(spectrum["layer"], sort=False).sum()
    learned = spectrum.groupby("layer", sort=False)["update"].max() > 0
    return np.exp(entropy).where(learned, 0.0).rename("effective rank")


def spectra_figure(spectrum: pd.DataFrame, rank: int) -> Figure:
    """Singular values of update and frozen weight, and how many directions each layer's update uses."""
    fig = plt.figure(figsize=(10, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1.3, 1))
    colours = sns.color_palette("colorblind")
    shown = spectrum[spectrum["number"] <= 4 * rank]
    for i, (column, label) in enumerate((("frozen", "frozen W"), ("update", "update s B A"))):
        values = shown.groupby("number")[column]
        top = shown["frozen"].max()
        median, low, high = (np.maximum(v, top * FLAT) for v in (values.median(), values.min(), values.max()))
        left.plot(median.index, median, "os"[i] + "-", color=colours[i], label=label, markersize=4)
        left.fill_between(median.index, low, high, color=colours[i], alpha=0.2, linewidth=0)
    left.axvline(rank + 0.5, color="0.6", linestyle=":")
    left.annotate(f"rank {rank}", (rank + 0.7, left.get_ylim()[1]), fontsize=8, color="0.4", va="top")
    left.set(yscale="log", xlabel="number of the singular value", ylabel="singular value")
    left.set_title(
        f"median and range over {spectrum['layer'].nunique()} layers; below 1e-6 drawn there", loc="left", fontsize=9
    )
    left.legend(frameon=False, fontsize=8.5)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    used, relative = effective_rank(spectrum), spectrum.groupby("layer", sort=False)["relative"].first()
    kinds = [name.split(".")[-1] for name in used.index]
    names = [name.removeprefix("blocks.").replace(".", " ") for name in used.index]
    palette = {kind: colours[2 + i] for i, kind in enumerate(dict.fromkeys(kinds))}
    right.barh(range(len(used)), used, color=[palette[kind] for kind in kinds])
    for i, (value, size) in enumerate(zip(used, relative, strict=True)):
        right.text(value + 0.1, i, f"{size:.1%}", va="center", fontsize=7)
    right.set_yticks(range(len(used)), names, fontsize=7)
    right.invert_yaxis()
    right.set(xlim=(0, rank + 1.2), xlabel="directions used, of the rank")
    right.set_title("by block and layer; beside it |update| / |W|", loc="left", fontsize=9)
    for ax in (left, right):
        sns.despine(ax=ax)
    plt.close(fig)  # it is returned, not shown a second time when the cell ends
    return fig


def projection_steps(model: EnhancedTransformerDecoderOnly3D, view: FaceViews, yaws: tuple[float, ...]) -> Figure:
    """The 3-D projection of one view, step by step, a row a target yaw.

    Args:
        view: one side view.
        yaws: degrees to render at.
    """
    fig = plt.figure(figsize=(11, 2.1 * len(yaws)), layout="compressed")
    axes = fig.subplots(len(yaws), 5, squeeze=False)
    titles = (
        "keypoints, turned",
        "occupancy from above, own frame",
        "density, middle slice",
        "ray weights from above",
        "light stopped",
    )
    target = torch.tensor([[0.0, yaw, 0.0] for yaw in yaws]).deg2rad()
    each = [v.expand(len(yaws), *v.shape[1:]) for v in (view.src, view.angles, view.keypoints_3d)]
    with evaluation_mode(model):
        found = model.face_volume(*each, target)
    middle = found.density.shape[2] // 2
    colours = sns.color_palette("colorblind", len(KEYPOINT_NAMES))
    for i, row in enumerate(axes):
        points = found.keypoints[i].numpy()
        row[0].scatter(points[:, 0], points[:, 1], c=colours, s=30)
        row[0].set(xlim=(-1, 1), ylim=(1, -1), aspect="equal")
        row[0].set_ylabel(f"target yaw {yaws[i]:.0f}°", fontsize=9)
        shown = (
            found.occupancy[i].amax(0).amax(1),
            found.density[i, 0, middle],
            found.weights[i, 0].mean(1),
            found.weights[i, 0].sum(0),
        )
        for ax, values, limits in zip(row[1:], shown, (None, None, None, (0, 1)), strict=True):
            low, high = limits or (float(values.min()), float(values.max()))
            drawn = ax.imshow(values.numpy(), extent=(-1, 1, 1, -1), vmin=low, vmax=high)
            bar = fig.colorbar(drawn, ax=ax, shrink=0.75, pad=0.02)
            bar.ax.tick_params(labelsize=6)
        for ax, title in zip(row, titles, strict=True):
            ax.set(xticks=(), yticks=())
            if i == 0:
                ax.set_title(title, fontsize=9)
    plt.close(fig)
    return fig


# ---- Pictures of a grid of cells: every one with intervals over seeds, legible in grey and to the colour-blind.


COLOURS = sns.color_palette("colorblind")
NAMES = {
    "rank": "LoRA rank",
    "voxel_resolution": "voxel resolution",
    "lambda_prior": "weight of the prior, lambda",
    "test_tar": "TAR at FAR 1e-3",
    "val_tar": "TAR at FAR 1e-3, validation people",
    "test_rank1": "rank-1",
    "trainable": "trainable parameters",
    "memory_mb": "memory of a training step alone, MB",
    "step_ms": "time of a step, its share of the pass, ms",
}


def heat_map(cells: pd.DataFrame, value: str = "test_tar", title: str | None = None) -> Figure:
    """Rank against voxel resolution; each field with its interval, the recommended one framed."""
    found = summary(cells, CHOICE, value)
    means = found["mean"].unstack("voxel_resolution").sort_index(ascending=False)
    halves = found["half"].unstack("voxel_resolution").reindex_like(means)
    words = [
        [f"{m:.3f}" + ("" if np.isnan(h) else f"\n± {h:.3f}") for m, h in zip(*row, strict=True)]
        for row in zip(means.to_numpy(), halves.to_numpy(), strict=True)
    ]
    fig, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    sns.heatmap(
        means, annot=words, fmt="", cmap="cividis", linewidths=1, ax=ax, cbar_kws={"label": NAMES.get(value, value)}
    )
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
        ax.errorbar(
            np.arange(len(places)) + shift,
            rows["mean"],
            rows["half"].fillna(0),
            marker=MARKERS[i],
            capsize=2,
            color=COLOURS[i],
            linestyle=("-", "--", ":", "-.")[i % 4],
            label=f"{group:g}",
        )
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
        ax.errorbar(
            rows[cost],
            rows["mean"],
            rows["half"].fillna(0),
            linestyle="",
            marker=MARKERS[i],
            color=COLOURS[i],
            capsize=2,
            label=f"rank {rank}",
        )
        for place, (resolution, row) in enumerate(rows.sort_values("mean").iterrows()):
            ax.annotate(
                f"{resolution}³",
                (row[cost], row["mean"]),
                (5, 4 if place else -10),
                textcoords="offset points",
                fontsize=8,
            )
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
    rows = [
        {by: cell[by], "seed": cell["seed"], "epoch": epoch, "loss": loss}
        for _, cell in cells.iterrows()
        for epoch, loss in enumerate(cell["train_loss"], 1)
    ]
    found = summary(pd.DataFrame(rows), [by, "epoch"], "loss")
    fig, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    ends = {}
    for i, group in enumerate(dict.fromkeys(found.index.get_level_values(by))):
        row = found.loc[group]
        half = row["half"].fillna(0)
        ax.fill_between(row.index, row["mean"] - half, row["mean"] + half, color=COLOURS[i], alpha=0.25, linewidth=0)
        ax.plot(
            row.index,
            row["mean"],
            color=COLOURS[i],
            marker=MARKERS[i],
            markersize=4,
            label=f"{group:g}",
            linestyle=("-", "--", ":", "-.")[i % 4],
        )
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
        ax.errorbar(
            gained["mean"][weight],
            kept["mean"][weight],
            kept["half"].fillna(0)[weight],
            gained["half"].fillna(0)[weight],
            marker=MARKERS[i],
            color=COLOURS[i],
            capsize=2,
            linestyle="",
            label=f"{weight:g}",
        )
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


def forgetting_figure(found: pd.DataFrame, note: str = "") -> Figure:
    """What is kept below 45 degrees (up) against what is gained beyond (right), a point per method and lambda.

    Args:
        found: of `changes`.
        note: below the picture.
    """
    fig, axes = plt.subplots(1, len(RATES), figsize=(10, 4), layout="constrained")
    weights = sorted(found["weight"].unique())
    for ax, (rate, words) in zip(axes, RATES.items(), strict=True):
        of_rate = found[found["rate"] == rate]
        for colour, method in zip(COLOURS, of_rate["method"].unique(), strict=False):
            rows = of_rate[of_rate["method"] == method]
            kept, gained = (rows[rows["where"] == where].set_index("weight") for where in (KEPT, GAINED))
            ax.plot(gained["mean"], kept["mean"], ":", color=colour, zorder=1, label=method)
            for weight in kept.index:
                ax.errorbar(
                    gained["mean"][weight],
                    kept["mean"][weight],
                    kept["half"][weight],
                    gained["half"][weight],
                    color=colour,
                    marker=MARKERS[weights.index(weight)],
                    elinewidth=0.8,
                )
        ax.axhline(0, color="0.6", linewidth=1, zorder=0)
        ax.set(xlabel="gained at |yaw| ≥ 45°, against the base", ylabel="change at |yaw| < 45°")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_title(words, loc="left", fontsize=10)
    methods, _ = axes[0].get_legend_handles_labels()
    shapes = [
        Line2D([], [], color="0.4", linestyle="", marker=MARKERS[i], label=f"lambda {weight:g}")
        for i, weight in enumerate(weights)
    ]
    fig.legend(handles=[*methods, *shapes], loc="outside right center", frameon=False, fontsize=8.5)
    if note:
        fig.supxlabel(note, fontsize=7.5, color="0.35", x=0.01, ha="left")
    sns.despine(fig)
    return fig
