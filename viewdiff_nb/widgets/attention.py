"""Compare what the feature token attends to at two poses."""

from collections.abc import Sequence
from functools import lru_cache

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure

from viewdiff_nb.faces.turntable import load_turntable
from viewdiff_nb.modules.lora import evaluation_mode
from viewdiff_nb.modules.transformer import MEMORY_TOKENS, EnhancedTransformerDecoderOnly3D
from viewdiff_nb.widgets.explorer import LOOK, Explorer, LiveFigure, Stage, png, pose_sliders, pose_text
from viewdiff_nb.widgets.pose import People

DPI = 100  # a large picture: half the pixels are half the time
ROWS = (  # what a row shows, of what kind its values are, colour map and least value
    ("pose A", "weight", "viridis", 0.0),
    ("pose B", "weight", "viridis", 0.0),
    ("B − A", "difference", "RdBu_r", -1.0),
)
TICKS = (0.0, 0.1, 0.25, 0.5, 1.0)  # of a colour bar, and their negatives


def scale(low: float) -> FuncNorm:
    """Limits that stay while poses change, and colours by the square root: weights of .1 and .2 can be told apart."""

    def root(values: np.ndarray) -> np.ndarray:
        return np.sign(values) * np.sqrt(np.abs(values))

    def square(values: np.ndarray) -> np.ndarray:
        return np.sign(values) * np.square(values)

    return FuncNorm((root, square), low, 1.0)


