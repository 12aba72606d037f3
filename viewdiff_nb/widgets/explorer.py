"""What the explorers share: controls that redraw, dragging that moves sliders, figures redrawn within milliseconds."""

import base64
import io
import os
from collections.abc import Callable, Iterator, Sequence
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

STATIC = "VIEWDIFF_NB_STATIC"  # environment variable, set while notebooks are executed for publication
DPI = 144  # of live pictures; a page shows them smaller, so they are sharp on dense screens
LOOK = {"layout": widgets.Layout(width="330px"), "style": {"description_width": "110px"}}  # of a control


class Stage(anywidget.AnyWidget):
    """Shows a picture that Python draws, reports dragging and arrow keys, and shows the values under the pointer.

    Traits:
        picture: a PNG or WebP.
        width: of the picture on the page, CSS pixels.
        label: what the picture shows, for screen readers; caption: a line below it.
        turnable: whether it can be dragged.
        turned: degrees dragged so far, [to the right, down]; a sum, so that no step is lost when messages are merged.
        grids: values to read off: each {"box": [left, top, right, bottom] in 0..1 from the top left corner,
            "rows": n, "columns": m, "texts": n m strings, row by row}.
    """

    _esm = Path(__file__).with_name("stage.js")
    _css = Path(__file__).with_name("stage.css")
    picture = traitlets.Bytes(b"").tag(sync=True)
    width = traitlets.Int(240).tag(sync=True)
    label = traitlets.Unicode("").tag(sync=True)
    caption = traitlets.Unicode("").tag(sync=True)
    turnable = traitlets.Bool(False).tag(sync=True)
    turned = traitlets.List([0.0, 0.0]).tag(sync=True)
    grids: traitlets.List = traitlets.List([]).tag(sync=True)


class Explorer(widgets.VBox):
    """Pictures that follow controls.

    A notebook shows the live explorer, and keeps the picture of `figure` beside it for readers without a kernel.

    Args:
        rows: widgets side by side, or below each other where the page is narrow.
        controls: those of them that redraw the pictures when they change.
    """

    figure: Callable[[], Figure]  # a subclass's method: what is seen now, as a static figure
    _draw: Callable[[], None]  # a subclass's method: sets the pictures of its stages
    FIRST: tuple[str, ...] = ()  # controls that `set` moves before the others, because they limit them
    HINT: tuple[str, ...] = ()  # what to do first, and how to read what is seen: a line each

    def __init__(self, rows: Sequence[Sequence[widgets.Widget]], controls: Sequence[widgets.Widget] = ()) -> None:
        lines = [[widgets.HTML("<br>".join(self.HINT)).add_class("vd-hint")]] if self.HINT else []
        wrapped = widgets.Layout(flex_flow="row wrap")
        super().__init__([widgets.HBox(row, layout=wrapped) for row in (*lines, *rows)])
        self.add_class("vd-explorer")
        self._held = 0  # how many contexts of `together` are open
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

    def set(self, **values: object) -> None:
        """Move controls by name, e.g. set(yaw=-60, pitch=10): what a user does by hand."""
        with self.together():
            for name in sorted(values, key=lambda name: name not in self.FIRST):
                control = getattr(self, name, None)
                if not isinstance(control, widgets.ValueWidget):
                    raise AttributeError(f"{type(self).__name__} has no control named {name!r}")
                control.value = values[name]

    def drag(self, stage: Stage, right: widgets.FloatSlider, up: widgets.FloatSlider) -> None:
        """Let dragging a stage move two sliders. What does not yet make a step of a slider counts the next time."""
        wanted = {slider: slider.value for slider in (right, up)}  # not rounded to steps

        def move(change: dict) -> None:
            to_right, down = np.subtract(change["new"], change["old"]).tolist()
            with self.together():
                for slider, degrees in ((right, to_right), (up, -down)):
                    if abs(slider.value - wanted[slider]) > slider.step / 2 + 1e-9:  # more than rounding: moved by hand
                        wanted[slider] = slider.value
                    wanted[slider] = min(max(wanted[slider] + degrees, slider.min), slider.max)
                    slider.value = slider.min + round((wanted[slider] - slider.min) / slider.step) * slider.step

        stage.observe(move, "turned")

    def _repr_mimebundle_(self, **options: object) -> dict:
        static = {"image/png": base64.b64encode(png(self.figure())).decode(), "text/plain": repr(self)}
        return static if os.environ.get(STATIC) else super()._repr_mimebundle_(**options) | static

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: run the cell to move its sliders>"


def pose_sliders(
    pitches: Sequence[float] | None, yaws: Sequence[float] | None, pose: tuple[float, float, float], prefix: str = ""
) -> list[widgets.FloatSlider]:
    """Sliders for pitch, yaw and roll in degrees.

    Args:
        pitches, yaws: the poses there are, evenly spaced; None for any.
        pose: where they stand at first.
    """
    grids = {"pitch": pitches or range(-40, 41), "yaw": yaws or range(-90, 91), "roll": range(-30, 31)}
    return [
        widgets.FloatSlider(
            value,
            min=grid[0],
            max=grid[-1],
            step=grid[1] - grid[0] if len(grid) > 1 else 1,
            description=f"{prefix}{name} (°)",
            readout_format=".0f",
            **LOOK,
        )
        for (name, grid), value in zip(grids.items(), pose, strict=True)
    ]


def pose_text(pitch: float, yaw: float, roll: float) -> str:
    """Of a pose in degrees."""
    return f"pitch {pitch:.0f}°, yaw {yaw:.0f}°, roll {roll:.0f}°"


class LiveFigure:
    """A matplotlib figure that is redrawn within milliseconds: what does not move is kept as pixels.

    Args:
        moving: artists whose data will change, of one figure, which is complete: its layout stays as it is now. The
            later ones lie on top. Images must fill their axes; they are copied cell by cell, which is ten times faster
            than drawing them.
    """

    def __init__(self, moving: Sequence[Artist]) -> None:
        fig = moving[0].get_figure(root=True)
        assert fig is not None  # artists of a figure
        self.fig = fig
        self.images = [artist for artist in moving if isinstance(artist, AxesImage)]
        self.others = [artist for artist in moving if not isinstance(artist, AxesImage)]
        self.canvas = FigureCanvasAgg(fig)
        for _ in range(2):  # the layout leaves room for what moves; axes of equal aspect settle in the second drawing
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
        picture = Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3])
        for image in self.images:
            left, top, right, bottom = np.multiply(self.box(image.axes), picture.size * 2).round().astype(int)
            values = np.asarray(image.get_array())
            colours = (
                image.to_rgba(values, bytes=True)[..., :3] if values.ndim == 2 else (values * 255).astype(np.uint8)
            )
            cells = Image.fromarray(colours)
            picture.paste(cells.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
        return png(picture)

    def box(self, ax: Axes) -> list[float]:
        """Where axes lie in the picture: [left, top, right, bottom] in 0..1 from the top left corner."""
        bounds = ax.get_position()
        return [bounds.x0, 1 - bounds.y1, bounds.x1, 1 - bounds.y0]

    def grid(self, image: AxesImage, texts: list[str]) -> dict:
        """An entry of `Stage.grids` for an image, with the texts of its cells row by row."""
        rows, columns = np.asarray(image.get_array()).shape[:2]
        return {"box": self.box(image.axes), "rows": rows, "columns": columns, "texts": texts}


def png(picture: Image.Image | Figure) -> bytes:
    """A figure at its own resolution, or a picture, which is encoded quickly rather than tightly."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        FigureCanvasAgg(picture).print_png(buffer)
    else:
        picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
