import json

import numpy as np
import pytest
import torch
from conftest import people
from mirror import FLIP_TEST, has_mirrored_halves, mirrored

from viewdiff_nb.faces import load_face_views
from viewdiff_nb.files import HEADS

TENSORS = ("front", "src", "keypoints_3d", "angles", "person")


def say(folder, kind, **info):
    path = folder / f"{kind}_metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"standard_info": info}))


def assert_same(a, b):
    assert a.names == b.names
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_halves_are_known_where_both_files_say_so(face_set):
    assert not has_mirrored_halves(face_set)
    say(face_set, "front", embedding=FLIP_TEST)
    assert not has_mirrored_halves(face_set)
    for kind in ("front", "video"):
        say(face_set, kind, recogniser=f"net, {FLIP_TEST}")
    assert has_mirrored_halves(face_set)
    assert has_mirrored_halves(HEADS)


def test_the_mirror_of_a_mirror_is_the_set():
    faces = people(5)
    once = mirrored(faces)
    assert_same(mirrored(once), faces)
    assert torch.equal(once.front[:, :16], faces.front[:, 16:])
    assert torch.equal(once.src[:, 16:], faces.src[:, :16]) and torch.equal(once.person, faces.person)
    assert torch.equal(once.abs_yaw, faces.abs_yaw) and not torch.equal(once.angles, faces.angles)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_memory_mapped_set_has_the_mirror_image_of_the_loaded_one(face_set, dtype):
    np.save(face_set / "video_feature.npy", np.load(face_set / "video_feature.npy").astype(dtype))
    loaded, mapped = load_face_views(face_set), load_face_views(face_set, mmap=True)
    index = torch.tensor([5, 0, 5])
    assert_same(mirrored(mapped), mirrored(loaded))
    assert_same(mirrored(mirrored(mapped).where(index)), loaded.where(index))


def test_an_odd_number_has_no_halves():
    with pytest.raises(ValueError, match="31 numbers have no halves"):
        mirrored(people(2, width=31))
