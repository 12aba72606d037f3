"""What holds for the project as a whole."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CARDS = (ROOT / "data/heads/README.md", ROOT / "viewdiff_nb/weights/README.md")
TEXTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *CARDS]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def test_import_is_light_and_leaves_the_random_state_alone():
    program = """
import sys, torch
torch.manual_seed(3)
before = torch.get_rng_state()
import viewdiff_nb
assert torch.equal(before, torch.get_rng_state())
heavy = {"pandas", "matplotlib", "seaborn", "scipy", "ipywidgets", "anny", "numba", "onnx", "onnxruntime", "peft"}
print(sorted(heavy & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"


def requirement(text: str) -> tuple[str, str]:
    """Name and lower bound of 'name>=1.2' or 'name >=1.2'."""
    return re.fullmatch(r"([\w.-]+) *>=([\d.]+)", text).groups()


def test_environment_yml_lists_what_pyproject_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = dict(
        requirement(line)
        for line in re.findall(
            r"- ([\w.-]+ *>=[\d.]+)$", (ROOT / "environment.yml").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    for name, bound in map(requirement, project["dependencies"]):
        assert listed[CONDA_NAMES.get(name, name)] == bound, name
    assert ">=" + listed["python"] == project["requires-python"]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_pictures_exist(path):
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert [t for t in targets if not t.startswith("http") and not (path.parent / t).exists()] == []
