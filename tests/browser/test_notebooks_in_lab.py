"""The kit's own notebooks as a reader opens them: a copy anywhere, all cells run, the explorers at the end answer."""

import shutil

import numpy as np
import pytest
from lab import (
    Lab,
    handle,
    pixels,
    stage,
    wait_for_picture,
)

from viewdiff_nb.files import PROJECT


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("anywhere")
    for path in (PROJECT / "notebooks").glob("0[013]_*.ipynb"):
        shutil.copy(path, root)
    lab = Lab(root, tmp_path_factory.mktemp("config"), {"FAST": "1", "VIEWDIFF_NB_RUNS": str(root / "runs")})
    yield lab
    lab.close()


def answers(page, slider: str, label: str) -> bool:
    """Whether a key on a slider changes a picture."""
    shown, control = stage(page, label), handle(page, slider).first
    before = pixels(shown)
    control.scroll_into_view_if_needed()
    control.press("ArrowLeft")
    return not np.array_equal(wait_for_picture(shown, lambda now: not np.array_equal(now, before)), before)


def test_quick_start(lab, page):
    lab.open(page, "00_quickstart.ipynb")
    lab.run_all(page)
    assert answers(page, "yaw (°)", "the head") and answers(page, "roll (°)", "cosine")


def test_explore_modules(lab, page):
    lab.open(page, "01_explore_modules.ipynb")
    lab.run_all(page)
    assert answers(page, "B: yaw (°)", "attention weights")
    assert answers(page, "target yaw (°)", "a slice")
    assert answers(page, "yaw (°)", "the head at")


def test_train_with_prior(lab, page):
    lab.open(page, "03_train_with_prior.ipynb")
    lab.run_all(page, timeout=500)
