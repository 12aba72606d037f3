"""From a key press to the changed picture, in a real JupyterLab and a headless Chromium.

    python benchmarks/latency.py [--presses 40] [--threads 1]

Needs the extra test, and a Chromium. Beside each explorer stands what a kernel round trip alone takes in the same page:
a slider whose value the kernel writes into a text.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "browser"))
from lab import Lab, handle, launch, write_notebook
from playwright.sync_api import Page, sync_playwright

from viewdiff_nb.studies.benchmark import machine

SETUP = """
import torch
torch.set_num_threads({threads})
import ipywidgets as widgets
from viewdiff_nb import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.faces import load_face_views, split_by_person
from viewdiff_nb.files import HEADS
from viewdiff_nb.pretrained import load_pretrained
from viewdiff_nb.widgets import AttentionExplorer, PoseExplorer, VoxelExplorer
test = split_by_person(load_face_views(HEADS), val=200, test=300).test
# the guide's sizes: four layers, ten million weights
model = EnhancedTransformerDecoderOnly3D(rank=8, voxel_resolution=16, feature_dim=test.feature_dim)
torch.nn.init.normal_(model.output.weight, std=0.02)  # an untrained model predicts its input: nothing would change
shipped = load_pretrained()
slider, text = widgets.FloatSlider(0, min=-90, max=90, step=5, description="round trip"), widgets.HTML()
slider.observe(lambda change: setattr(text, "value", f"<b class=echo>{{change['new']}}</b>"), "value")
"""
CASES = (  # name, cell, slider, what changes
    ("kernel round trip alone", "widgets.VBox([slider, text])", "round trip", ".widget-html-content"),
    ("PoseExplorer, shipped, head, yaw", "PoseExplorer(shipped, test, yaw=-90)", "yaw (°)", "img[alt^='the head']"),
    ("PoseExplorer, shipped, head, roll", "PoseExplorer(shipped, test)", "roll (°)", "img[alt^='the head']"),
    ("PoseExplorer, shipped, curves, yaw", "PoseExplorer(shipped, test, yaw=-90)", "yaw (°)", "img[alt^='cosine']"),
    ("PoseExplorer, shipped, curves, roll", "PoseExplorer(shipped, test)", "roll (°)", "img[alt^='cosine']"),
    ("PoseExplorer, head, yaw", "PoseExplorer(model, test, yaw=-90)", "yaw (°)", "img[alt^='the head']"),
    ("PoseExplorer, head, roll", "PoseExplorer(model, test)", "roll (°)", "img[alt^='the head']"),
    ("PoseExplorer, curves, roll", "PoseExplorer(model, test)", "roll (°)", "img[alt^='cosine']"),
    ("AttentionExplorer, yaw of B", "AttentionExplorer(model, yaws=(0, -90))", "B: yaw (°)", "img[alt^='attention']"),
    ("VoxelExplorer, 8³, target yaw", "VoxelExplorer(model, resolution=8)", "target yaw (°)", "img[alt^='a slice']"),
    ("VoxelExplorer, 16³, target yaw", "VoxelExplorer(model)", "target yaw (°)", "img[alt^='a slice']"),
    ("VoxelExplorer, 32³, target yaw", "VoxelExplorer(model, resolution=32)", "target yaw (°)", "img[alt^='a slice']"),
    ("VoxelExplorer, 16³, threshold", "VoxelExplorer(model)", "threshold (0–1)", "img[alt^='the voxel grid']"),
)
WATCH = """selector => {
    const seen = document.querySelector(selector);
    window.took = []; let pressed = null;
    window.addEventListener('keydown', () => pressed = performance.now(), true);
    new MutationObserver(() => { if (pressed !== null) { took.push(performance.now() - pressed); pressed = null; } })
        .observe(seen, { attributes: true, attributeFilter: ['src'], childList: true, subtree: true });
}"""


def measure(lab: Lab, page: Page, notebook: str, name: str, changes: str, presses: int) -> list[float]:
    """Milliseconds of each press."""
    lab.open(page, notebook)
    lab.run_all(page)
    slider = handle(page, name)
    slider.wait_for()
    page.locator(changes).wait_for(state="attached")
    page.evaluate(WATCH, changes)
    slider.focus()
    for i in range(presses):
        page.keyboard.press("ArrowRight" if i // 8 % 2 == 0 else "ArrowLeft")
        page.wait_for_function(f"() => took.length == {i + 1}", timeout=10_000)
        page.wait_for_timeout(60)
    return page.evaluate("took")[3:]  # the first ones are warm-up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presses", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="of torch in the kernel")
    arguments = parser.parse_args()
    root, config = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    for i, (_, cell, *_) in enumerate(CASES):
        write_notebook(root / f"{i}.ipynb", SETUP.format(threads=arguments.threads), cell)
    lab = Lab(root, config, {})
    try:
        with sync_playwright() as playwright:
            browser = launch(playwright)
            print(f"{machine()}; Chromium {browser.version}; milliseconds from key press to picture")
            for i, (what, _, name, changes) in enumerate(CASES):
                page = browser.new_page(viewport={"width": 1500, "height": 1000})
                took = measure(lab, page, f"{i}.ipynb", name, changes, arguments.presses)
                deciles = statistics.quantiles(took, n=10)
                print(f"{what:36s} median {statistics.median(took):5.0f}   90 % {deciles[-1]:5.0f}", flush=True)
                page.close()
            browser.close()
    finally:
        lab.close()


if __name__ == "__main__":
    main()
