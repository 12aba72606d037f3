"""Every program says what it does, from wherever it is started."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAMS = [path for path in sorted(BENCHMARKS.rglob("*.py")) if "ArgumentParser(" in path.read_text()]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(BENCHMARKS).as_posix())
def test_help(path, tmp_path):
    if path.stem == "study_arguments":  # which the others share
        path = path.with_name("module_study.py")
    run = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and "usage:" in run.stdout, run.stderr
