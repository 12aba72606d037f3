"""Static figures; series differ in colour and in marker, and are legible in grey and to the colour-blind."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox
from torch import nn

from viewdiff_nb.faces.geometry import KEYPOINT_NAMES, YAW_BINS
from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.modules.lora import evaluation_mode, lora_layers
from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.studies.ablation import CHOICE, choice_words, paired, recommend, summary
from viewdiff_nb.studies.significance import told_apart
from viewdiff_nb.studies.tables import latex

BIN_NAMES = [f"{low}-{high}" for low, high in YAW_BINS]
COLOURS = sns.color_palette("colorblind")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8.5}
ALIASES = {"raw": "raw side view", "LoRA": "LoRA r=8", "trained model": "small transformer"}
STYLES: dict[str, dict[str, Any]] = {  # a model looks the same in all pictures; the best one is the strongest
    "raw side view": {"color": "0.45", "marker": "o"},
    "base": {"color": "0.65", "marker": "P"},
    "canonical correlation": {"color": COLOURS[1], "marker": "s"},
    "DREAM": {"color": COLOURS[5], "marker": "v"},
    "MLP, 1024 wide": {"color": COLOURS[2], "marker": "^"},
    "LoRA r=8": {"color": COLOURS[4], "marker": "D"},
    "LoRA + prior": {"color": COLOURS[3], "marker": "X"},
    "LoRA r=8 + projection": {"color": COLOURS[6], "marker": "d"},
    "projection": {"color": COLOURS[5], "marker": "v"},
    "full fine-tuning": {"color": COLOURS[3], "marker": "P"},
    "transformer": {"color": COLOURS[9], "marker": "p"},
    "shipped weights": {"color": COLOURS[9], "marker": "s"},
    "drop-in": {"color": COLOURS[3], "marker": "D"},
    "small transformer": {"color": COLOURS[0], "marker": "*", "linewidth": 2.6, "linestyle": "-"},
}
DPI = 150
FLAT = 1e-6  # singular values below this share of the largest are rounding
KEPT, GAINED = "0-45", "45-90"  # degrees of |yaw|: what a base was trained on, and what it is adapted to
RATES = {"rank1": "rank-1", "tar": "TAR at FAR 1e-3"}
COSTS = {"trainable": "trainable parameters", "memory_mb": "memory of a training step alone, MB"}


def model_style(name: str, i: int) -> dict[str, Any]:
    """Colour, marker, dashes and width of a model's line; one without a look of its own has that of the i-th series.

    >>> model_style("raw", 3)["color"], model_style("mine", 3)["marker"]
    ('0.45', '^')
    """
    plain = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.6}
    return plain | {"linestyle": LINES[i % len(LINES)], "markersize": 5} | STYLES.get(ALIASES.get(name, name), {})


def panels(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure that is sharp in a notebook, and its axes; options of matplotlib's `subplots`."""
    return plt.subplots(rows, columns, layout="constrained", dpi=DPI, **options)


