"""The explorers without a browser: what they compute, draw, refuse, and leave for readers without a kernel."""

import base64
import io
import re
import threading
import time
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import CONFIG, people, run, sets
from IPython.display import display
from IPython.utils.capture import capture_output
from PIL import Image

from viewdiff_nb import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.faces import load_face_views, split_by_person
from viewdiff_nb.faces.turntable import RecordedPeople, load_turntable
from viewdiff_nb.files import HEADS
from viewdiff_nb.metrics import similarity_scores
from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.modules.transformer import MEMORY_TOKENS
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.training.result import TrainingDiverged
from viewdiff_nb.widgets import AttentionExplorer, PoseExplorer, TrainingMonitor, VoxelExplorer
from viewdiff_nb.widgets.explorer import STATIC, Stage, figure_png
from viewdiff_nb.widgets.pose import search


@pytest.fixture(scope="module")
def gallery():
    return split_by_person(load_face_views(HEADS), val=200, test=300).test


@pytest.fixture(scope="module")
def model():
    """Random weights that do something: an untrained model predicts its input."""
    torch.manual_seed(1)
    model = EnhancedTransformerDecoderOnly3D(
        d_model=64, nhead=4, num_layers=2, dim_feedforward=64, feature_dim=512, voxel_resolution=8
    )
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model


def pixels(stage: Stage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(stage.picture)).convert("RGB")).astype(int)


def numbers(explorer: PoseExplorer) -> list[str]:
    return re.findall(r"<td[^>]*>([^<]*)</td>", explorer.readout.value)


def test_a_search_agrees_with_the_metrics(gallery, model):
    row, own = load_turntable().row(3), gallery.names.index(load_turntable().names[3])
    found = search(model, row, gallery.front, own)
    assert found.own.shape == (2, 37)
    model.eval()
    with torch.no_grad():
        predicted = model(row.src, row.angles, row.keypoints_3d, return_residual=False)
    for i, embeddings in enumerate((row.src, predicted)):
        scores = similarity_scores(embeddings, gallery.front, torch.full((37,), own))
        np.testing.assert_allclose(found.own[i], scores.genuine, atol=1e-6)
        np.testing.assert_array_equal(found.place[i], scores.place)
        assert (found.other[i] != own).all()
        cosine = torch.cosine_similarity(embeddings[:, None], gallery.front[found.other[i]][:, None], dim=-1)
        np.testing.assert_allclose(found.best[i], cosine[:, 0], atol=1e-6)


def test_names_are_text_and_no_markup():
    """A face set may come from anybody, and a notebook runs what its HTML says."""
    trap = "<img src=x onerror=alert(1)> & 李雷"
    faces = people(2, width=64)
    faces = replace(faces, names=(faces.names[0], trap))
    explorer = PoseExplorer(RawEmbedding(), faces, RecordedPeople(faces), person=faces.names[0])
    cells = ElementTree.fromstring(explorer.readout.value.replace("class=vd-right", "").replace("class=vd-wrong", ""))
    assert not list(cells.iter("img")) and [cell.text for cell in cells.iter("td")][3].endswith(f", {trap}")


def test_names_are_no_formulas():
    """Two dollar signs would make matplotlib read what is between them."""
    faces = replace(people(2, width=64), names=(r"$\frac$", r"$x_{$"))
    figure_png(PoseExplorer(RawEmbedding(), faces, RecordedPeople(faces)).figure())
    model = build_model(replace(CONFIG, d_model=32, nhead=4, num_layers=1), 64)
    figure_png(AttentionExplorer(model, people=RecordedPeople(faces)).figure())


def test_the_pose_explorer_shows_the_pose_it_says(gallery, model):
    explorer, turntable = PoseExplorer(model, gallery, yaw=60), load_turntable()
    assert explorer.pose == (0.0, 60.0, 0.0)
    explorer.set(yaw=-45, pitch=10, roll=12, person=turntable.names[2])
    assert explorer.pose == (10.0, -45.0, 12.0)
    np.testing.assert_array_equal(pixels(explorer.head), np.asarray(turntable.picture(2, 10, -45, 12)))
    np.testing.assert_array_equal(pixels(explorer.side), np.asarray(turntable.crop(2, 10, -45, 12)))
    assert explorer.head.label == "the head at pitch 10°, yaw -45°, roll 12°"
    own = gallery.names.index(turntable.names[2])
    cosine = torch.cosine_similarity(turntable.row(2, 10).src[turntable.closest(2, 10, -45)], gallery.front)
    assert numbers(explorer)[1] == f"{cosine[own]:.3f}"
    assert numbers(explorer)[2].startswith(f"{int((cosine >= cosine[own]).sum())} (")


def test_values_set_together_make_one_picture(gallery, model):
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


def test_dragging_moves_sliders_by_whole_steps_and_forgets_nothing(gallery, model):
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


def test_recorded_people_are_shown_by_their_keypoints(model):
    faces = people(30, views=6, width=512)
    explorer = PoseExplorer(model, faces)
    assert isinstance(explorer.people, RecordedPeople)
    before = explorer.head.picture
    explorer.yaw.value = -80.0
    assert abs(explorer.pose[1] + 85) < 1 and explorer.head.picture != before
    assert len(explorer.figure().get_axes()) == 3


