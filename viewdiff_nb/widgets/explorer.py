"""What the explorers share: controls that redraw, dragging that moves sliders, and a static picture."""

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ipywidgets as widgets
from matplotlib.figure import Figure

from .live_figure import figure_png
from .stage import Stage

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
    return widgets.FloatSlider(value, min=low, max=high, step=step, description=name, readout_format=form,
                               layout=SLIDER, style=STYLE)  # fmt: skip


def side_by_side(*parts: widgets.Widget) -> widgets.HBox:
    """In a row, or below each other where the page is narrow."""
    return widgets.HBox(parts, layout=widgets.Layout(flex_flow="row wrap"))


def choice(name: str, options, value=None) -> widgets.Dropdown:
    """A list to choose from; the first by default."""
    value = value if value is not None else widgets.Dropdown(options=options).value
    return widgets.Dropdown(options=options, value=value, description=name, layout=SLIDER, style=STYLE)


def pose_sliders(pitches: tuple[float, ...] | None, yaws: tuple[float, ...] | None, pose: tuple[float, float, float],
                 prefix: str = "") -> tuple[widgets.FloatSlider, ...]:  # fmt: skip
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


def drag_moves(stage: Stage, right: widgets.FloatSlider, down: widgets.FloatSlider, explorer: Explorer,
               down_sign: float = -1.0) -> None:  # fmt: skip
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
