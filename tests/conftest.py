import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import CHROMIUM, HOW_TO_GET

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.training.checkpoint import build_model, save_checkpoint
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.result import TrainResult


def people(count: int, views: int = 6, width: int = 32, noise: float = 0.3, first: int = 0) -> FaceViews:
    """Random people whose side views are noisy copies of their front, more so the larger the yaw."""
    generator = torch.Generator().manual_seed(first)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    front = torch.nn.functional.normalize(randn(count, width), dim=1)
    person = torch.arange(count).repeat_interleave(views)
    yaw = torch.linspace(-85, 85, views).repeat(count).deg2rad()
    angles = torch.stack((0.1 * randn(len(yaw)), yaw, 0.1 * randn(len(yaw))), 1)
    side = front[person] + noise * yaw.abs()[:, None] * randn(len(yaw), width)
    return FaceViews(
        tuple(f"person_{first + i:04d}" for i in range(count)),
        front,
        torch.nn.functional.normalize(side, dim=1),
        50 * randn(len(yaw), 5, 3),
        angles,
        person,
    )


def write_set(folder, faces: FaceViews) -> None:
    """Write a face set in the guide's six files."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {
        "front": (faces.front, torch.zeros(len(faces.front), 5, 3), torch.zeros(len(faces.front), 3), faces.names),
        "video": (faces.src, faces.keypoints_3d, faces.angles.rad2deg(), [faces.names[i] for i in faces.person]),
    }
    for kind, (features, keypoints, poses, names) in halves.items():
        np.save(folder / f"{kind}_feature.npy", features.numpy())
        np.save(folder / f"{kind}_keypoints.npy", keypoints.numpy())
        metadata = {
            "num_samples": len(features),
            "feature_dim": features.shape[1],
            "standard_info": {},
            "poses": poses.tolist(),
            "metadata": [{"person_name": name} for name in names],
        }
        (folder / f"{kind}_metadata.json").write_text(json.dumps(metadata))


NEEDS = {
    "people": "the maker of people (extra heads)",
    "browser": "a Chromium",
    "test_*_against_peft.py": "PEFT",
    "test_*_in_onnx.py": "ONNX",
    "test_*_on_clusters.py": "dask and ray",
    "test_*_in_processes.py": "minutes: training in several processes",
    "programs": "minutes: the studies of benchmarks/",
    "test_embed.py": "InsightFace",
    "test_*_with_insightface.py": "InsightFace",
    "tiny_insightface.py": "InsightFace",
}
"""Tests that need more than `make test` installs, or long; `make test-all`, which sets ALL, runs them."""

ALL = bool(os.environ.get("ALL"))
LEFT_OUT = {name: what for name, what in NEEDS.items() if not ALL or (name == "browser" and not CHROMIUM)}
collect_ignore_glob = list(LEFT_OUT)


def pytest_report_header() -> str:
    if not LEFT_OUT:
        return f"nothing is left out; browser: {CHROMIUM}"
    how = f" ({HOW_TO_GET})" if ALL else "; make test-all runs them"
    return f"left out are tests that need {', '.join(dict.fromkeys(LEFT_OUT.values()))}{how}"


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

CONFIG = TrainConfig(
    d_model=32,
    nhead=4,
    num_layers=2,
    dim_feedforward=48,
    voxel_resolution=4,
    batch_size=16,
    epochs=2,
    lr=1e-3,
    device="cpu",
)


def sets() -> tuple[FaceViews, FaceViews]:
    """Different people to train and to validate with."""
    return people(40, noise=0.6), people(30, noise=0.6, first=1000)


def run(config: TrainConfig = CONFIG, **options) -> TrainResult:
    return train(config, *sets(), progress=False, **options)


def network_that_moves(width: int) -> torch.nn.Module:
    """An untrained model adds nothing; this one of width does."""
    torch.manual_seed(0)
    network = build_model(CONFIG, width)
    torch.nn.init.normal_(network.output.weight, std=0.1)
    return network.eval()


@pytest.fixture
def base_path(tmp_path):
    """A base model of near-frontal views."""
    result = run(replace(CONFIG, max_yaw=45.0))
    save_checkpoint(tmp_path / "base.pth", {"model": result.model.state_dict()})
    return str(tmp_path / "base.pth")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def signals_heeded():
    """As at a terminal; where tests run in the background, or under nohup, some signals are ignored."""
    handlers = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    numbers = {name: getattr(signal, name) for name in handlers if hasattr(signal, name)}
    before = {number: signal.signal(number, handlers[name]) for name, number in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def face_set(tmp_path):
    """A folder with a small valid set."""
    write_set(tmp_path / "faces", people(8))
    return tmp_path / "faces"


@pytest.fixture(scope="module")
def browser():
    from lab import launch  # of tests/browser, which alone asks for this
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, request):
    """A page; with SCREENSHOTS=folder in the environment, what it showed at the test's end is kept there."""
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    yield page
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{request.node.name}.png")
    page.close()
