"""What the explorers draw on axes: each drawing is made once, then shown other values.

The same drawings make the live pictures (`live_figure.py`) and the static figures for papers and for GitHub.
"""

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

RAW, PREDICTED = sns.color_palette("colorblind")[:2]
EDGES = ((0, 1), (0, 2), (1, 2), (2, 3), (2, 4), (3, 4))  # of the face that five keypoints outline


class YawCurves:
    """Cosine with the own front over yaw, raw and predicted, and the most similar other front."""

    def __init__(self, ax: Axes, people: int) -> None:
        self.at = ax.axvline(0, color="0.6", linewidth=1)
        self.lines = [ax.plot([], [], **style)[0] for style in (
            {"color": RAW, "linestyle": ":", "linewidth": 1.2, "label": "raw, most similar other person"},
            {"color": PREDICTED, "linestyle": ":", "linewidth": 1.2, "label": "predicted, most similar other"},
            {"color": RAW, "linewidth": 2, "label": "raw, right person"},
            {"color": PREDICTED, "linewidth": 2, "label": "predicted, right person"},
        )]  # fmt: skip
        [self.dots] = ax.plot([], [], "o", color="0.15", markersize=6)
        self.moving = [self.at, *self.lines, self.dots]
        ax.set(xlim=(-92, 92), ylim=(-0.32, 1.02), xlabel="yaw, degrees", ylabel="cosine")
        ax.set_xticks(range(-90, 91, 30))
        ax.set_title(f"Similarity with {people} frontal embeddings", loc="left", fontsize=10)
        ax.legend(frameon=False, fontsize=7.5, loc="lower center", ncols=2)
        sns.despine(ax=ax)

    def show(self, yaws: np.ndarray, own: np.ndarray, others: np.ndarray, at: int) -> None:
        """
        Args:
            yaws: (Y,) degrees, rising.
            own, others: (2, Y) cosines of raw and predicted embeddings.
            at: the index of the yaw that is looked at.
        """
        self.at.set_xdata([yaws[at]] * 2)
        for line, values in zip(self.lines, (*others, *own), strict=True):
            line.set_data(yaws, values)
        self.dots.set_data([yaws[at]] * 2, own[:, at])


class KeypointFace:
    """Five keypoints as the camera sees them, joined to a face; the nearer one is, the larger its mark."""

    def __init__(self, ax: Axes) -> None:
        self.edges = [ax.plot([], [], color="0.6", linewidth=1.5)[0] for _ in EDGES]
        self.marks = ax.scatter([0] * 5, [0] * 5, s=60, color=sns.color_palette("colorblind", 5), zorder=3)
        self.moving = [*self.edges, self.marks]
        ax.set(xlim=(-1.8, 1.8), ylim=(1.8, -1.8), aspect="equal", xticks=[], yticks=[])

    def show(self, keypoints: np.ndarray) -> None:
        """keypoints: (5, 3), centred and of unit size."""
        for line, (a, b) in zip(self.edges, EDGES, strict=True):
            line.set_data(*keypoints[[a, b], :2].T)
        self.marks.set_offsets(keypoints[:, :2])
        self.marks.set_sizes(70 * np.exp(keypoints[:, 2]))