def test_people_outside_the_gallery_are_refused(model):
    with pytest.raises(ValueError, match="6 people are not in the gallery, e.g. 'person_0040'"):
        PoseExplorer(model, people(30, width=512), load_turntable())  # which has person_0000 .. person_0029


def test_people_of_the_same_names_are_not_taken_for_those_of_the_turntable(gallery, model):
    assert PoseExplorer(model, gallery).people.pitches
    strangers = replace(gallery, front=gallery.front.roll(1, 0), person=(gallery.person + 1) % len(gallery.names))
    assert isinstance(PoseExplorer(model, strangers).people, RecordedPeople)
    with pytest.raises(ValueError, match="the gallery's embeddings have 32 numbers, those of the people 512"):
        PoseExplorer(model, people(30), load_turntable())


def test_raw_embeddings_are_not_changed_by_a_model_that_returns_them(gallery):
    explorer = PoseExplorer(RawEmbedding(), gallery)
    cells = numbers(explorer)
    assert cells[1:4] == cells[5:8]


def test_voxels_of_every_quantity(model):
    explorer = VoxelExplorer(model, resolution=8)
    volume = explorer.volume()
    for quantity in explorer.quantity.options:
        explorer.quantity.value = quantity
        values, cut = explorer.values()
        assert cut.shape == (8, 8, 8) and values.shape[:3] == (8, 8, 8)
    explorer.quantity.value = explorer.SHARES[2]
    np.testing.assert_array_equal(explorer.values()[0], volume.shares[0, 2])
    explorer.quantity.value = explorer.OCCUPANCY  # at yaw 0 it is not turned
    np.testing.assert_allclose(explorer.values()[0], volume.occupancy[0].amax(0), atol=1e-5)


def test_threshold_and_cut_take_voxels_away(model):
    explorer = VoxelExplorer(model, resolution=8)
    explorer.set(quantity=explorer.DENSITY, threshold=0, cut=False)
    assert explorer._scene()["shown"].all()
    explorer.set(threshold=1)
    density = explorer.volume().density[0, 0].numpy()
    assert explorer._scene()["shown"].sum() == (density == density.max()).sum()
    explorer.set(threshold=0, cut=True, plane="depth", layer=4)
    shown = explorer._scene()["shown"]
    assert shown[3:].all() and not shown[:3].any()  # layers 1 to 3 lie in front of the slice
    explorer.set(plane="width")
    shown = explorer._scene()["shown"]
    assert shown[:, :, :4].all() and not shown[:, :, 4:].any()


def test_the_resolution_is_that_of_the_grid_and_the_model_keeps_its_own(model):
    explorer = VoxelExplorer(model)
    for resolution in (32, 4, 16):
        explorer.resolution.value = resolution
        assert explorer.volume().density.shape[2:] == (resolution,) * 3
        assert explorer.layer.max == resolution and explorer.layer.value == resolution // 2
        assert len(explorer.pictures.grids[0]["texts"]) == resolution**2
    assert model.projection.voxel_resolution == 8


def test_looking_from_elsewhere_leaves_the_grid(model):
    explorer = VoxelExplorer(model)
    grid, slices = explorer.cubes.picture, explorer.pictures.picture
    explorer.cubes.turned = [40.0, 0.0]
    assert explorer.cubes.picture != grid and explorer.pictures.picture == slices


def test_a_model_without_a_projection_has_no_voxels():
    bare = EnhancedTransformerDecoderOnly3D(d_model=32, nhead=4, num_layers=1, use_projection_layer=False)
    with pytest.raises(ValueError, match="no projection layer; build it with use_projection_layer=True"):
        VoxelExplorer(bare)


def test_attention_is_the_models_and_its_cells_say_so(model):
    explorer, turntable = AttentionExplorer(model, yaws=(0, 75)), load_turntable()
    a, b, difference = explorer.weights()
    row = turntable.row(0).where(torch.tensor([turntable.closest(0, 0, 75)]))
    with torch.no_grad():
        _, weights = model.eval()(row.src, row.angles, row.keypoints_3d, return_attention=True)
    np.testing.assert_allclose(b[1], weights[0, 1, :, 0], atol=1e-6)
    np.testing.assert_allclose(difference[0], b[0] - a[0], atol=1e-7)
    np.testing.assert_allclose([w.sum(-1) for w in (*a, *b)], 1, atol=1e-5)
    assert [len(grid["texts"]) for grid in explorer.maps.grids] == [4 * 7] * 6
    nose = 1 + MEMORY_TOKENS.index("nose")
    assert explorer.maps.grids[3]["texts"][2 * 7 + nose] == f"layer 2, head 3 → nose: {b[1][2, nose]:.3f}"


