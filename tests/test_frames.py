import json
import zipfile

import numpy as np
import pytest
import torch

from viewdiff_nb.faces.embed import ARRAYS, Person, load_part, save_part


@pytest.fixture
def person():
    generator = np.random.default_rng(0)
    shapes = (2, 8), (2, 5, 3), (2, 3), (2,)
    arrays = {name: generator.normal(size=shape).astype(np.float32) for name, shape in zip(ARRAYS, shapes, strict=True)}
    return Person(
        arrays,
        [{"person_name": "李雷", "image_path": f"{i}.jpg", "frame_index": i} for i in range(2)],
        [{"reason": "no_face", "person_name": "李雷", "image_path": "2.jpg", "error": "none"}],
    )


def same(found, person):
    return (
        found.entries == person.entries
        and found.failed == person.failed
        and all(np.array_equal(found.arrays[name], person.arrays[name]) for name in ARRAYS)
    )


def test_a_part_comes_back(tmp_path, person):
    save_part(tmp_path / "a.pt", "abc", person)
    assert same(load_part(tmp_path / "a.pt", "abc"), person)
    assert load_part(tmp_path / "a.pt", "other") is None and load_part(tmp_path / "b.pt", "abc") is None
    nobody = Person({name: np.array([]) for name in ARRAYS}, [], [])
    save_part(tmp_path / "a.pt", "abc", nobody)
    assert same(load_part(tmp_path / "a.pt", "abc"), nobody)


def test_a_changed_byte_or_a_shorter_file_is_as_none(tmp_path, person):
    """Or it lies where nothing is read from, and what is read is right."""
    path = tmp_path / "a.pt"
    save_part(path, "abc", person)
    whole = path.read_bytes()
    damaged = 0
    for place in range(0, len(whole), 3):
        for content in (whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :], whole[:place]):
            path.write_bytes(content)
            found = load_part(path, "abc")
            damaged += found is None
            assert found is None or same(found, person), place
    assert damaged > len(whole) / 3


@pytest.mark.parametrize("content", [b"", b".", b"PK\3\4", b"\x93NUMPY"])
def test_what_is_no_part_is_as_none(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    assert load_part(tmp_path / "a.pt", "abc") is None


def test_other_content_is_as_none(tmp_path):
    torch.save([1], tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("note.npy", json.dumps({"fingerprint": "abc"}))
    assert load_part(tmp_path / "a.pt", "abc") is None and load_part(tmp_path / "b.pt", "abc") is None
