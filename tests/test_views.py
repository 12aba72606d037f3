import json
import math
import pickle
import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import people, write_set

from viewdiff_nb.faces import FaceDataError, FaceViews, load_face_views, split_by_person
from viewdiff_nb.files import DiskRows
from viewdiff_nb.plots import BIN_NAMES

UNSURE = (1.0, 20.0, 5.0)  # degrees, of pitch, yaw, roll
TENSORS = ("front", "src", "keypoints_3d", "angles", "person")


def edit_json(path, change):
    metadata = json.loads(path.read_text(encoding="utf-8"))
    change(metadata)
    path.write_text(json.dumps(metadata))


def test_what_is_written_is_loaded(tmp_path):
    faces = people(5)
    write_set(tmp_path, faces)
    loaded = load_face_views(tmp_path)
    assert loaded.names == faces.names and loaded.feature_dim == 32 and len(loaded) == 30
    for name in TENSORS:
        torch.testing.assert_close(getattr(loaded, name), getattr(faces, name), msg=name)
    assert torch.equal(loaded.target, loaded.front[loaded.person])


def test_side_views_find_their_front_in_any_order(face_set):
    order = np.arange(8)[::-1]
    np.save(face_set / "front_feature.npy", np.load(face_set / "front_feature.npy")[order])
    edit_json(face_set / "front_metadata.json", lambda m: m.update(metadata=[m["metadata"][i] for i in order]))
    torch.testing.assert_close(load_face_views(face_set).target, people(8).target)


def corrupt_row(name, row, value):
    def change(folder):
        array = np.load(folder / name)
        array[row] = value
        np.save(folder / name, array)

    return change


def rewrite(name, content):
    return lambda folder: (folder / name).write_bytes(content(folder / name))


