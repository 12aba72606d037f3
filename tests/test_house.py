"""The house: data flow one way, in few files that one can read."""

import ast
import fnmatch
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "viewdiff_nb"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOOR = {
    "files": 0,
    "faces": 1,
    "modules": 2,
    "metrics": 2,
    "calibration": 3,
    "drop_in": 3,
    "training": 3,
    "pretrained": 4,
    "predict": 5,
    "export": 6,
    "face_analysis": 6,
    "studies": 4,
    "plots": 5,
    "widgets": 6,
}
"""A file imports from its own room, and from rooms on lower floors."""
GEOMETRY_ONLY = ("modules", "metrics", "calibration")  # of the faces they know the geometry, and nothing of data sets


def name_of(path: Path) -> str:
    """viewdiff_nb/training/loop.py is training.loop; the package's own __init__ has no name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


NAMES = {name_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """Files of the package that a file imports anywhere: at its top, in functions, for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [module if absolute(module) in NAMES else node.module for module in modules]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        found |= {absolute(module) for module in modules if module.split(".")[0] == "viewdiff_nb"}
    return found - {""}  # its version


def absolute(module: str) -> str:
    return module.removeprefix("viewdiff_nb").removeprefix(".")


GRAPH = {name_of(path): imported(path) for path in FILES}


def test_nothing_is_imported_that_is_not_there():
    assert set().union(*GRAPH.values()) <= NAMES


def test_there_is_no_cycle():
    graphlib.TopologicalSorter(GRAPH).prepare()  # which raises CycleError


@pytest.mark.parametrize("name", sorted(NAMES - {"", "train_enhanced"}))
def test_data_flow_one_way(name):
    room = name.split(".")[0]
    for other in GRAPH[name]:
        other_room = other.split(".")[0]
        assert other_room == room or FLOOR[other_room] < FLOOR[room], f"{name} imports {other}"
        if room in GEOMETRY_ONLY:
            assert other_room != "faces" or other == "faces.geometry", f"{name} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_read_in_one_sitting(path):
    assert len(GRAPH[name_of(path)]) <= 8, GRAPH[name_of(path)]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def test_the_package_is_small():
    """What is added has to earn its place; of these, real faces are 13 files and 2,200 lines, what takes a trained
    model away 4 and 500, the usual curves 1 and 190, controls 4 and 600, fast voxels and several GPUs 90."""
    assert len(FILES) <= 69
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) <= 13_344


def test_config_is_a_leaf():
    assert GRAPH["training.config"] == set()


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=name_of)
def test_tests_are_found_by_the_name(path):
    assert list((ROOT / "tests").rglob(f"test_{path.stem}*.py")), f"no tests/test_{path.stem}.py"


def test_the_maker_of_people_and_the_programs_are_no_part_of_it():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        outside = {"people", *(program.stem for program in (ROOT / "benchmarks").rglob("*.py"))}
        assert not outside & {module.split(".")[0] for module in modules}, path


def test_types_are_checked_without_what_is_optional():
    """The linter's environment has no extras: mypy is told of every package that the kit may import without having."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {name.split(">=")[0] for name in project["project"]["dependencies"]}
    needed |= {"viewdiff_nb", "PIL", "IPython", "traitlets"}  # Pillow and ipywidgets bring the others
    untyped = [name for rule in project["tool"]["mypy"]["overrides"] for name in rule["module"]]
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        for module in modules:
            known = module.split(".")[0] in needed | sys.stdlib_module_names
            assert known or any(fnmatch.fnmatch(f"{module}.", name) for name in untyped), f"{path}: {module}"


@pytest.mark.parametrize("name", ["viewdiff_nb", "viewdiff_nb.modules.transformer", "viewdiff_nb.metrics"])
def test_modules_load_torch_and_nothing_else_heavy(name):
    heavy = "pandas matplotlib seaborn scipy sklearn ipywidgets IPython tensorboard tyro PIL joblib"
    program = f"import sys, {name}; print(sorted(set({heavy.split()}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"
