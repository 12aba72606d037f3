"""The explorers in a real JupyterLab and Notebook 7, by keyboard and by mouse: the right picture must change."""

import re

import numpy as np
import pytest
import torch
from lab import (
    Lab,
    choose,
    handle,
    menu,
    pixels,
    stage,
    wait_for_picture,
    write_notebook,
)
from playwright.sync_api import expect

from viewdiff_nb.faces.turntable import load_turntable

SETUP = """
import torch
from viewdiff_nb import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.faces import load_face_views, split_by_person
from viewdiff_nb.files import HEADS
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.widgets import AttentionExplorer, PoseExplorer, TrainingMonitor, VoxelExplorer
torch.manual_seed(0)
torch.set_num_threads(1)
split = split_by_person(load_face_views(HEADS), val=200, test=300)
model = EnhancedTransformerDecoderOnly3D(num_layers=2, rank=8, voxel_resolution=16, feature_dim=split.test.feature_dim)
"""
MONITOR = """
config = TrainConfig(d_model=32, nhead=4, num_layers=1, dim_feedforward=32, epochs=60, save_dir="kept", patience=60,
                     batch_size=64, device="cpu", val_every=20)
TrainingMonitor(config, split.train.select(torch.arange(40)), split.val.select(torch.arange(30)))
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("notebooks")
    write_notebook(root / "pose.ipynb", SETUP, "PoseExplorer(model, split.test)")
    write_notebook(root / "voxel.ipynb", SETUP, "VoxelExplorer(model)")
    write_notebook(root / "attention.ipynb", SETUP, "AttentionExplorer(model)")
    write_notebook(root / "monitor.ipynb", SETUP, MONITOR)
    lab = Lab(root, tmp_path_factory.mktemp("config"), {})
    yield lab
    lab.close()


@pytest.fixture
def pose(lab, page):
    """The pose explorer, run, and its page."""
    lab.open(page, "pose.ipynb")
    lab.run_all(page)
    stage(page, "the head").wait_for()
    return page


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two pictures."""
    return float(np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1])


def rendered(pitch: float, yaw: float, roll: float = 0.0) -> np.ndarray:
    return np.asarray(load_turntable().picture(0, pitch, yaw, roll))


def is_pose(pitch: float, yaw: float, roll: float = 0.0):
    return lambda shown: np.array_equal(shown, rendered(pitch, yaw, roll))


def yaw_is(page, degrees: int) -> None:
    expect(handle(page, "yaw (°)")).to_have_attribute("aria-valuenow", re.compile(rf"^{degrees}(\.0)?$"))


def test_keys_on_a_slider_turn_the_head_that_way(pose):
    head, yaw = stage(pose, "the head"), handle(pose, "yaw (°)")
    wait_for_picture(head, is_pose(0, 60))
    yaw.press("ArrowRight")
    right = wait_for_picture(head, is_pose(0, 65))
    for _ in range(26):
        yaw.press("ArrowLeft")
    left = wait_for_picture(head, is_pose(0, -65))
    # the same head turned the other way is nearly its mirror image, and not itself
    assert likeness(right[:, ::-1], left) > 0.8 > likeness(right, left) + 0.2
    pitch = handle(pose, "pitch (°)")
    pitch.press("ArrowRight")
    wait_for_picture(head, is_pose(10, -65))
    expect(stage(pose, "the head").locator("img")).to_have_attribute("alt", "the head at pitch 10°, yaw -65°, roll 0°")


def test_a_flood_of_keys_ends_at_the_last_one(pose):
    yaw = handle(pose, "yaw (°)")
    yaw.focus()
    for _ in range(40):  # without waiting: faster than anybody can press
        pose.keyboard.down("ArrowLeft")
    pose.keyboard.up("ArrowLeft")
    yaw_is(pose, -90)
    wait_for_picture(stage(pose, "the head"), is_pose(0, -90))


def test_dragging_the_head_turns_it(pose):
    head = stage(pose, "the head")
    box = head.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    pose.mouse.move(x, y)
    pose.mouse.down()
    for step in range(1, 21):
        pose.mouse.move(x - 9 * step, y + 2 * step)  # 180 pixels to the left, 40 down: -90 and -20 degrees
    pose.mouse.up()
    wait_for_picture(head, is_pose(-20, -30))
    yaw_is(pose, -30)
    head.press("ArrowRight")
    wait_for_picture(head, is_pose(-20, -25))
    head.press("ArrowUp")
    wait_for_picture(head, is_pose(-10, -25))


