"""The fuzz program in small: each loader takes mutated files, and the program finds a loader that does not."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("split", "store", "cells", "turntable", "pairs", "picture_pairs", "insightface_bin", "adapter", "peft_adapter")
SLOW = ("face_set", "face_set_mmap", "checkpoint_mmap", "weights", "drop_in", "cfp", "checkpoint", "predict")


@pytest.mark.parametrize(("loaders", "inputs"), [(QUICK, 200), (SLOW, 25)], ids=["quick", "slow"])
def test_strange_files_are_refused_in_words(loaders, inputs, tmp_path):
    command = [sys.executable, ROOT / "benchmarks/fuzz.py", *loaders, "--inputs", str(inputs), "--seed", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(" 0 failed") == len(loaders)


BROKEN = """
import sys, runpy, pathlib, pickle
sys.argv = ["fuzz.py", "split", "--inputs", "200"]
sys.path.insert(0, {folder!r})
import fuzz
def read(folder):
    content = (folder / "split.json").read_bytes()
    {how}
fuzz.LOADERS["split"].read = read
fuzz.RUNS = pathlib.Path({kept!r})
fuzz.main()
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("pickle.loads(content) if content[:1] != b'{' else None", "ran what a pickle asked for"),
        ("__import__('json').loads(content)", "does not name the file"),
        ("assert content.strip().endswith(b'}')", "AssertionError"),
    ],
)
def test_a_loader_that_is_not_careful_is_found(how, said, tmp_path):
    program = BROKEN.format(folder=str(ROOT / "benchmarks"), how=how, kept=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1 and said in run.stdout, run.stdout + run.stderr
    assert list((tmp_path / "fuzz" / "split").iterdir())  # what failed is kept