def save_table(table: pd.DataFrame, name: str, folder: Path, title: str, note: str = "") -> Figure:
    """Write NAME.csv, NAME.tex and NAME.png to the folder; returns the picture, with the guide's columns in grey."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv")
    (folder / f"{name}.tex").write_text(latex(table, ". ".join(filter(None, (title, note)))), encoding="utf-8")
    cells = table.reset_index()
    widths = [max(len(str(v)) for v in (column, *cells[column])) for column in cells]
    fig, ax = plt.subplots(figsize=(0.085 * sum(widths) + 0.3 * len(widths), 0.32 * (len(cells) + 1) + 0.9))
    ax.axis("off")
    text, widths = cells.astype(str).values.tolist(), [w + 3 for w in widths]
    drawn = ax.table(text, colLabels=list(cells), colWidths=widths, cellLoc="center", bbox=Bbox.unit())
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for (row, column), cell in drawn.get_celld().items():
        head, guide = row == 0, cells.columns[column].startswith("guide")
        cell.set(edgecolor="0.85", facecolor="0.93" if head else "white", linewidth=0.6)
        text_style = {"color": "0.5" if guide else "0.1", "weight": "bold" if head else "normal"}
        cell.set_text_props(horizontalalignment="left" if column == 0 else "center", **text_style)
    ax.set_title(title, loc="left", fontsize=11, weight="bold")
    fig.text(0.01, 0.01, note, fontsize=7.5, color="0.35", ha="left", va="bottom")
    height = fig.get_figheight()
    fig.subplots_adjust(left=0.01, right=0.99, bottom=(0.3 if note else 0.05) / height, top=1 - 0.35 / height)
    fig.savefig(folder / f"{name}.png", dpi=DPI)
    return fig


def recognition_curves(found: pd.DataFrame, rate: str, title: str, note: str = "") -> Figure:
    """A rate over |yaw| bins for several models, with bands of 95 %; found: of `tables.estimates`."""
    fig, ax = panels(figsize=(8, 4.2))
    bins = list(found["yaw"].unique())
    for i, model in enumerate(found["model"].unique()):
        rows, look = found[found["model"] == model], model_style(model, i)
        x = [bins.index(yaw) for yaw in rows["yaw"]]
        ax.plot(x, rows["mean"], label=model, **look)
        low, high = rows["mean"] - rows["half"], rows["mean"] + rows["half"]
        ax.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
    ax.set_xticks(range(len(bins)), bins)
    ax.set(xlabel="|yaw| of the side view, degrees", ylabel=rate, ylim=(0, 1.02))
    ax.set_title(title, loc="left", fontsize=11)
    ax.legend(**LEGEND, loc="lower left")
    fig.supxlabel(note, fontsize=8, color="0.35")
    sns.despine(fig)
    return fig


def learning_curves(history: pd.DataFrame, fig: Figure | None = None) -> Figure:
    """Loss and recognition over epochs of a `TrainResult`'s history, or of a part of it; drawn anew on fig, if any."""
    fig = fig or plt.figure(figsize=(9, 3.2), layout="constrained", dpi=DPI)
    fig.clear()
    shown_in = {
        "loss": {"train_loss": "training", "val_loss": "validation", "prior_loss": "prior"},
        "validation people": {"val_rank1": "rank-1", "val_tar": "TAR at FAR 1e-3", "val_cosine": "cosine"},
    }
    for ax, (title, columns) in zip(fig.subplots(1, 2), shown_in.items(), strict=True):
        for i, (column, label) in enumerate(columns.items()):
            if column in history:
                shown = history.dropna(subset=[column])
                style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 3.5, "linewidth": 1.6}
                ax.plot(shown["epoch"], shown[column], LINES[i], label=label, **style)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if ax.lines:
            ax.legend(**LEGEND)
    ax.set_ylim(0, 1.02)
    sns.despine(fig)
    return fig


class LiveCurves:
    """For `train(..., on_epoch=LiveCurves())`: `learning_curves` as one picture, drawn anew after every epoch."""

    def __init__(self) -> None:
        self.fig: Figure | None = None
        self.handle = None

    def __call__(self, history: pd.DataFrame) -> None:
        from IPython.display import display  # scripts that only draw need no IPython

        self.fig = learning_curves(history, self.fig)
        plt.close(self.fig)  # shown here, and not once more when the cell ends
        if self.handle is None:
            self.handle = display(self.fig, display_id=True)
        else:
            self.handle.update(self.fig)


@torch.no_grad()
def lora_spectra(model: nn.Module) -> pd.DataFrame:
    """Singular values of the update s B A_x of every LoRA layer, beside those of its frozen W.

    Returns:
        one row per (layer, number): update and frozen, falling; share, the update's part of its squared norm; and
        relative, the update's Frobenius norm over that of W, the same in all rows of a layer.
    """
    spectra = []
    for name, layer in lora_layers(model).items():
        update, frozen = (torch.linalg.svdvals(w.float()).cpu().numpy() for w in (layer.delta_weight(), layer.weight))
        energy = max((update**2).sum(), np.finfo(np.float32).tiny)
        columns = {"layer": name, "number": np.arange(1, len(update) + 1), "update": update, "frozen": frozen}
        relative = np.linalg.norm(update) / np.linalg.norm(frozen)
        spectra.append(pd.DataFrame(columns | {"share": update**2 / energy, "relative": relative}))
    return pd.concat(spectra, ignore_index=True)


def effective_rank(spectrum: pd.DataFrame) -> pd.Series:
    """By layer, exp of the entropy of the update's shares: how many directions it truly uses, 0 to its rank."""
    share = spectrum["share"].where(spectrum["share"] > FLAT**2, np.nan)
    entropy = -(share * np.log(share)).groupby(spectrum["layer"], sort=False).sum()
    learned = spectrum.groupby("layer", sort=False)["update"].max() > 0
    return np.exp(entropy).where(learned, 0.0).rename("effective rank")