def draw_maps(fig: Figure, columns: dict[str, Sequence[str]], weights: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Attention of one token, heads against the tokens it attends to: a column of panels a layer, a row a pose.

    Args:
        columns: title and token names of each column. weights: (heads, tokens) of every row and column.

    Returns:
        the images: array of objects (rows, columns).
    """
    images = np.empty((len(ROWS), len(columns)), object)
    axes = fig.subplots(*images.shape, squeeze=False)
    for row, (name, meaning, cmap, low) in enumerate(ROWS):
        for column, tokens in enumerate(columns.values()):
            ax, values = axes[row, column], weights[row][column]
            images[row, column] = ax.imshow(values, cmap, norm=scale(low), aspect="auto")
            names = tokens if row == len(ROWS) - 1 else []
            ax.set_xticks(range(len(tokens)), names, rotation=40, ha="right", fontsize=7)
            numbers = range(1, len(values) + 1) if column == 0 else []
            ax.set_yticks(range(len(values)), numbers, fontsize=7)
            ax.tick_params(length=2)
        axes[row, 0].set_ylabel(f"{name}\nhead", fontsize=8)
        ticks = [*TICKS, *(-tick for tick in TICKS[1:] if low)]
        bar = fig.colorbar(images[row, -1], ax=list(axes[row]), shrink=0.95, pad=0.01, ticks=ticks, format="{x:.4g}")
        bar.ax.tick_params(labelsize=7, length=2)
        bar.set_label(meaning, fontsize=7)
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title, fontsize=9)
    return images


class AttentionExplorer(Explorer):
    """What the feature token attends to at two poses, and the difference: heads x tokens for every layer.

    Of a model with cross-view attention also what a view takes from the other views of the person, which are spread
    over yaw.

    Args:
        model: an `EnhancedTransformerDecoderOnly3D`.
        people: where views come from; the shipped turntable by default.
        yaws: degrees, of pose A and of pose B.
    """

    HINT = (
        "Turn A or B: drag a head, or move its sliders. A row is what its feature token attends to, head by head.",
        "Bright cells hold most of a head's weight; red in the last row: more at B than at A.",
    )

    def __init__(
        self,
        model: EnhancedTransformerDecoderOnly3D,
        people: People | None = None,
        person: str | None = None,
        yaws: tuple[float, float] = (0.0, 75.0),
    ) -> None:
        self.model, self.people = model, people or load_turntable()
        names = self.people.names
        self.person = widgets.Dropdown(options=names, value=person or names[0], description="person", **LOOK)
        grid = self.people.pitches, self.people.yaws
        self._sliders = [pose_sliders(*grid, (0, yaw, 0), f"{name}: ") for name, yaw in zip("AB", yaws, strict=True)]
        (self.pitch_a, self.yaw_a, self.roll_a), (self.pitch_b, self.yaw_b, self.roll_b) = a, b = self._sliders
        self.head_a = Stage(width=130, turnable=True, label="pose A", caption="A: drag to turn")
        self.head_b = Stage(width=130, turnable=True, label="pose B", caption="B: drag to turn")
        self.maps = Stage(width=900, label="attention weights, heads against tokens")
        self.columns: dict[str, Sequence[str]] = {  # title: tokens
            f"layer {i}": ("self", *MEMORY_TOKENS) for i in range(1, len(model.blocks) + 1)
        }
        for after in model.cross_view or ():
            others = [f"view {i}" for i in range(2, model.n_views + 1)]
            self.columns[f"across views, after layer {after}"] = ("this view", *others)
        self._last_weights = lru_cache(maxsize=2)(self._weights_at)  # one pose stays while the other moves
        fig = Figure((9.4, 4.9), DPI, layout="constrained")
        self._images = draw_maps(fig, self.columns, self.weights())
        self._live = LiveFigure(list(self._images.flat))
        left = widgets.VBox([self.person, self.yaw_a, self.pitch_a, self.roll_a])
        right = widgets.VBox([widgets.HTML("&nbsp;"), self.yaw_b, self.pitch_b, self.roll_b])
        super().__init__([[left, self.head_a, right, self.head_b], [self.maps]], [self.person, *a, *b])
        self.drag(self.head_a, self.yaw_a, self.pitch_a)
        self.drag(self.head_b, self.yaw_b, self.pitch_b)
        self.redraw()

    def poses(self) -> list[list[float]]:
        """Pitch, yaw and roll of A and of B in degrees, as the sliders say."""
        return [[slider.value for slider in sliders] for sliders in self._sliders]

    def weights(self) -> list[list[np.ndarray]]:
        """Of A, of B and of their difference: (heads, tokens) of every column."""
        a, b = (self._last_weights(self.person.index, *pose) for pose in self.poses())
        return [a, b, [after - before for before, after in zip(a, b, strict=True)]]

    def largest_change(self) -> str:
        """Where A and B differ most, in words."""
        title, tokens, change = max(
            ((*names, of) for names, of in zip(self.columns.items(), self.weights()[2], strict=True)),
            key=lambda column: np.abs(column[2]).max(),
        )
        head, token = np.unravel_index(np.abs(change).argmax(), change.shape)
        return f"Largest change from A to B: {title}, head {head + 1} → {tokens[token]}, {change[head, token]:+.3f}."

    def _weights_at(self, person: int, pitch: float, yaw: float, roll: float) -> list[np.ndarray]:
        model = self.model
        row, at = self.people.row(person, pitch, roll), self.people.closest(person, pitch, yaw, roll)
        others = model.n_views - 1 if model.cross_view else 0
        index = torch.tensor([at, *np.linspace(0, len(row) - 1, others).round().astype(int)])  # the view, the others
        src, angles, points = (v[index].to(model.input.weight.device) for v in (row.src, row.angles, row.keypoints_3d))
        layers, inputs = list((model.cross_view or {}).values()), {}
        hooks = [
            layer.register_forward_pre_hook(lambda layer, tokens: inputs.update({layer: tokens[0]})) for layer in layers
        ]
        with evaluation_mode(model):
            _, weights = model(src, angles, points, return_attention=True)
            for hook in hooks:
                hook.remove()
            across = [layer(inputs[layer], return_attention=True)[1] for layer in layers]
        return [*weights[0, :, :, 0].cpu().numpy(), *(w[0, :, 0].cpu().numpy() for w in across)]

    def _draw(self) -> None:
        grids = []
        for (_, meaning, *_), images, weights in zip(ROWS, self._images, self.weights(), strict=True):
            sign = "+" if meaning == "difference" else ""
            for image, values, (title, tokens) in zip(images, weights, self.columns.items(), strict=True):
                image.set_data(values)
                texts = [
                    f"{title}, head {head} → {token}: {value:{sign}.3f}"
                    for head, of_head in enumerate(values, 1)
                    for token, value in zip(tokens, of_head, strict=True)
                ]
                grids.append(self._live.grid(image, texts))
        self.maps.picture, self.maps.grids = self._live.png(), grids
        self.maps.caption = f"{self.largest_change()} Point at a cell for its value; the weights of a head sum to 1."
        for name, stage, pose in zip("AB", (self.head_a, self.head_b), self.poses(), strict=True):
            stage.label = f"pose {name}: {pose_text(*pose)}"
            picture = self.people.picture(self.person.index, *pose)
            if picture is not None:
                stage.picture = png(picture)

    def figure(self) -> Figure:
        fig = Figure((9.4, 4.9), 144, layout="constrained")
        draw_maps(fig, self.columns, self.weights())
        a, b = (pose_text(*pose) for pose in self.poses())
        fig.suptitle(f"{self.person.value}; A: {a}; B: {b}", fontsize=9, parse_math=False)
        return fig
