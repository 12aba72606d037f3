import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from viewdiff_nb.faces import embed
from viewdiff_nb.faces.embed import (
    ConsentError,
    Person,
    choose_front,
    embed_folder,
    frontal_angles,
    load_part,
    save_part,
)

SHAPES = {"features": (2, 8), "keypoints": (2, 5, 3), "poses": (2, 3), "sharpness": (2,)}


@pytest.fixture
def person():
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return Person(
        arrays,
        [{"person_name": "李雷", "image_path": f"{i}.jpg", "frame_index": i} for i in range(2)],
        [{"reason": "no_face", "person_name": "李雷", "image_path": "2.jpg", "error": "none"}],
    )


def same(found, person):
    return (
        found.entries == person.entries
        and found.failed == person.failed
        and all(np.array_equal(found.arrays[name], person.arrays[name]) for name in SHAPES)
    )


def test_a_part_comes_back(tmp_path, person):
    save_part(tmp_path / "a.pt", "abc", person)
    assert same(load_part(tmp_path / "a.pt", "abc"), person)
    assert load_part(tmp_path / "a.pt", "other") is None and load_part(tmp_path / "b.pt", "abc") is None
    nobody = Person({name: np.array([]) for name in SHAPES}, [], [])
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


def test_front_rule():
    poses = np.array([[0, 3, 0], [0, 8, 30], [0, -14, 0], [0, 50, 0]], float)
    assert choose_front(poses, np.array([100.0, 100, 100, 900])) == 0
    assert choose_front(poses, np.array([40.0, 100, 100, 900])) == 1  # 1.3 halvings cost 6.6 degrees
    assert choose_front(poses, np.array([4.0, 10, 100, 900])) == 2
    assert choose_front(poses[:1].repeat(2, 0), np.array([5.0, 5.0])) == 0
    assert choose_front(poses[3:], np.array([900.0])) is None
    assert choose_front(poses, np.zeros(4)) == 0
    np.testing.assert_allclose(frontal_angles(poses), [3, 8, 14, 50])


def test_consent_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "FaceReader", lambda *_: pytest.fail("models were loaded without consent"))
    with pytest.raises(ConsentError, match=r"biometric data that identify people: confirm with --i_have_consent"):
        embed_folder(tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_kit_does_not_import_insightface():
    program = """
import sys, viewdiff_nb, viewdiff_nb.faces, viewdiff_nb.faces.embed
print(sorted({"insightface", "cv2", "onnxruntime", "onnx", "skimage"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
