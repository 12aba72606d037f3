import os
import shutil

import pytest
from conftest import people

from viewdiff_nb.faces import split_by_person
from viewdiff_nb.studies.store import (
    PACKAGE,
    RESULT_CODE,
    DamagedResult,
    FinishedStore,
    NotFinishedError,
    Store,
    code_fingerprint,
)

KEY = {"name": "x", "config": {"lr": 1.0, "lora_targets": ("attention",)}}


@pytest.fixture
def stores(tmp_path):
    split = split_by_person(people(8), 2, 3)
    return Store(split, tmp_path), FinishedStore(split, tmp_path)


def test_a_stored_result_is_found(stores):
    store, finished = stores
    with pytest.raises(NotFinishedError):
        finished.get(KEY, dict)
    made = store.get(KEY, lambda path: {"value": 1.5})
    assert made["value"] == 1.5 and store.find(KEY) == store.get(KEY, lambda path: {"value": 2.5}) == made
    assert finished.get(KEY, dict) == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff", b"9" * 5000, b'{"key": {"name": "y"}, "value": 1}'],
)
def test_a_damaged_result_is_made_again(stores, content):
    store, finished = stores
    store.get(KEY, lambda path: {"value": 1})
    store.path(KEY).write_bytes(content)
    with pytest.warns(DamagedResult, match=f"{store.path(KEY).name}.* made again"):
        assert store.find(KEY) is None
    with pytest.warns(DamagedResult), pytest.raises(NotFinishedError):
        finished.get(KEY, dict)
    with pytest.warns(DamagedResult):
        assert store.get(KEY, lambda path: {"value": 2})["value"] == 2
    assert store.find(KEY)["value"] == 2


CHANGES = {
    "a loss": ("training/losses.py", "TEMPERATURE = 0.05", "TEMPERATURE = 0.06", True),
    "a rate": ("metrics.py", "FOLDS = 10", "FOLDS = 9", True),
    "a module": ("modules/lora.py", "rank: int = 4", "rank: int = 5", True),
    "a comment": ("training/losses.py", "TEMPERATURE = 0.05  #", "TEMPERATURE = 0.05  # another comment,", False),
    "a docstring": ("metrics.py", '"""', '"""In other words: ', False),
    "a table": ("studies/tables.py", "import", "import math\nimport", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_code_makes_results_anew_and_changed_words_do_not(tmp_path, change):
    name, before, after, made_anew = CHANGES[change]
    shutil.copytree(PACKAGE, tmp_path / "package")
    path = tmp_path / "package" / name
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    assert (code_fingerprint(tmp_path / "package") != code_fingerprint()) == made_anew


def test_every_study_and_every_training_file_counts():
    """A file that is new among them is added to the list, or named here as one that makes no result."""
    listed = {path for pattern in RESULT_CODE for path in PACKAGE.glob(pattern)}
    drawing = {"__init__", "benchmark", "command", "findings", "grid_plots", "machines", "reproduce", "store", "tables"}
    assert {path.stem for path in set((PACKAGE / "studies").glob("*.py")) - listed} == drawing
    assert set((PACKAGE / "training").glob("*.py")) <= listed and set((PACKAGE / "modules").glob("*.py")) <= listed


def test_the_key_holds_the_code(stores, monkeypatch):
    store, _ = stores
    store.get(KEY, lambda path: {"value": 1})
    monkeypatch.setattr("viewdiff_nb.studies.store.code_fingerprint", lambda: "other code")
    assert store.find(KEY) is None and store.get(KEY, lambda path: {"value": 2})["value"] == 2


def test_a_result_is_on_the_disk_before_it_has_its_name(stores, monkeypatch):
    store, _ = stores
    calls, real = [], (os.fsync, os.replace)
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), real[0](number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), real[1](old, new)))
    store.get(KEY, lambda path: {"value": 1})
    assert calls == ["fsync", "replace"] and [path.name for path in store.folder.iterdir()] == [store.path(KEY).name]
