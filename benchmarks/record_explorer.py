"""Pictures of what moves: explorers of a trained model in a real JupyterLab, and TensorBoard, in a headless Chromium.

python benchmarks/record_explorer.py [FOLDER]        by default figures/; needs the extra test, and a Chromium
"""

import io
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "browser"))
import torch
from lab import Lab, handle, launch, write_notebook
from PIL import Image, ImageChops
from playwright.sync_api import Browser, Error, Page, sync_playwright

from viewdiff_nb.files import FIGURES
from viewdiff_nb.studies.adaptation import ADAPTATIONS, COMMON, FULL_PROFILE, base_model, load_split
from viewdiff_nb.studies.store import Store
from viewdiff_nb.training import train

SMALL = """
from viewdiff_nb.faces import load_face_views, split_by_person
from viewdiff_nb.files import HEADS
from viewdiff_nb.studies.adaptation import SMALL_OPTIONS
from viewdiff_nb.studies.operating_points import drop_in
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.loop import train
from viewdiff_nb.widgets import PoseExplorer
split = split_by_person(load_face_views(HEADS), val=200, test=300)
config = TrainConfig(**SMALL_OPTIONS, dropout=0.2, batch_size=128, mixup=True, epochs=8)
model = drop_in(train(config, split.train, split.val, progress=False).model, split.train, split.val)
"""
ADAPTED = """
from dataclasses import replace
from viewdiff_nb.studies.adaptation import ADAPTATIONS, COMMON, FULL_PROFILE, base_model, load_split
from viewdiff_nb.studies.store import Store
from viewdiff_nb.training.loop import train
from viewdiff_nb.widgets import AttentionExplorer, VoxelExplorer
split = load_split(FULL_PROFILE)
base, _ = base_model(Store(split), split, FULL_PROFILE, seed=0)
options = ADAPTATIONS["LoRA r=8 + 3-D projection"]
config = replace(COMMON, epochs=FULL_PROFILE.adapt_epochs, base_model_path=str(base), **options)
model = train(config, split.train, split.val, progress=False).model
"""
STEP, PAUSE = 5, 12  # degrees a frame; frames that the ends are held
GIF_WIDTH, COLOURS, FRAME_MS, MARGIN = 900, 96, 90, 12


def shot(page: Page) -> Image.Image:
    return Image.open(io.BytesIO(page.locator(".vd-explorer").screenshot())).convert("RGB")


def trimmed(frames: list[Image.Image]) -> list[Image.Image]:
    """Without the empty page on the right."""
    paper = Image.new("RGB", frames[0].size, "white")
    right = max(ImageChops.difference(frame, paper).getbbox()[2] for frame in frames)
    return [frame.crop((0, 0, min(right + MARGIN, frame.width), frame.height)) for frame in frames]


def turn(page: Page) -> list[Image.Image]:
    """Frames of a head that turns from one profile to the other by key presses."""
    slider, frames = handle(page, "yaw (°)"), []
    slider.focus()
    for _ in range(180 // STEP + 1):
        frames.append(shot(page))
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(250)
    return frames


def write_gif(frames: list[Image.Image], path: Path) -> None:
    """There and back, with one palette, so that still parts stay still."""
    height = round(frames[0].height * GIF_WIDTH / frames[0].width)
    small = [frame.resize((GIF_WIDTH, height), Image.Resampling.LANCZOS) for frame in frames]
    palette = small[len(small) // 2].quantize(COLOURS, dither=Image.Dither.NONE)
    few = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in small]
    shown = [few[0]] * PAUSE + few + [few[-1]] * PAUSE + few[::-1]
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=FRAME_MS, loop=0, optimize=True)


def tensorboard(browser: Browser, folder: Path) -> None:
    """Two short runs of the guide's model, with and without the prior, in TensorBoard."""
    logs, split = Path(tempfile.mkdtemp()), load_split(FULL_PROFILE)
    people, _ = split.train.select(torch.arange(300)), torch.manual_seed(0)
    base, _ = base_model(Store(split), split, FULL_PROFILE, seed=0)
    for name, prior in (("LoRA", False), ("LoRA_and_prior", True)):
        options = ADAPTATIONS["LoRA r=8"] | {"use_prior_preservation": prior, "log_dir": str(logs / name)}
        train(replace(COMMON, epochs=6, base_model_path=str(base), val_every=1, **options), people, split.val)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs, "--port", str(port), "--load_fast=false"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        for _ in range(100):  # until it listens
            try:
                page.goto(f"http://127.0.0.1:{port}/#timeseries")
                break
            except Error:
                time.sleep(0.3)
        page.locator("card-view").first.wait_for(timeout=60_000)
        page.wait_for_timeout(4000)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        picture.quantize(256).save(folder / "tensorboard.png", optimize=True)
    finally:
        server.terminate()


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES
    root, config = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    write_notebook(root / "pose.ipynb", SMALL, "PoseExplorer(model, split.test, yaw=-90, person='person_0103')")
    write_notebook(root / "voxels.ipynb", ADAPTED, "VoxelExplorer(model, yaw=45, resolution=16)")
    write_notebook(root / "attention.ipynb", ADAPTED, "AttentionExplorer(model, yaws=(0, 75))")
    lab = Lab(root, config, {})
    try:
        with sync_playwright() as playwright:
            browser = launch(playwright)
            tensorboard(browser, folder)
            page = browser.new_page(viewport={"width": 1700, "height": 1300})
            for name in ("pose", "voxels", "attention"):
                lab.open(page, f"{name}.ipynb")
                lab.run_all(page, timeout=600)
                page.locator(".vd-picture").first.wait_for()
                page.wait_for_timeout(1500)
                if name == "pose":
                    write_gif(trimmed(turn(page)), folder / "explorer_pose.gif")
                trimmed([shot(page)])[0].quantize(256).save(folder / f"explorer_{name}.png", optimize=True)
    finally:
        lab.close()


if __name__ == "__main__":
    main()