def spectra_figure(spectrum: pd.DataFrame, rank: int) -> Figure:
    """Singular values of update and frozen weight; how many directions each layer's update uses, and its size."""
    fig, (left, middle, right) = panels(1, 3, width_ratios=(1.5, 1, 1), figsize=(10.5, 3.6))
    shown = spectrum[spectrum["number"] <= 4 * rank]
    least = FLAT * shown["frozen"].max()
    for i, (column, label) in enumerate((("frozen", "frozen W"), ("update", "update s B A"))):
        values = shown.groupby("number")[column]
        median, low, high = (np.maximum(v, least) for v in (values.median(), values.min(), values.max()))
        left.plot(median.index, median, MARKERS[i] + "-", color=COLOURS[i], label=label, markersize=4)
        left.fill_between(median.index, low, high, color=COLOURS[i], alpha=0.2, linewidth=0)
    left.axvline(rank + 0.5, color="0.6", linestyle=":")
    left.annotate(f"rank {rank}", (rank + 0.7, left.get_ylim()[1]), fontsize=8, color="0.4", va="top")
    left.set(yscale="log", xlabel="number of the singular value", ylabel="singular value")
    layers = spectrum["layer"].nunique()
    left.set_title(f"median and range over {layers} layers; below 1e-6 drawn there", loc="left", fontsize=9)
    left.legend(**LEGEND)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    used, relative = effective_rank(spectrum), spectrum.groupby("layer", sort=False)["relative"].first()
    parts = [name.removeprefix("blocks.").split(".") for name in used.index]
    names = [" ".join((f"layer {int(part[0]) + 1}", *part[1:]) if part[0].isdigit() else part) for part in parts]
    kinds, _ = pd.factorize(np.array([part[-1] for part in parts]))
    for ax, values, title in ((middle, used, f"directions used, of {rank}"), (right, relative, "|update| / |W|")):
        ax.barh(range(layers), values, color=[COLOURS[2 + kind] for kind in kinds])
        ax.set_yticks(range(layers), names if ax is middle else [], fontsize=8)
        ax.invert_yaxis()
        ax.set_title(title, loc="left", fontsize=9)
    middle.set_xlim(0, rank)
    right.axvline(1, color="0.4", linestyle=":")
    right.xaxis.set_major_formatter(PercentFormatter(1))
    sns.despine(fig)
    plt.close(fig)  # it is returned, not shown a second time when the cell ends
    return fig


def projection_steps(model: EnhancedTransformerDecoderOnly3D, view: FaceViews, yaws: tuple[float, ...]) -> Figure:
    """The 3-D projection of one side view, step by step, a row for each yaw (degrees) that it is rendered at."""
    fig = plt.figure(figsize=(10.6, 2.1 * len(yaws)), layout="compressed", dpi=DPI)
    axes = fig.subplots(len(yaws), 5, squeeze=False, subplot_kw={"xticks": (), "yticks": ()})
    target = torch.tensor([[0.0, yaw, 0.0] for yaw in yaws]).deg2rad()
    rows = torch.zeros(len(yaws), dtype=torch.long)  # the one view for each yaw
    with evaluation_mode(model):
        found = model.face_volume(view.src[rows], view.angles[rows], view.keypoints_3d[rows], target)
    steps = {
        "occupancy from above, own frame": found.occupancy.amax((1, 3)),
        "density, middle slice": found.density[:, 0, found.density.shape[2] // 2],
        "ray weights from above": found.weights[:, 0].mean(2),
        "light stopped": found.weights[:, 0].sum(1),
    }
    for i, row in enumerate(axes):
        points = found.keypoints[i].numpy()
        row[0].scatter(points[:, 0], points[:, 1], c=COLOURS[: len(KEYPOINT_NAMES)], s=30)
        row[0].set(xlim=(-1, 1), ylim=(1, -1), aspect="equal")
        row[0].set_ylabel(f"target yaw {yaws[i]:.0f}°", fontsize=9)
        for ax, (title, values) in zip(row[1:], steps.items(), strict=True):
            drawn = ax.imshow(values[i].numpy(), extent=(-1, 1, 1, -1))
            if title == "light stopped":
                drawn.set_clim(0, 1)
            fig.colorbar(drawn, ax=ax, shrink=0.75, pad=0.02).ax.tick_params(labelsize=8)
    for ax, title in zip(axes[0], ("keypoints, turned", *steps), strict=True):
        ax.set_title(title, fontsize=9)
    plt.close(fig)
    return fig


def heat_map(cells: pd.DataFrame) -> Figure:
    """Rank against voxel resolution; each field with its interval, the recommended one framed."""
    found = summary(cells, CHOICE, "test_tar")
    found["words"] = [f"{mean:.3f}" + ("" if np.isnan(half) else f"\n± {half:.3f}") for mean, half in found.to_numpy()]
    means, words = (found[x].unstack("voxel_resolution").sort_index(ascending=False) for x in ("mean", "words"))
    fig, ax = panels(figsize=(5.2, 3.6))
    sns.heatmap(means, annot=words, fmt="", cmap="cividis", linewidths=1, ax=ax, cbar_kws={"label": RATES["tar"]})
    rank, voxels = recommend(cells).chosen
    corner = means.columns.get_loc(voxels), means.index.get_loc(rank)
    ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=3))
    return _finished(fig, f"Enough: {choice_words(rank, voxels)}", "voxels along an edge of the grid", "LoRA rank")


