"""Reading photos as far as it needs neither OpenCV nor InsightFace; for the rest see test_embed.py."""

import os
import sys

import pytest

from viewdiff_nb.faces.photo_reader import EmbedOptions, FaceReader, list_people


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_stride": 0}, "frame_stride must be 1 or more, got 0"),
        ({"det_size": 100}, "det_size must be a multiple of 32 .*got 100"),
        ({"det_size": 0}, "det_size must be a multiple of 32 .*got 0"),
        ({"min_face": 0}, "min_face must be 1 or more, got 0"),
        ({"max_faces": -1}, "max_faces must be 1 or more, got -1"),
        ({"det_threshold": 1.0}, "det_threshold must be between 0 and 1, got 1.0"),
        ({"min_sharpness": float("nan")}, "min_sharpness must not be negative, got nan"),
        ({"min_sharpness": -1.0}, "min_sharpness must not be negative, got -1.0"),
        ({"crops": ()}, r"crops must name one crop or more, got \(\)"),
        ({"crops": ("five@1", "six@1")}, "a crop is named by .* got 'six@1'"),
        ({"front_angle": 0.0}, "front_angle must be above 0 and at most 90 degrees, got 0.0"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EmbedOptions(**change)


def test_people_are_folders_and_hidden_files_are_left_out(tmp_path):
    for name in ("bert/b.JPG", "bert/a/c.mp4", "bert/a.png", "anna/notes.txt", ".hidden/d.png", "bert/.trash/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "alone.jpg").touch()
    people = list_people(tmp_path)
    assert list(people) == ["anna", "bert"] and [path.name for path in people["anna"]] == ["notes.txt"]
    names = [path.relative_to(tmp_path / "bert").as_posix() for path in people["bert"]]
    assert names == ["a.png", "a/c.mp4", "b.JPG"]


def test_a_folder_whose_name_is_no_text_is_named_before_any_work(tmp_path):
    os.mkdir(os.fsencode(tmp_path) + b"/anna\xff")
    with pytest.raises(ValueError, match=r"a folder whose name is not UTF-8, 'anna\\udcff'; rename it"):
        list_people(tmp_path)


def test_without_insightface_one_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(ImportError, match=r'needs InsightFace: pip install "\.\[insightface\]"'):
        FaceReader(EmbedOptions())
