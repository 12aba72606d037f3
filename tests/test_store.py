import os

import pytest
from conftest import people

from viewdiff_nb.faces import split_by_person
from viewdiff_nb.studies.store import DamagedResult, FinishedStore, NotFinishedError, Store

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


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff", b"9" * 5000,
                                     b'{"key": {"name": "y"}, "value": 1}'])  # fmt: skip
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


def test_a_result_is_on_the_disk_before_it_has_its_name(stores, monkeypatch):
    store, _ = stores
    calls, real = [], (os.fsync, os.replace)
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), real[0](number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), real[1](old, new)))
    store.get(KEY, lambda path: {"value": 1})
    assert calls == ["fsync", "replace"] and [path.name for path in store.folder.iterdir()] == [store.path(KEY).name]
