"""What the explorers share: controls that redraw, dragging that moves sliders, and a static picture."""

import base64
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

HERE = Path(__file__).parent


class Stage(anywidget.AnyWidget):
    """Shows a picture that Python draws; says where it is dragged, and shows the values under the pointer.

    A picture replaces the one before without flicker, when it is decoded; one that comes late is dropped. When the
    kernel is gone the stage says so and what to do. Arrow keys do what dragging does.

    Traits:
        picture: a PNG or WebP.
        width: of the picture on the page, CSS pixels.
        label: what the picture shows, for screen readers; caption: a line below it.
        turnable: whether it can be dragged.
        turned: degrees dragged so far, [to the right, down]; grows, so that no step is lost when steps are merged.
        grids: what can be read off: each {"box": [left, top, right, bottom] in 0..1 from the top left corner,
            "rows": n, "columns": m, "texts": n m strings, row by row}.
    """

    _esm = HERE / "stage.js"
    _css = HERE / "stage.css"
    picture = traitlets.Bytes(b"").tag(sync=True)
    width = traitlets.Int(240).tag(sync=True)
    label = traitlets.Unicode("").tag(sync=True)
    caption = traitlets.Unicode("").tag(sync=True)
    turnable = traitlets.Bool(False).tag(sync=True)
    degrees_per_pixel = traitlets.Float(0.5).tag(sync=True)
    degrees_per_key = traitlets.List([5.0, 10.0]).tag(sync=True)  # right and left, up and down
    turned = traitlets.List([0.0, 0.0]).tag(sync=True)
    grids = traitlets.List([]).tag(sync=True)


STATIC = "VIEWDIFF_NB_STATIC"  # set where nobody can move a slider, e.g. when notebooks are executed for publication
SLIDER = widgets.Layout(width="330px")
DPI = 144  # of live pictures; a page shows them smaller, so they are sharp on dense screens
STYLE = {"description_width": "110px"}


class Explorer(widgets.VBox):
    """Pictures that follow controls.

    A subclass makes its controls, calls `follow` on them, and writes `_draw` and `figure`. A notebook shows the live
    explorer, and keeps the picture of `figure` beside it for readers without a kernel.
    """

    FIRST: tuple[str, ...] = ()  # controls that limit others, for `set`

    def __init__(self, children: list[widgets.Widget]) -> None:
        super().__init__(children)
        self.add_class("vd-explorer")
        self._held = 0  # how many contexts hold the drawing back

    def figure(self) -> Figure:
        """What is seen now, as a static figure."""
        raise NotImplementedError

    def _draw(self) -> None:
        raise NotImplementedError

    def follow(self, *controls: widgets.Widget) -> None:
        """Draw anew whenever one of these changes."""
        for control in controls:
            control.observe(lambda _: self.redraw(), "value")

    def redraw(self) -> None:
        """Show what the controls say now."""
        if not self._held:
            self._draw()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Controls that change in this context lead to one picture, at its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        self.redraw()

    def set(self, **values) -> None:
        """Move controls by name, e.g. set(yaw=-60, pitch=10): what a user does by hand."""
        with self.together():
            for name in sorted(values, key=lambda name: name not in self.FIRST):
                control = getattr(self, name, None)
                if not isinstance(control, widgets.ValueWidget):
                    raise AttributeError(f"{type(self).__name__} has no control named {name!r}")
                control.value = values[name]

    def _repr_mimebundle_(self, **options) -> dict:
        static = {"image/png": base64.b64encode(figure_png(self.figure())).decode(), "text/plain": repr(self)}
        if os.environ.get(STATIC):
            return static
        return super()._repr_mimebundle_(**options) | static

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: run the cell to move its sliders>"


def slider(name: str, low: float, high: float, step: float, value: float, form: str = ".0f") -> widgets.FloatSlider:
    """A slider that answers while it moves."""
    return widgets.FloatSlider(
        value, min=low, max=high, step=step, description=name, readout_format=form, layout=SLIDER, style=STYLE
    )


def side_by_side(*parts: widgets.Widget) -> widgets.HBox:
    """In a row, or below each other where the page is narrow."""
    return widgets.HBox(parts, layout=widgets.Layout(flex_flow="row wrap"))


def choice(name: str, options, value=None) -> widgets.Dropdown:
    """A list to choose from; the first by default."""
    value = value if value is not None else widgets.Dropdown(options=options).value
    return widgets.Dropdown(options=options, value=value, description=name, layout=SLIDER, style=STYLE)