def npy(shape, kind="<f4", length=None):
    """A .npy file with that text as its shape, in numpy's own form, and no numbers."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return lambda path: b"\x93NUMPY\1\0" + struct.pack("<H", length or len(header)) + header


def with_errors(row, error, kind="video"):
    """All poses have errors, and one an odd one."""

    def change(content):
        for entry in content["metadata"]:
            entry["pose_error"] = list(UNSURE)
        content["metadata"][row]["pose_error"] = error

    return metadata(kind, change)


def metadata(kind, change):
    return lambda folder: edit_json(folder / f"{kind}_metadata.json", change)


BAD = {
    "NaN": (corrupt_row("video_feature.npy", 7, np.nan), r"video_feature.npy: row 7: not finite"),
    "infinite keypoint": (corrupt_row("front_keypoints.npy", 2, np.inf), r"front_keypoints.npy: row 2: not finite"),
    "zero embedding": (
        corrupt_row("video_feature.npy", 9, 0),
        r"video_feature.npy: row 9: the embedding has length 0 ",
    ),
    "truncated": (rewrite("video_feature.npy", lambda p: p.read_bytes()[:-50]), r"video_feature.npy: not a readable"),
    "no rows of endless width": (rewrite("video_feature.npy", npy((0, 10**23))), r"video_feature.npy: not a readable"),
    "empty file": (rewrite("front_feature.npy", lambda p: b""), r"front_feature.npy: not a readable"),
    "no array": (rewrite("front_feature.npy", lambda p: b"hello"), r"front_feature.npy: not a readable"),
    "pickle": (rewrite("front_feature.npy", lambda p: pickle.dumps([1])), r"front_feature.npy: not a readable"),
    "pickled objects": (
        lambda f: np.save(f / "front_feature.npy", np.array([{}, 1]), allow_pickle=True),
        r"front_feature.npy: not a readable .npy array: .*Python objects",
    ),
    "too large for float32": (
        lambda f: np.save(f / "video_keypoints.npy", np.full((48, 5, 3), 1e300)),
        r"video_keypoints.npy: row 0: not finite \(48 such rows\)",
    ),
    "integers": (lambda f: np.save(f / "front_feature.npy", np.ones((8, 32), int)), r"must hold floats, got '<i8'"),
    "one dimension": (lambda f: np.save(f / "video_feature.npy", np.ones(5)), r"shape is \(5,\), must be \(any, any\)"),
    "four keypoints": (
        lambda f: np.save(f / "video_keypoints.npy", np.ones((48, 4, 3))),
        r"video_keypoints.npy: shape is \(48, 4, 3\), must be \(48, 5, 3\)",
    ),
    "too few keypoints": (lambda f: np.save(f / "front_keypoints.npy", np.ones((7, 5, 3))), r"must be \(8, 5, 3\)"),
    "other width": (
        lambda f: (
            np.save(f / "video_feature.npy", np.ones((48, 16))),
            edit_json(f / "video_metadata.json", lambda m: m.update(feature_dim=16)),
        ),
        r"embeddings are 16 wide, the frontal ones 32",
    ),
    "no sample": (lambda f: np.save(f / "front_feature.npy", np.ones((0, 32))), r"front_feature.npy: holds no sample"),
    "no JSON": (rewrite("video_metadata.json", lambda p: b"{"), r"video_metadata.json: not valid JSON"),
    "JSON list": (rewrite("video_metadata.json", lambda p: b"[]"), r"at least 'poses' and 'metadata'"),
    "count": (metadata("video", lambda m: m.update(num_samples=3)), r"num_samples is 3, but video_feature.npy has 48"),
    "width": (metadata("front", lambda m: m.update(feature_dim=7)), r"feature_dim is 7, but front_feature.npy has 32"),
    "few poses": (metadata("video", lambda m: m["poses"].pop()), r"'poses' must list 48 entries.*got 47"),
    "poses a dict": (metadata("video", lambda m: m.update(poses={})), r"'poses' must list 48 entries.*got dict"),
    "pose text": (
        metadata("video", lambda m: m["poses"].__setitem__(4, "left")),
        r"video_metadata.json: row 4: a pose",
    ),
    "pose NaN": (metadata("video", lambda m: m["poses"][5].__setitem__(1, float("nan"))), r"row 5: a pose"),
    "pose huge": (metadata("video", lambda m: m["poses"][6].__setitem__(1, 400.0)), r"row 6: a pose .* within 180"),
    "unnamed": (metadata("front", lambda m: m["metadata"].__setitem__(3, {})), r"row 3: needs a person_name"),
    "unknown person": (
        metadata("video", lambda m: m["metadata"][11].update(person_name="nobody")),
        r"video_metadata.json: row 11: person 'nobody' has no frontal sample",
    ),
    "two fronts": (
        metadata("front", lambda m: m["metadata"][5].update(person_name="person_0001")),
        r"row 5: person 'person_0001' already has a frontal sample in row 1",
    ),
    "begins like a zip": (rewrite("front_feature.npy", lambda p: b"PK\3\4"), r"front_feature.npy: not a readable"),
    "endless header": (
        rewrite("front_feature.npy", npy("(8, 32)", length=65535)),
        r"front_feature.npy: not a readable",
    ),
    "header of brackets": (rewrite("front_feature.npy", npy("(" * 999)), r"front_feature.npy: not a readable"),
    "header in the middle of a token": (
        rewrite("front_feature.npy", npy('(8, """')),
        r"front_feature.npy: not a readable",
    ),
    "boolean length": (rewrite("front_feature.npy", npy("(True, 512)")), r"front_feature.npy: not a readable"),
    "negative length": (rewrite("front_feature.npy", npy("(-8, 32)")), r"front_feature.npy: not a readable"),
    "terabytes": (
        rewrite("front_feature.npy", npy("(100000000000, 512)")),
        r"front_feature.npy: .*greater than file size",
    ),
    "terabytes of video": (
        rewrite("video_feature.npy", npy("(100000000000, 512)")),
        r"video_feature.npy: .*greater than file size",
    ),
    "more than the shape says": (
        rewrite("video_feature.npy", lambda p: p.read_bytes() + b"1234"),
        r"6148 bytes are no",
    ),
    "complex": (
        lambda f: np.save(f / "front_keypoints.npy", np.ones((8, 5, 3), complex)),
        r"must hold floats, got '<c16'",
    ),
    "as long as a galaxy": (
        corrupt_row("video_feature.npy", 5, 1e25),
        r"video_feature.npy: row 5: .* length 5.66e\+25",
    ),
    "as short as an atom": (
        corrupt_row("front_feature.npy", 6, 1e-15),
        r"front_feature.npy: row 6: .* length 5.66e-15",
    ),
    "nested lists": (
        rewrite("video_metadata.json", lambda p: b"[" * 100_000),
        r"video_metadata.json: not valid JSON: .*nested",
    ),
    "nested objects": (rewrite("video_metadata.json", lambda p: b'{"a":' * 100_000), r"not valid JSON: .*nested"),
    "5,000 digits": (
        rewrite("video_metadata.json", lambda p: b'{"num_samples": ' + b"9" * 5000 + b"}"),
        r"video_metadata.json: not valid JSON: .*5000 digits",
    ),
    "a key twice": (
        rewrite("front_metadata.json", lambda p: b'{"poses": [], "poses": []}'),
        r"the key 'poses' comes twice",
    ),
    "more text than samples": (rewrite("front_metadata.json", lambda p: b" " * 2_000_000), r"has 2000000 bytes"),
    "a long pose": (metadata("video", lambda m: m["poses"].__setitem__(4, "x" * 5000)), r"row 4: a pose"),
    "a long count": (metadata("video", lambda m: m.update(num_samples="x" * 5000)), r"num_samples is 'xxx"),
    "a long entry": (
        metadata("video", lambda m: m["metadata"].__setitem__(4, {"a": "x" * 5000})),
        r"row 4: needs a person_name",
    ),
    "a long stranger": (
        metadata("video", lambda m: m["metadata"][1].update(person_name="x" * 5000)),
        r"row 1: person 'xxx",
    ),
    "a pose_error of one sample": (
        metadata("video", lambda m: m["metadata"][2].update(pose_error=list(UNSURE))),
        r"video_metadata.json: row 0: if one sample has a pose_error all have, three angles.*; got None",
    ),
    "a sample without pose_error": (with_errors(7, None), r"video_metadata.json: row 7: if one .*; got None"),
    "a pose_error of one angle": (with_errors(7, 20.0), r"video_metadata.json: row 7: if one .*; got 20.0"),
    "a pose_error of two angles": (with_errors(7, [1, 2]), r"video_metadata.json: row 7: if one .*; got \[1, 2\]"),
    "a negative pose_error": (with_errors(0, [1, -2.5, 0]), r"video_metadata.json: row 0: .* none negative; got"),
    "an endless pose_error": (with_errors(47, [1, math.inf, 0]), r"video_metadata.json: row 47: if one .*; got"),
    "a pose_error that is no number": (with_errors(3, [math.nan, 0, 0]), r"video_metadata.json: row 3: if one .*; got"),
    "a pose_error in words": (with_errors(3, "wide"), r"video_metadata.json: row 3: if one .*; got 'wide'"),
    "a pose_error of the fronts": (with_errors(5, [-1, 0, 0], "front"), r"front_metadata.json: row 5: if one"),
    "half a character": (
        metadata("front", lambda m: m["metadata"][2].update(person_name="\ud800")),
        r"front_metadata.json: row 2: needs a person_name, a text in UTF-8",
    ),
}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_clear_error_and_changes_nothing(face_set, case, mmap):
    damage, message = BAD[case]
    damage(face_set)
    before = {path.name: path.read_bytes() for path in face_set.iterdir()}
    with pytest.raises(FaceDataError, match=message) as caught:
        load_face_views(face_set, mmap=mmap)
    assert len(str(caught.value)) < 500
    assert {path.name: path.read_bytes() for path in face_set.iterdir()} == before


