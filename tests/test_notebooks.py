"""What a reader of the repository sees of the notebooks: executed, with pictures, small, no dead widgets."""

import re

import nbformat
import pytest

from viewdiff_nb.files import PROJECT

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


def test_the_story_is_whole():
    assert [path.name[:2] for path in NOTEBOOKS] == ["00", "01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name[:2])
def test_conventions(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert path.stat().st_size < 1.5e6 and len(notebook.cells) <= 30
    assert max(len(cell.source.splitlines()) for cell in code) <= 25
    assert re.match(r"# \d\d · .*\n(.*\n)*1\. ", notebook.cells[0].source), "a title and numbered goals"
    assert notebook.cells[-1].source.startswith("## Summary")
    assert "widgets" not in notebook.metadata
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "executed from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert "image/png" in shown and "application/vnd.jupyter.widget-view+json" not in shown
    assert not [output for output in outputs if output.output_type == "error"]
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/\w+/viewdiff_nb/[\w/]+\.py:\d+", text), "a warning with a path of the machine it ran on"
    assert str(PROJECT) not in text and "pip install" not in "".join(cell.source for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name[:2])
def test_imports_are_in_one_cell(path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    importing = [source for source in code if re.search(r"^(from|import) ", source, re.MULTILINE)]
    assert importing == code[:1] and "__version__" in code[0] and "print(" in code[0]