def pose_sliders(
    pitches: tuple[float, ...] | None,
    yaws: tuple[float, ...] | None,
    pose: tuple[float, float, float],
    prefix: str = "",
) -> tuple[widgets.FloatSlider, ...]:
    """Sliders for pitch, yaw and roll in degrees.

    Args:
        pitches, yaws: the poses there are, evenly spaced; None for any.
        pose: where they stand at first.
    """
    made, limits = [], (40, 90, 30)
    for name, values, limit, at in zip(("pitch", "yaw", "roll"), (pitches, yaws, None), limits, pose, strict=True):
        low, high = (values[0], values[-1]) if values else (-limit, limit)
        step = values[1] - values[0] if values and len(values) > 1 else 1
        made.append(slider(f"{prefix}{name} (°)", low, high, step, at))
    return tuple(made)


def drag_moves(
    stage: Stage, right: widgets.FloatSlider, down: widgets.FloatSlider, explorer: Explorer, down_sign: float = -1.0
) -> None:
    """Let dragging a stage move two sliders: to the right, and down.

    What was dragged but does not yet make a step of the slider is kept for the next time.
    """
    wanted = {control: control.value for control in (right, down)}
    seen = list(stage.turned)

    def forget(change: dict) -> None:
        if abs(change["new"] - wanted[change["owner"]]) > change["owner"].step / 2 + 1e-9:  # rounding is at most that
            wanted[change["owner"]] = change["new"]  # moved by hand

    def moved(change: dict) -> None:
        moves = [new - old for new, old in zip(change["new"], seen, strict=True)]
        seen[:] = change["new"]
        with explorer.together():
            for control, move in zip((right, down), (moves[0], down_sign * moves[1]), strict=True):
                wanted[control] = min(max(wanted[control] + move, control.min), control.max)
                steps = round((wanted[control] - control.min) / control.step)
                control.value = control.min + steps * control.step

    for control in (right, down):
        control.observe(forget, "value")
    stage.observe(moved, "turned")


def on_drag(stage: Stage, draw: Callable[[], None]) -> None:
    """Call draw whenever a stage is dragged."""
    stage.observe(lambda _: draw(), "turned")


# ---- A picture in a notebook that can be turned by hand and asked for its values: the front end of the explorers.


# ---- A matplotlib figure that is redrawn within milliseconds, because only what moves is drawn anew.


class LiveFigure:
    """Keeps what does not move as pixels.

    Args:
        fig: the figure, complete; its layout stays as it is now.
        moving: artists whose data will change; the later ones lie on top. Images must fill their axes; they are copied
            cell by cell, which is ten times faster than drawing them.
    """

    def __init__(self, fig: Figure, moving: list[Artist]) -> None:
        self.fig = fig
        self.images = [artist for artist in moving if isinstance(artist, AxesImage)]
        self.others = [artist for artist in moving if not isinstance(artist, AxesImage)]
        self.canvas = FigureCanvasAgg(fig)
        for _ in range(2):  # the layout leaves room for what moves; axes of equal aspect need a second look
            self.canvas.draw()
        fig.set_layout_engine("none")
        for artist in moving:
            artist.set_animated(True)
        self.canvas.draw()
        self.still = self.canvas.copy_from_bbox(fig.bbox)

    def png(self) -> bytes:
        """The figure as it is now."""
        self.canvas.restore_region(self.still)
        for artist in self.others:
            self.fig.draw_artist(artist)
        pixels = np.array(np.asarray(self.canvas.buffer_rgba())[..., :3])
        for image in self.images:
            self._copy(image, pixels)
        return png_bytes(Image.fromarray(pixels))

    def box(self, ax: Axes) -> list[float]:
        """Where axes lie in the picture: [left, top, right, bottom] in 0..1 from the top left corner."""
        place = ax.get_position()
        return [place.x0, 1 - place.y1, place.x1, 1 - place.y0]

    def _copy(self, image: AxesImage, pixels: np.ndarray) -> None:
        """Draw the cells of an image, the first row on top, into its axes' part of the picture."""
        height, width = pixels.shape[:2]
        left, top, right, bottom = self.box(image.axes)
        x0, x1, y0, y1 = round(left * width), round(right * width), round(top * height), round(bottom * height)
        values = image.get_array()
        rgb = image.to_rgba(values, bytes=True)[..., :3] if values.ndim == 2 else (values * 255).astype(np.uint8)
        rows, columns = (
            (2 * np.arange(n) + 1) * cells // (2 * n) for n, cells in zip((y1 - y0, x1 - x0), rgb.shape, strict=False)
        )
        pixels[y0:y1, x0:x1] = rgb[rows[:, None], columns]


def png_bytes(picture: Image.Image) -> bytes:
    """Encoded for the front end: quickly rather than tightly."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def figure_png(fig: Figure) -> bytes:
    """A whole figure as a PNG, at its own resolution."""
    buffer = io.BytesIO()
    FigureCanvasAgg(fig).print_png(buffer)
    return buffer.getvalue()