def test_missing_files_are_all_named(face_set):
    (face_set / "front_keypoints.npy").unlink()
    (face_set / "video_metadata.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks .*front_keypoints.npy, .*video_metadata.json"):
        load_face_views(face_set)


def test_sets_are_compared_without_comparing_numbers():
    faces = people(3)
    assert faces == faces and faces != replace(faces) and len({faces, faces}) == 1


def test_nobody_is_selected_twice():
    faces = people(6)
    mask = torch.tensor([False, True, False, False, True, False])
    for same in (torch.tensor([1, 4]), mask, torch.tensor([1, -2])):
        picked = faces.select(same)
        assert picked.names == (faces.names[1], faces.names[4]) and torch.equal(picked.target[:6], faces.front[[1] * 6])
    for twice in ([2, 3, 2], [5, -1]):
        with pytest.raises(ValueError, match=f"person {twice[0]} is selected 2 times"):
            faces.select(torch.tensor(twice))


@pytest.mark.parametrize("scale", [1e-5, 20.0, 1e4])
def test_embeddings_of_usual_lengths_load(face_set, scale):
    np.save(face_set / "video_feature.npy", scale * np.load(face_set / "video_feature.npy"))
    torch.testing.assert_close(load_face_views(face_set).src.norm(dim=1), torch.full((48,), scale), rtol=1e-4, atol=0)


def test_headers_of_other_programs_are_read(face_set):
    """As written by Julia's NPZ.jl: no space after commas, and columns first."""
    features = np.load(face_set / "front_feature.npy")
    header = b"{'descr': '<f4', 'fortran_order': True, 'shape': (8,32,), }\n"
    start = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    (face_set / "front_feature.npy").write_bytes(start + features.T.tobytes())
    assert np.array_equal(load_face_views(face_set).front.numpy(), features)


