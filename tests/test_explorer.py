"""What the explorers share: controls, dragging, live figures, and what is left for readers without a kernel."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from conftest import CONFIG, people, sets
from explorers import load_gallery, make_model, pixels
from IPython.display import display
from IPython.utils.capture import capture_output
from matplotlib.figure import Figure
from PIL import Image

from viewdiff_nb.faces.turntable import RecordedPeople
from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.widgets import AttentionExplorer, PoseExplorer, TrainingMonitor, VoxelExplorer
from viewdiff_nb.widgets.explorer import STATIC, LiveFigure, png


def test_values_set_together_make_one_picture():
    gallery, model = load_gallery(), make_model()
    explorer, drawn = PoseExplorer(model, gallery), []
    explorer.head.observe(lambda change: drawn.append(change), "picture")
    explorer.set(yaw=10, pitch=-20, roll=5)
    assert len(drawn) == 1
    with pytest.raises(AttributeError, match="no control named 'jaw'"):
        explorer.set(jaw=3)
    voxels, drawn = VoxelExplorer(model), []
    voxels.pictures.observe(lambda change: drawn.append(change), "picture")
    voxels.set(layer=3, yaw=-30, resolution=16)
    assert len(drawn) == 1 and (voxels.layer.value, voxels.layer.max) == (3, 16)


def test_dragging_moves_sliders_by_whole_steps_and_forgets_nothing():
    gallery, model = load_gallery(), make_model()
    explorer = PoseExplorer(model, gallery, yaw=0)
    for x in (2.0, 4.0, 6.0, 8.0):  # each less than half a step of 5 degrees
        explorer.head.turned = [x, 0.0]
    assert explorer.yaw.value == 10  # 8 degrees are closest to it
    explorer.head.turned = [8.0, 12.0]
    assert explorer.pitch.value == -10  # down
    explorer.head.turned = [500.0, 12.0]
    assert explorer.yaw.value == 90
    explorer.yaw.value = 85.0  # by hand, a single step
    explorer.head.turned = [500.0, 11.0]
    assert explorer.yaw.value == 85
    explorer.yaw.value = -30.0
    explorer.head.turned = [505.0, 11.0]
    assert explorer.yaw.value == -25


def test_names_are_no_formulas():
    """Two dollar signs would make matplotlib read what is between them."""
    faces = replace(people(2, width=64), names=(r"$\frac$", r"$x_{$"))
    png(PoseExplorer(RawEmbedding(), faces, RecordedPeople(faces)).figure())
    model = build_model(replace(CONFIG, d_model=32, nhead=4, num_layers=1), 64)
    png(AttentionExplorer(model, people=RecordedPeople(faces)).figure())


def test_models_are_left_in_the_mode_they_were_in():
    gallery, model = load_gallery(), make_model()
    model.train()
    PoseExplorer(model, gallery), VoxelExplorer(model), AttentionExplorer(model)
    assert model.training


@pytest.mark.parametrize(
    "make",
    [
        lambda model, gallery: PoseExplorer(model, gallery),
        lambda model, gallery: VoxelExplorer(model),
        lambda model, gallery: AttentionExplorer(model),
        lambda model, gallery: TrainingMonitor(CONFIG, *sets()),
    ],
)
def test_a_picture_lies_beside_the_widget(make, monkeypatch):
    """Live for who has a kernel, a PNG for who has none; the picture alone where notebooks are published."""
    gallery, model = load_gallery(), make_model()
    explorer = make(model, gallery)
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"}
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert picture.size[0] > 600 and np.asarray(picture.convert("L")).std() > 5
    monkeypatch.setenv(STATIC, "1")
    assert set(explorer._repr_mimebundle_()) == {"text/plain", "image/png"}


def test_display_needs_no_front_end():
    gallery, model = load_gallery(), make_model()
    with capture_output():
        display(PoseExplorer(model, gallery))


def line_figure(values) -> tuple[Figure, list]:
    fig = Figure((4, 3), 100, layout="constrained")
    ax = fig.subplots()
    lines = ax.plot(values)
    ax.set(ylim=(0, 10), title="title")
    return fig, lines


def test_a_redrawn_picture_is_that_of_a_figure_drawn_whole():
    _, [line] = line_figure([1, 2, 3])
    live = LiveFigure([line])
    for values in ([9, 1, 5], [2, 8, 2]):
        line.set_ydata(values)
        whole = pixels(png(line_figure(values)[0]))
        inside = (slice(40, -40), slice(40, -10))  # the frame's own lines lie above a moving one, here below it
        difference = np.abs(pixels(live.png()) - whole)[inside]
        assert (difference > 30).mean() < 0.001


def test_the_box_of_axes_is_where_their_frame_is_drawn():
    fig, [line] = line_figure([1, 2, 3])
    live = LiveFigure([line])
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
        _, moving = figure(np.zeros(shape))
        live, values = LiveFigure(moving), rng.random(shape) * (9 if len(shape) == 2 else 1)
        moving[0].set_data(values)
        whole = pixels(png(figure(values)[0]))
        assert (np.abs(pixels(live.png()) - whole) > 8).any(-1).mean() < 0.02  # edges may round to the next pixel