def pareto(cells: pd.DataFrame, cost: str = "trainable") -> Figure:
    """Every rank and resolution by cost (one of `COSTS`) and TAR; the front is what nothing cheaper equals."""
    found = summary(cells, CHOICE, "test_tar").fillna({"half": 0}).join(cells.groupby(CHOICE)[cost].mean())
    found = found.sort_values([cost, "mean"])
    fig, ax = panels(figsize=(5.6, 3.6))
    for i, rank in enumerate(sorted(cells["rank"].unique())):
        rows = found.xs(rank, level="rank")
        _points(ax, i, rows[cost], rows["mean"], rows["half"], linestyle="", capsize=2, label=f"rank {rank}")
        for j, (resolution, row) in enumerate(rows.sort_values("mean").iterrows()):
            offset = (5, 4 if j else -10)  # the lowest has its name below
            ax.annotate(f"{resolution}³", (row[cost], row["mean"]), offset, textcoords="offset points", fontsize=8)
    front = found[found["mean"] >= found["mean"].cummax()]
    ax.plot(front[cost], front["mean"], color="0.5", linewidth=1, zorder=0, drawstyle="steps-post", label="front")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    rank, resolution = front["mean"].idxmax()
    return _finished(fig, f"Nothing is above {choice_words(rank, resolution)}", COSTS[cost], RATES["tar"])


def retention(cells: pd.DataFrame) -> Figure:
    """What is kept below 45° against what is gained beyond, for each weight of the prior."""
    sides = (summary(cells, ["lambda_prior"], f"test_tar_{side}") for side in (KEPT, GAINED))
    kept, gained = (side.fillna({"half": 0}) for side in sides)
    fig, ax = panels(figsize=(5.2, 3.6))
    for i, weight in enumerate(kept.index):
        (x, x_half), (y, y_half) = gained.loc[weight], kept.loc[weight]
        _points(ax, i, x, y, y_half, xerr=x_half, capsize=2, linestyle="", label=f"{weight:g}")
    low, high = kept.index[0], kept.index[-1]
    more = paired(cells, ["lambda_prior"], high, low, f"test_tar_{KEPT}")
    words = f"keeps {more:+.3f} more" if told_apart([more])[0] else "keeps as much, as far as is seen,"
    labels = f"{RATES['tar']}, |yaw| ≥ 45° (adapted)", f"{RATES['tar']}, |yaw| < 45° (kept)"
    return _finished(fig, f"Lambda {high:g} {words} than {low:g}", *labels, "weight of the prior, lambda")


def write_all(cells: pd.DataFrame, folder: Path, prior: pd.DataFrame | None = None) -> dict[str, Figure]:
    """All pictures of a grid as PNG and SVG in folder, by name; prior: cells for that of the prior's weight."""
    figures = {
        "ablation_heat_map": heat_map(cells),
        "ablation_pareto_parameters": pareto(cells),
        "ablation_pareto_memory": pareto(cells, "memory_mb"),
        "ablation_retention": retention(cells if prior is None else prior),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, fig in figures.items():
        fig.savefig(folder / f"{name}.png", dpi=DPI)
        with plt.rc_context({"svg.hashsalt": name}):  # equal pictures, equal files
            fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(fig)
    return figures


def _points(ax: Axes, i: int, x: Any, y: Any, half: Any, **style: Any) -> None:
    """Points with 95 % intervals, in the marker and (if style has none) the colour of the i-th series."""
    ax.errorbar(x, y, half, marker=MARKERS[i], **{"color": COLOURS[i]} | style)


def _finished(fig: Figure, title: str, xlabel: str, ylabel: str, legend: str | None = None) -> Figure:
    ax = fig.axes[0]
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, loc="left", fontsize=10)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(title=legend, **LEGEND)
    sns.despine(fig)
    return fig
