import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from viewdiff_nb.widgets.explorer import LiveFigure, figure_png


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def line_figure(values) -> tuple[Figure, list]:
    fig = Figure((4, 3), 100, layout="constrained")
    ax = fig.subplots()
    lines = ax.plot(values)
    ax.set(ylim=(0, 10), title="title")
    return fig, lines


def test_a_redrawn_picture_is_that_of_a_figure_drawn_whole():
    fig, [line] = line_figure([1, 2, 3])
    live = LiveFigure(fig, [line])
    for values in ([9, 1, 5], [2, 8, 2]):
        line.set_ydata(values)
        whole = pixels(figure_png(line_figure(values)[0]))
        inside = (slice(40, -40), slice(40, -10))  # the frame's own lines lie above a moving one, here below it
        difference = np.abs(pixels(live.png()) - whole)[inside]
        assert (difference > 30).mean() < 0.001


def test_the_box_of_axes_is_where_their_frame_is_drawn():
    fig, [line] = line_figure([1, 2, 3])
    live = LiveFigure(fig, [line])
    left, top, right, bottom = live.box(fig.axes[0])
    dark = pixels(live.png()).max(-1) < 60
    columns, rows = np.flatnonzero(dark.mean(0) > 0.5), np.flatnonzero(dark.mean(1) > 0.5)
    np.testing.assert_allclose((columns.min(), columns.max()), (400 * left, 400 * right), atol=2)
    np.testing.assert_allclose((rows.min(), rows.max()), (300 * top, 300 * bottom), atol=2)


def test_the_cells_of_an_image_are_where_matplotlib_draws_them():
    def figure(values):
        fig = Figure((4, 3), 100, layout="constrained")
        ax = fig.subplots()
        return fig, [ax.imshow(values, aspect="auto", vmin=0, vmax=9), ax.title]

    rng = np.random.default_rng(0)
    for shape in ((3, 5), (4, 4, 3)):
        fig, moving = figure(np.zeros(shape))
        live, values = LiveFigure(fig, moving), rng.random(shape) * (9 if len(shape) == 2 else 1)
        moving[0].set_data(values)
        whole = pixels(figure_png(figure(values)[0]))
        assert (np.abs(pixels(live.png()) - whole) > 8).any(-1).mean() < 0.02  # edges may round to the next pixel