class AttentionMaps:
    """Attention of one token, heads against the tokens it attends to; a column of panels a layer, a row a pose.

    Args:
        axes: (rows, columns) array of axes.
        columns: title and token names of each column.
        rows: names of the rows; signed: whether a row's values are differences.
    """

    def __init__(self, axes: np.ndarray, columns: list[tuple[str, tuple[str, ...]]], heads: int,
                 rows: tuple[str, ...], signed: tuple[bool, ...]) -> None:  # fmt: skip
        self.axes, self.columns, self.signed = axes, columns, signed
        self.images = np.empty(axes.shape, object)
        for (row, column), ax in np.ndenumerate(axes):
            title, tokens = columns[column]
            cmap, low, high = ("RdBu_r", -0.5, 0.5) if signed[row] else ("viridis", 0, 1)
            image = ax.imshow(np.zeros((heads, len(tokens))), cmap, vmin=low, vmax=high, aspect="auto")
            last, first = row == len(axes) - 1, column == 0
            ax.set_xticks(range(len(tokens)), tokens if last else [], rotation=40, ha="right", fontsize=7)
            ax.set_yticks(range(heads), range(1, heads + 1) if first else [], fontsize=7)
            ax.tick_params(length=2)
            if row == 0:
                ax.set_title(title, fontsize=9)
            if first:
                ax.set_ylabel(f"{rows[row]}\nhead", fontsize=8)
            self.images[row, column] = image
        for row, images in enumerate(self.images):
            bar = axes[row, 0].figure.colorbar(images[-1], ax=list(axes[row]), shrink=0.9, pad=0.01)
            bar.ax.tick_params(labelsize=7, length=2)
            bar.set_label("difference" if signed[row] else "weight", fontsize=7)
        self.moving = list(self.images.flat)

    def show(self, weights: list[list[np.ndarray]]) -> None:
        """weights: of every row and column (heads, tokens)."""
        for (row, column), image in np.ndenumerate(self.images):
            image.set_data(weights[row][column])

    def texts(self, row: int, column: int) -> list[str]:
        """What each cell of a panel says, row by row."""
        (title, tokens), sign = self.columns[column], "+" if self.signed[row] else ""
        values = self.images[row, column].get_array()
        return [f"{title}, head {head + 1} → {token}: {values[head, i]:{sign}.3f}"
                for head in range(len(values)) for i, token in enumerate(tokens)]  # fmt: skip


PLANES = {  # axis of a volume that a slice is taken across: index of the axis, then the slice's two axes (x, y)
    "depth": (0, "x, image right", "y, down"),
    "height": (1, "x, image right", "z, away from the camera"),
    "width": (2, "y, down", "z, away from the camera"),
}


class Slice:
    """One layer of a voxel grid."""

    def __init__(self, ax: Axes) -> None:
        self.ax = ax
        self.image = ax.imshow(np.zeros((4, 4)), extent=(-1, 1, 1, -1), cmap="viridis", interpolation="nearest")
        self.text = ax.set_title("quantity, plane\nfrom to", fontsize=8)
        self.xlabel, self.ylabel = ax.set_xlabel("x, image right", fontsize=8), ax.set_ylabel("y, down", fontsize=8)
        ax.set_xticks((-1, 0, 1))
        ax.set_yticks((-1, 0, 1))
        ax.tick_params(labelsize=7)
        self.moving = [self.image, self.text, self.xlabel, self.ylabel]

    def show(self, volume: np.ndarray, plane: str, index: int, name: str) -> None:
        """
        Args:
            volume: (R, R, R) over (depth, y, x), drawn by `colour_scale`; or (R, R, R, 3) RGB in 0..1.
            plane: a name of `PLANES`; index: which layer.
            name: of what the volume holds.
        """
        axis, xlabel, ylabel = PLANES[plane]
        self.image.set_data(np.take(volume, index, axis))
        if volume.ndim == 3:
            cmap, low, high = colour_scale(volume)
            self.image.set(cmap=cmap, clim=(low, high))
        self.text.set_text(f"{name}, {plane} {index + 1} of {len(volume)}\n{volume.min():.3g} to {volume.max():.3g}")
        self.xlabel.set_text(xlabel)
        self.ylabel.set_text(ylabel)

    def texts(self) -> list[str]:
        """What each voxel of the layer says, row by row."""
        values = np.asarray(self.image.get_array())
        if values.ndim == 2:
            return [f"{value:.3g}" for value in values.ravel()]
        return [", ".join(f"{v:.2f}" for v in rgb) for rgb in values.reshape(-1, 3)]


def colour_scale(values: np.ndarray) -> tuple[str, float, float]:
    """Colour map and limits: from the least to the largest value, or about zero where there are negative ones."""
    low, high = float(values.min()), float(values.max())
    if low < 0:
        high = max(-low, high)
        return "RdBu_r", -high, high
    return "viridis", low, max(high, low + 1e-12)


class Rendering:
    """A rendered image: features as colours, or opacity."""

    def __init__(self, ax: Axes, title: str) -> None:
        self.image = ax.imshow(np.zeros((4, 4, 3)), extent=(-1, 1, 1, -1), interpolation="nearest")
        ax.set_title(title, fontsize=9)
        ax.set(xticks=(), yticks=())
        self.moving = [self.image]

    def show(self, image: np.ndarray) -> None:
        """image: (R, R, 3) RGB in 0..1."""
        self.image.set_data(image)