def test_the_readout_says_what_the_model_makes_of_the_view(pose):
    """The same numbers, from the same (untrained) model, computed here."""
    turntable = load_turntable()
    handle(pose, "yaw (°)").press("ArrowRight")
    wait_for_picture(stage(pose, "the head"), is_pose(0, 65))
    from viewdiff_nb.faces import load_face_views, split_by_person
    from viewdiff_nb.files import HEADS

    test = split_by_person(load_face_views(HEADS), val=200, test=300).test
    own = test.names.index(turntable.names[0])
    src = turntable.features[0, turntable.pitches.index(0), turntable.yaws.index(65)]
    cosine = torch.cosine_similarity(src, test.front)
    row = pose.locator(".vd-readout tr").nth(1)
    expect(row).to_contain_text(f"{cosine[own]:.3f}")
    expect(row).to_contain_text(f"{int((cosine > cosine[own]).sum()) + 1} (")
    before = pixels(stage(pose, "cosine"))
    choose(pose, "person", turntable.names[3])
    wait_for_picture(stage(pose, "cosine"), lambda shown: not np.array_equal(shown, before))


def test_keypoints_can_be_shown(pose):
    head = stage(pose, "the head")
    plain = wait_for_picture(head, is_pose(0, 60))
    pose.locator('.widget-checkbox:has-text("keypoints") input').press("Space")
    marked = wait_for_picture(head, lambda shown: not np.array_equal(shown, plain))
    changed = np.argwhere((marked != plain).any(-1))[:, ::-1]
    points = load_turntable().picture_keypoints(0, 0, 60)
    away = np.linalg.norm(changed[:, None] - points, axis=-1)
    assert away.min(1).max() < 6 and away.min(0).max() < 3  # only there, and at each


def test_a_dead_kernel_is_said(pose):
    gone = pose.locator(".vd-gone").first
    expect(gone).to_be_hidden()
    menu(pose, "Kernel", "kernelmenu:restart")
    pose.click('.jp-Dialog button:has-text("Restart")')
    expect(gone).to_be_visible(timeout=20_000)
    expect(gone).to_have_text("The kernel is gone: run this cell again.")


def test_a_page_that_is_loaded_again_shows_the_explorer_where_it_was(pose):
    handle(pose, "yaw (°)").press("ArrowRight")
    wait_for_picture(stage(pose, "the head"), is_pose(0, 65))
    menu(pose, "File", "docmanager:save")
    expect(pose.locator(".jp-mod-dirty")).to_have_count(0)
    pose.reload()
    head = stage(pose, "the head")
    head.wait_for(timeout=60_000)
    wait_for_picture(head, is_pose(0, 65))
    handle(pose, "yaw (°)").press("ArrowLeft")
    wait_for_picture(head, is_pose(0, 60))


CONTROLS = {  # what a screen reader is told of, in the order of the tab key
    "pose": ["person", "yaw (°)", "pitch (°)", "roll (°)", "keypoints", "the head at pitch 0°, yaw 60°, roll 0°"],
    "attention": [
        *("person", "A: yaw (°)", "A: pitch (°)", "A: roll (°)", "pose A: pitch 0°, yaw 0°, roll 0°"),
        *("B: yaw (°)", "B: pitch (°)", "B: roll (°)", "pose B: pitch 0°, yaw 75°, roll 0°"),
    ],
    "voxel": [
        *("person", "source yaw (°)", "target yaw (°)", "target pitch (°)", "target roll (°)", "voxels per edge"),
        *("quantity", "threshold (0–1)", "slice across", "slice (number)", "cut open at the slice", "the voxel grid"),
    ],
}
FOCUSED = """() => { const e = document.activeElement;
    return e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.closest('label')?.innerText || e.tagName }"""


@pytest.mark.parametrize("name", CONTROLS)
def test_everything_has_a_name_and_is_reached_by_the_tab_key(lab, page, name):
    lab.open(page, f"{name}.ipynb")
    lab.run_all(page)
    explorer = page.locator(".vd-explorer")
    expect(explorer.locator(".noUi-handle").last).to_have_attribute("aria-label", re.compile("."))
    told = explorer.aria_snapshot()
    assert re.findall(r"- (?:slider|img|combobox|checkbox|textbox|application)(?! \")", told) == [], told
    explorer.locator("select").first.focus()
    reached = [page.evaluate(FOCUSED).strip()]
    while len(reached) < 40 and not reached[-1].startswith(CONTROLS[name][-1]):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED).strip())
    reached = [label for label in reached if not label.endswith(", the number")]
    for label, expected in zip(reached, CONTROLS[name], strict=True):
        assert label.startswith(expected), reached


