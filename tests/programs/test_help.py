"""Every program says what it does, from wherever it is started."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TEXTS = {path: path.read_text(encoding="utf-8") for path in sorted(BENCHMARKS.rglob("*.py"))}
READERS = ("argparse.ArgumentParser(", "= study_arguments(")  # of a command line
PROGRAMS = [path for path, text in TEXTS.items() if "__main__" in text and any(reader in text for reader in READERS)]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(BENCHMARKS).as_posix())
def test_help(path, tmp_path, monkeypatch, capsys):
    """In this process, which has imported what they all need; each as __main__, with its own folder on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out