def test_other_views_are_tokens_of_cross_view_attention(gallery):
    torch.manual_seed(0)
    model = EnhancedTransformerDecoderOnly3D(
        d_model=32,
        nhead=4,
        num_layers=1,
        dim_feedforward=32,
        feature_dim=512,
        use_cross_view=True,
        n_views=3,
        use_projection_layer=False,
    )
    explorer = AttentionExplorer(model)
    a, _, _ = explorer.weights()
    assert [w.shape for w in a] == [(4, 7), (4, 3)]
    np.testing.assert_allclose(a[1].sum(-1), 1, atol=1e-5)
    assert explorer.maps.grids[1]["texts"][1].startswith("across views, after layer 0, head 1 → view 2: ")
    assert not model.cross_view["0"]._forward_pre_hooks


def test_models_are_left_in_the_mode_they_were_in(gallery, model):
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
def test_a_picture_lies_beside_the_widget(make, model, gallery, monkeypatch):
    """Live for who has a kernel, a PNG for who has none; the picture alone where notebooks are published."""
    explorer = make(model, gallery)
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"}
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert picture.size[0] > 600 and np.asarray(picture.convert("L")).std() > 5
    monkeypatch.setenv(STATIC, "1")
    assert set(explorer._repr_mimebundle_()) == {"text/plain", "image/png"}


def test_a_monitored_run_is_the_run(tmp_path):
    """Without CUDA graphs, which nobody could record here, or beside other threads that use the GPU."""
    monitor = TrainingMonitor(replace(CONFIG, use_cuda_graph=True), *sets())
    empty = monitor.curves.picture
    result = monitor.start().wait()
    assert result.stopped == "finished" and monitor.curves.picture != empty
    assert monitor.progress.value == CONFIG.epochs and "finished" in monitor.status.value
    for mine, theirs in zip(result.model.parameters(), run().model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_monitored_run_and_the_cells_beside_it_draw_nothing_of_each_other():
    """The model's start and its dropout are random, and so is what a cell draws meanwhile."""
    config, ended = replace(CONFIG, dropout=0.3, epochs=6), threading.Event()

    def hammer():
        while not ended.is_set():
            torch.rand(100)

    torch.manual_seed(0)
    wanted, state = torch.rand(3), torch.get_rng_state()
    alone = TrainingMonitor(config, *sets()).start().wait()
    assert torch.equal(torch.get_rng_state(), state)
    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        disturbed = TrainingMonitor(config, *sets()).start().wait()
    finally:
        ended.set()
        thread.join()
    for mine, theirs in zip(alone.model.parameters(), disturbed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    beside = TrainingMonitor(replace(config, epochs=1000, val_every=1000), *sets()).start()
    for _ in range(50):
        torch.manual_seed(0)
        time.sleep(0.01)
        assert torch.equal(torch.rand(3), wanted)
    beside.stop()
    assert beside.wait().steps > 0


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    config = replace(CONFIG, epochs=40, save_dir=str(tmp_path), save_every=100, val_every=20)
    whole = run(replace(config, save_dir=str(tmp_path / "whole")))
    monitor = TrainingMonitor(config, *sets()).start()
    end = time.monotonic() + 60
    while monitor.progress.value < 2 and time.monotonic() < end:
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="still going on"):
        monitor.start()
    monitor.stop()
    result = monitor.wait()
    assert result.stopped == "interrupted" and monitor.start_button.description == "Go on"
    assert 2 <= monitor.progress.value < 40
    result = monitor.start().wait()
    assert result.stopped == "finished" and result.steps == whole.steps
    for mine, theirs in zip(result.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_stop_in_the_last_epoch_comes_too_late(tmp_path):
    config = replace(CONFIG, save_dir=str(tmp_path))
    monitor = TrainingMonitor(config, *sets())
    show = monitor.show

    def stop_at_the_end(history):
        show(history)
        if history["epoch"].iloc[-1] == config.epochs:
            monitor.stop()

    monitor.show = stop_at_the_end
    assert monitor.start().wait().stopped == "finished" and monitor.start_button.description == "Start"


def test_a_monitor_shows_a_run_that_was_started_elsewhere():
    monitor = TrainingMonitor(CONFIG, *sets())
    monitor.stop()  # there is nothing to stop
    assert monitor.status.value == "not started"
    run(on_epoch=monitor.show)
    assert monitor.status.value == f"epoch {CONFIG.epochs} of {CONFIG.epochs}"
    assert monitor.progress.value == CONFIG.epochs


def test_what_ends_a_run_is_shown_and_raised():
    monitor = TrainingMonitor(replace(CONFIG, lr=1e6, clip_norm=1e6), *sets()).start()
    with pytest.raises(TrainingDiverged):
        monitor.wait()
    assert "TrainingDiverged" in monitor.status.value and not monitor.start_button.disabled


def test_nothing_to_go_on_from_is_said_before_work_is_lost():
    monitor = TrainingMonitor(replace(CONFIG, epochs=10_000, val_every=10_000), *sets())
    with pytest.raises(RuntimeError, match="not started"):
        monitor.wait()
    monitor.start().stop()
    monitor.wait()
    with pytest.raises(RuntimeError, match="give TrainConfig a save_dir"):
        monitor.start()


def test_display_needs_no_front_end(gallery, model):
    with capture_output():
        display(PoseExplorer(model, gallery))