def test_a_screen_reader_is_told_what_changed(pose):
    expect(pose.locator(".vd-readout")).to_have_attribute("aria-live", "polite")
    curves = stage(pose, "cosine").locator("img")
    before = curves.get_attribute("alt")
    handle(pose, "yaw (°)").press("ArrowRight")
    expect(curves).not_to_have_attribute("alt", before)
    expect(stage(pose, "the head").locator("img")).to_have_attribute("alt", re.compile("yaw 65°"))


def test_notebook_7(lab, page):
    lab.open(page, "pose.ipynb", "notebook")
    lab.run_all(page)
    yaw = handle(page, "yaw (°)")
    wait_for_picture(stage(page, "the head"), is_pose(0, 60))
    yaw.press("ArrowLeft")
    wait_for_picture(stage(page, "the head"), is_pose(0, 55))


def ink(picture: np.ndarray) -> int:
    """Pixels that are neither paper nor grey lines and letters: those of the cubes."""
    return int((np.ptp(picture.astype(int), axis=-1) > 25).sum())


def test_voxels_follow_threshold_resolution_and_camera(lab, page):
    lab.open(page, "voxel.ipynb")
    lab.run_all(page)
    grid, threshold = stage(page, "the voxel grid"), handle(page, "threshold (0–1)")
    choose(page, "quantity", "occupancy, what goes in")
    first = wait_for_picture(grid, lambda shown: 0 < ink(shown) < 90_000)
    for _ in range(6):
        threshold.press("ArrowRight")
    higher = wait_for_picture(grid, lambda shown: ink(shown) < 0.7 * ink(first))
    for _ in range(6):
        threshold.press("ArrowLeft")
    wait_for_picture(grid, lambda shown: np.array_equal(shown, first))
    assert ink(higher) > 0
    sliced = pixels(stage(page, "a slice"))
    choose(page, "voxels per edge", "32³")
    finer = wait_for_picture(grid, lambda shown: not np.array_equal(shown, first))
    assert 0.7 < ink(finer) / ink(first) < 1.3  # the same blobs in smaller cubes
    before = wait_for_picture(stage(page, "a slice"), lambda shown: not np.array_equal(shown, sliced))
    grid.press("ArrowRight")
    wait_for_picture(grid, lambda shown: not np.array_equal(shown, finer))
    assert np.array_equal(pixels(stage(page, "a slice")), before)  # looking from elsewhere changes nothing else
    handle(page, "target yaw (°)").press("ArrowRight")
    wait_for_picture(stage(page, "a slice"), lambda shown: not np.array_equal(shown, before))


def test_attention_of_one_pose_changes_its_row_alone(lab, page):
    lab.open(page, "attention.ipynb")
    lab.run_all(page)
    maps = stage(page, "attention weights")
    first = pixels(maps)
    handle(page, "B: yaw (°)").press("ArrowRight")
    second = wait_for_picture(maps, lambda shown: not np.array_equal(shown, first))
    changed = np.flatnonzero((first != second).any((1, 2)))
    assert changed.min() > 0.3 * len(first) and changed.max() > 0.7 * len(first)  # rows B and B - A, not A
    box = maps.bounding_box()
    page.mouse.move(box["x"] + 0.15 * box["width"], box["y"] + 0.15 * box["height"])
    tip = maps.locator(".vd-tip")
    expect(tip).to_have_text(re.compile(r"^layer 1, head \d → \w+( \w+)?: 0\.\d{3}$"))


def test_a_training_run_can_be_watched_stopped_and_continued(lab, page):
    lab.open(page, "monitor.ipynb")
    lab.run_all(page)
    curves = stage(page, "loss")
    empty = pixels(curves)
    page.click('button:has-text("Start")')
    wait_for_picture(curves, lambda shown: not np.array_equal(shown, empty), timeout=60)
    page.click('button:has-text("Stop")')
    expect(page.locator("text=/interrupted after \\d+ steps/")).to_be_visible(timeout=60_000)
    page.click('button:has-text("Go on")')
    expect(page.locator("text=/finished after \\d+ steps/")).to_be_visible(timeout=240_000)
    assert (lab.root / "kept").is_dir()