def test_float16_is_read_as_float32(face_set):
    for name in ("front_feature.npy", "video_feature.npy"):
        np.save(face_set / name, np.load(face_set / name).astype(np.float16))
    assert load_face_views(face_set).src.dtype == torch.float32


def test_where_and_select_keep_people_and_views_together():
    faces = people(6)
    near = faces.where(faces.abs_yaw < 45)
    assert len(near) < len(faces) and near.names == faces.names and near.abs_yaw.max() < 45
    picked = faces.select(torch.tensor([4, 1]))
    assert picked.names == (faces.names[4], faces.names[1])
    for i in range(len(picked)):
        assert torch.equal(picked.target[i], faces.front[faces.names.index(picked.names[picked.person[i]])])
    assert faces.conditions(slice(0, 2))["keypoints_3d"].shape == (2, 5, 3)


def tell_errors(folder):
    """Every side view gets its own pose_error; returns them in degrees."""
    errors = (torch.rand(48, 3) * 30).round(decimals=2)

    def change(content):
        for entry, error in zip(content["metadata"], errors.tolist(), strict=True):
            entry["pose_error"] = error

    edit_json(folder / "video_metadata.json", change)
    return errors


@pytest.mark.parametrize("mmap", [False, True])
def test_errors_of_poses_are_loaded_in_radians(face_set, mmap):
    assert load_face_views(face_set, mmap=mmap).pose_error is None
    errors = tell_errors(face_set)
    faces = load_face_views(face_set, mmap=mmap)
    torch.testing.assert_close(faces.pose_error, errors * torch.pi / 180)
    assert faces.pose_error.dtype == torch.float32
    assert torch.equal(faces.conditions(slice(3, 5))["pose_error"], faces.pose_error[3:5])


def test_a_set_with_exact_poses_tells_models_of_no_error():
    assert set(people(2).conditions()) == {"angles", "keypoints_3d", "pose"}


@pytest.mark.parametrize("mmap", [False, True])
def test_errors_of_poses_stay_with_their_views(face_set, mmap):
    tell_errors(face_set)
    faces = load_face_views(face_set, mmap=mmap)
    known = dict(zip(map(tuple, faces.angles.tolist()), faces.pose_error.tolist(), strict=True))
    changed = {
        "mask": faces.where(faces.abs_yaw > 40),
        "index": faces.where(torch.tensor([9, 2, 9])),
        "select": faces.select(torch.tensor([5, 2])),
        "split": split_by_person(faces, 2, 2).train,
        "sample": faces.sample_views(2, torch.Generator().manual_seed(0)),
        "in_memory": faces.in_memory(),
        "to": faces.to("cpu"),
    }
    for name, part in changed.items():
        assert part.pose_error.shape == (len(part), 3) == part.angles.shape, name
        for angles, error in zip(part.angles.tolist(), part.pose_error.tolist(), strict=True):
            assert known[tuple(angles)] == error, name
    assert faces.to("meta").pose_error.device.type == "meta"


def assert_same(a: FaceViews, b: FaceViews) -> None:
    """Equal bits, wherever they lie."""
    a, b = a.in_memory(), b.in_memory()
    assert a.names == b.names
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_memory_mapped_set_gives_what_the_loaded_one_gives(face_set, dtype):
    np.save(face_set / "video_feature.npy", np.load(face_set / "video_feature.npy").astype(dtype))
    loaded, mapped = load_face_views(face_set), load_face_views(face_set, mmap=True)
    for rows in (mapped.src, mapped.keypoints_3d):
        assert isinstance(rows, DiskRows) and isinstance(rows.array, np.memmap)
    assert mapped.src.array.dtype == dtype and mapped.on_disk and not loaded.on_disk
    assert mapped.nbytes == loaded.nbytes == sum(getattr(loaded, name).nbytes for name in TENSORS)
    assert_same(mapped, loaded)
    index = torch.tensor([5, 0, 5])
    for key in (index, slice(3, 9, 2), loaded.abs_yaw > 60, 4):
        assert mapped.src[key].dtype == torch.float32 and torch.equal(mapped.src[key], loaded.src[key])
    changes = {
        "where": lambda faces: faces.where(faces.abs_yaw < 45),
        "where, twice": lambda faces: faces.where(faces.abs_yaw < 45).where(index),
        "select": lambda faces: faces.select(torch.tensor([4, 1, 7])),
        "split": lambda faces: split_by_person(faces, 2, 3).test,
        "sample": lambda faces: faces.sample_views(2, torch.Generator().manual_seed(0)),
        "to": lambda faces: faces.to("cpu"),
    }
    for name, change in changes.items():
        assert change(mapped).on_disk, name
        assert_same(change(mapped), change(loaded))
    assert mapped.frame().equals(loaded.frame())
    copy = pickle.loads(pickle.dumps(mapped.where(index)))  # what a worker gets
    assert isinstance(copy.src.array, np.memmap)
    assert_same(copy, loaded.where(index))


