"""Compare what the feature token attends to at two poses."""

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure

from viewdiff_nb.faces.turntable import load_turntable
from viewdiff_nb.modules.lora import evaluation_mode
from viewdiff_nb.modules.transformer import MEMORY_TOKENS, EnhancedTransformerDecoderOnly3D
from viewdiff_nb.widgets.explorer import (
    Explorer,
    LiveFigure,
    Stage,
    choice,
    drag_moves,
    png_bytes,
    pose_sliders,
    side_by_side,
)
from viewdiff_nb.widgets.pose import People


class AttentionMaps:
    """Attention of one token, heads against the tokens it attends to; a column of panels a layer, a row a pose.

    Args:
        axes: (rows, columns) array of axes.
        columns: title and token names of each column.
        rows: names of the rows; signed: whether a row's values are differences.
    """

    def __init__(
        self,
        axes: np.ndarray,
        columns: list[tuple[str, tuple[str, ...]]],
        heads: int,
        rows: tuple[str, ...],
        signed: tuple[bool, ...],
    ) -> None:
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
        return [
            f"{title}, head {head + 1} → {token}: {values[head, i]:{sign}.3f}"
            for head in range(len(values))
            for i, token in enumerate(tokens)
        ]


MAP_DPI = 100  # a large picture: half the pixels are half the time
TOKENS = ("self", *MEMORY_TOKENS)


class AttentionExplorer(Explorer):
    """What the feature token attends to at two poses, and the difference: heads x tokens for every layer.

    Of a model with cross-view attention also what a view takes from the other views of the person, which are spread
    over yaw.

    Args:
        model: an `EnhancedTransformerDecoderOnly3D`.
        people: where views come from; the shipped turntable by default.
        yaws: degrees, of pose A and of pose B.
    """

    ROWS = ("pose A", "pose B", "B − A")

    def __init__(
        self,
        model: EnhancedTransformerDecoderOnly3D,
        people: People | None = None,
        person: str | None = None,
        yaws: tuple[float, float] = (0.0, 75.0),
    ) -> None:
        self.model, self.people = model, people or load_turntable()
        self.person = choice("person", list(self.people.names), person)
        grid = self.people.pitches, self.people.yaws
        self.pitch_a, self.yaw_a, self.roll_a = pose_sliders(*grid, (0, yaws[0], 0), "A: ")
        self.pitch_b, self.yaw_b, self.roll_b = pose_sliders(*grid, (0, yaws[1], 0), "B: ")
        self.head_a = Stage(width=130, turnable=True, label="pose A", caption="A: drag to turn")
        self.head_b = Stage(width=130, turnable=True, label="pose B", caption="B: drag to turn")
        self.maps = Stage(
            width=900,
            label="attention weights, heads against tokens",
            caption="Point at a cell for its value. The weights of a head sum to 1.",
        )
        self._known: dict = {}  # of the pose that stays while the other moves
        fig, self._maps = self._make_maps(MAP_DPI)
        self._live = LiveFigure(fig, self._maps.moving)
        a, b = (self.yaw_a, self.pitch_a, self.roll_a), (self.yaw_b, self.pitch_b, self.roll_b)
        boxes = [widgets.VBox([self.person, *a]), self.head_a, widgets.VBox([widgets.HTML("&nbsp;"), *b]), self.head_b]
        super().__init__([side_by_side(*boxes), self.maps])
        self.follow(self.person, *a, *b)
        drag_moves(self.head_a, self.yaw_a, self.pitch_a, self)
        drag_moves(self.head_b, self.yaw_b, self.pitch_b, self)
        self.redraw()

    def _columns(self) -> list[tuple[str, tuple[str, ...]]]:
        columns = [(f"layer {i + 1}", TOKENS) for i in range(len(self.model.blocks))]
        others = tuple(f"view {i}" for i in range(2, self.model.n_views + 1))
        for after in self.model.cross_view or ():
            columns.append((f"across views, after layer {after}", ("this view", *others)))
        return columns

    def _make_maps(self, dpi: int) -> tuple[Figure, AttentionMaps]:
        columns = self._columns()
        fig = Figure((9.4, 4.9), dpi, layout="constrained")
        heads = self.model.blocks[0].attention.num_heads
        maps = AttentionMaps(
            fig.subplots(3, len(columns), squeeze=False), columns, heads, self.ROWS, (False, False, True)
        )
        return fig, maps

    def poses(self) -> list[tuple[float, float, float]]:
        """Pitch, yaw and roll of A and of B in degrees, as the sliders say."""
        return [
            (self.pitch_a.value, self.yaw_a.value, self.roll_a.value),
            (self.pitch_b.value, self.yaw_b.value, self.roll_b.value),
        ]

    def weights(self) -> list[list[np.ndarray]]:
        """Of A, of B and of their difference: (heads, tokens) of every column."""
        keys = [(self.person.value, *pose) for pose in self.poses()]
        self._known = {key: self._known.get(key) or self._weights_at(*key[1:]) for key in keys}
        a, b = (self._known[key] for key in keys)
        return [a, b, [after - before for before, after in zip(a, b, strict=True)]]

    def _weights_at(self, pitch: float, yaw: float, roll: float) -> list[np.ndarray]:
        model, person = self.model, self.people.names.index(self.person.value)
        row, at = self.people.row(person, pitch, roll), self.people.closest(person, pitch, yaw, roll)
        others = model.n_views - 1 if model.cross_view else 0
        index = [at, *np.linspace(0, len(row) - 1, others).round().astype(int).tolist()]  # the view, then the others
        device, across = model.input.weight.device, {}
        src, angles, points = (v[index].to(device) for v in (row.src, row.angles, row.keypoints_3d))
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: across.update({name: inputs[0]}))
            for name, layer in (model.cross_view or {}).items()
        ]
        with evaluation_mode(model):
            _, weights = model(src, angles, points, return_attention=True)
            for hook in hooks:
                hook.remove()
            of_views = [model.cross_view[name](tokens, return_attention=True)[1] for name, tokens in across.items()]
        return [*weights[0, :, :, 0].cpu().numpy(), *(w[0, :, 0].cpu().numpy() for w in of_views)]

    def _draw(self) -> None:
        self._maps.show(self.weights())
        self.maps.picture = self._live.png()
        self.maps.grids = [
            {
                "box": self._live.box(ax),
                "rows": image.get_array().shape[0],
                "columns": image.get_array().shape[1],
                "texts": self._maps.texts(row, column),
            }
            for (row, column), ax in np.ndenumerate(self._maps.axes)
            for image in [self._maps.images[row, column]]
        ]
        person = self.people.names.index(self.person.value)
        for stage, pose in zip((self.head_a, self.head_b), self.poses(), strict=True):
            picture = self.people.picture(person, *pose)
            if picture is not None:
                stage.picture = png_bytes(picture)

    def figure(self) -> Figure:
        fig, maps = self._make_maps(110)
        maps.show(self.weights())
        a, b = ("pitch {:.0f}°, yaw {:.0f}°, roll {:.0f}°".format(*pose) for pose in self.poses())
        fig.suptitle(f"{self.person.value}; A: {a}; B: {b}", fontsize=9, parse_math=False)
        return fig
