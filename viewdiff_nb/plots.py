"""Static figures."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .faces.views import YAW_BINS

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
BIN_NAMES = [f"{low}-{high}" for low, high in YAW_BINS]


def table_figure(table: pd.DataFrame, title: str, note: str = "") -> Figure:
    """A table as a picture: its index as the first column, the guide's columns in grey."""
    cells = table.reset_index()
    widths = [max(len(str(v)) for v in (column, *cells[column])) for column in cells]
    fig, ax = plt.subplots(figsize=(0.085 * sum(widths) + 0.3 * len(widths), 0.32 * (len(cells) + 1) + 0.9))
    ax.axis("off")
    drawn = ax.table(cells.astype(str).values.tolist(), colLabels=list(cells), cellLoc="center", loc="center",
                     colWidths=[w + 3 for w in widths], bbox=(0, 0, 1, 1))  # fmt: skip
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
        ax.errorbar([x + shift for x in range(len(bins))], rows["mean"], rows["half"], label=model, marker=marker,
                    markersize=5, linewidth=1.4, elinewidth=1.2, color=sns.color_palette("colorblind")[i])  # fmt: skip
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
    lines = [(left, "train_loss", "training", 0, "-"), (left, "val_loss", "validation", 1, "--"),
             (left, "prior_loss", "prior", 2, ":"), (right, "val_rank1", "rank-1", 0, "-"),
             (right, "val_tar", "TAR at FAR 1e-3", 1, "--"), (right, "val_cosine", "cosine", 2, ":")]  # fmt: skip
    for ax, column, label, colour, style in lines:
        if column in history:
            shown = history.dropna(subset=[column])
            ax.plot(shown["epoch"], shown[column], style, label=label, color=colours[colour], linewidth=1.6,
                    marker=MARKERS[colour], markersize=3.5)  # fmt: skip
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
