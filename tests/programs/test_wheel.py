"""A wheel holds what is used without the repository: code, weights, the explorers' scripts, the commands."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Built from a copy: setuptools would take what an earlier build left in build/, and leave something there."""
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "viewdiff_nb", source / "viewdiff_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, check=True, cwd=out)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_it_predicts_without_the_repository(unpacked, tmp_path):
    program = """
import numpy as np, viewdiff_nb
from viewdiff_nb.predict import frontal_embeddings
from viewdiff_nb.pretrained import load_pretrained
rng = np.random.default_rng(0)
found = frontal_embeddings(load_pretrained(), rng.standard_normal((4, 384)), rng.uniform(-80, 80, (4, 3)))
print(viewdiff_nb.__file__, found.shape)
"""
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.stdout.split() == [str(unpacked / "viewdiff_nb" / "__init__.py"), "(4,", "384)"], run.stderr


def test_nothing_is_forgotten_and_nothing_else_is_in_it(unpacked):
    there = {path.relative_to(unpacked).as_posix() for path in (unpacked / "viewdiff_nb").rglob("*") if path.is_file()}
    package = (ROOT / "viewdiff_nb").rglob("*")
    wanted = {
        path.relative_to(ROOT).as_posix() for path in package if path.is_file() and "__pycache__" not in path.parts
    }
    assert there == wanted
    (scripts,) = unpacked.glob("*.dist-info/entry_points.txt")
    commands = scripts.read_text(encoding="utf-8").split("[console_scripts]")[1].split("\n")
    assert {line.split(" = ")[0] for line in commands if line} == {"viewdiff-train", "viewdiff-predict"}