def test_a_memory_mapped_set_is_not_held_in_memory(tmp_path):
    size = 2048, 8192  # 32 MiB as float16
    faces = people(4, views=512, width=8)
    write_set(tmp_path, replace(faces, front=torch.ones(4, size[1])))
    np.save(tmp_path / "video_feature.npy", np.full(size, 0.5, np.float16))
    edit_json(tmp_path / "video_metadata.json", lambda m: m.update(feature_dim=size[1]))

    def peak(**options):
        tracemalloc.start()
        faces = load_face_views(tmp_path, **options)
        faces.where(faces.abs_yaw > 10).select(torch.tensor([0, 2]))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most / 2**20

    assert peak(mmap=True) < 20 and peak() > 64  # MiB; the latter as float32


def test_a_memory_mapped_set_stays_on_the_cpu(face_set):
    with pytest.raises(ValueError, match="stays on disk; it cannot be loaded to meta"):
        load_face_views(face_set, "meta", mmap=True)
    assert load_face_views(face_set, mmap=True).to("meta").src.device.type == "meta"  # an explicit move reads it


def test_sampled_views_are_some_of_every_person():
    faces = people(7)
    faces = faces.where(faces.person != 3).where(torch.arange(36) != 0)  # nobody's views, and one fewer of the first
    sampled = faces.sample_views(4, torch.Generator().manual_seed(0))
    assert torch.bincount(sampled.person, minlength=7).tolist() == [4, 4, 4, 0, 4, 4, 4]
    assert sampled.names == faces.names
    rows = [(faces.src == row).all(1).nonzero().item() for row in sampled.src]
    assert rows == sorted(set(rows))  # no view twice, order kept
    assert torch.equal(faces.person[rows], sampled.person)
    assert torch.bincount(faces.sample_views(6, torch.Generator()).person).tolist() == [5, 6, 6, 0, 6, 6, 6]
    again, other = (faces.sample_views(4, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(again.src, sampled.src) and not torch.equal(other.src, sampled.src)
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        faces.sample_views(0, torch.Generator())


def test_every_view_is_sampled_equally_often():
    faces, counts = people(3, views=5), torch.zeros(15)
    index = replace(faces, src=torch.arange(15.0)[:, None])
    for seed in range(600):
        counts[index.sample_views(2, torch.Generator().manual_seed(seed)).src[:, 0].long()] += 1
    assert (counts - 240).abs().max() < 60  # 5 standard deviations


def test_the_frame_describes_every_view():
    faces = people(4)
    table = faces.frame()
    assert table.columns.tolist() == ["person", "pitch", "yaw", "roll", "yaw_bin", "cosine"] and len(table) == 24
    assert table["person"].tolist() == [faces.names[i] for i in faces.person]
    np.testing.assert_allclose(table[["pitch", "yaw", "roll"]], faces.angles.rad2deg(), rtol=1e-6)
    assert table["yaw_bin"].cat.categories.tolist() == BIN_NAMES
    assert table["yaw_bin"].tolist()[:6] == ["75-90", "45-60", "0-30", "0-30", "45-60", "75-90"]  # 85, 51, 17
    np.testing.assert_allclose(table["cosine"], torch.cosine_similarity(faces.src, faces.target), atol=1e-6)


def test_yaw_bins_are_those_of_the_rates():
    faces = people(1, views=6)
    yaw = torch.tensor([0.0, 30.0, -45.0, 75.0, -90.0, 91.0])
    table = replace(faces, angles=torch.stack((0 * yaw, yaw.deg2rad(), 0 * yaw), 1)).frame()
    assert table["yaw_bin"].tolist()[:5] == ["0-30", "30-45", "45-60", "75-90", "75-90"]
    assert table["yaw_bin"].isna().tolist() == [False] * 5 + [True]


def test_a_set_without_views_has_an_empty_frame():
    faces = people(2)
    assert len(faces.where(faces.abs_yaw < 0).frame()) == 0
