import json
import pickle

import numpy as np
import pytest
import torch
from conftest import people, write_set

from viewdiff_nb.faces import FaceDataError, load_face_views, split_by_person


def edit_json(path, change):
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


def test_what_is_written_is_loaded(tmp_path):
    faces = people(5)
    write_set(tmp_path, faces)
    loaded = load_face_views(tmp_path)
    assert loaded.names == faces.names and loaded.feature_dim == 32 and len(loaded) == 30
    for name in ("front", "src", "keypoints_3d", "angles", "person"):
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


def metadata(kind, change):
    return lambda folder: edit_json(folder / f"{kind}_metadata.json", change)


BAD = {
    "NaN": (corrupt_row("video_feature.npy", 7, np.nan), r"video_feature.npy: row 7: not finite"),
    "infinite keypoint": (corrupt_row("front_keypoints.npy", 2, np.inf), r"front_keypoints.npy: row 2: not finite"),
    "zero embedding": (corrupt_row("video_feature.npy", 9, 0), r"video_feature.npy: row 9: the embedding is zero"),
    "truncated": (rewrite("video_feature.npy", lambda p: p.read_bytes()[:-50]), r"video_feature.npy: not a readable"),
    "empty file": (rewrite("front_feature.npy", lambda p: b""), r"front_feature.npy: not a readable"),
    "no array": (rewrite("front_feature.npy", lambda p: b"hello"), r"front_feature.npy: not a readable"),
    "pickle": (rewrite("front_feature.npy", lambda p: pickle.dumps([1])), r"front_feature.npy: not a readable"),
    "pickled objects": (lambda f: np.save(f / "front_feature.npy", np.array([{}, 1]), allow_pickle=True),
                        r"front_feature.npy: not a readable"),
    "integers": (lambda f: np.save(f / "front_feature.npy", np.ones((8, 32), int)), r"must hold floats, got int64"),
    "one dimension": (lambda f: np.save(f / "video_feature.npy", np.ones(5)), r"shape is \(5,\), must be \(any, any\)"),
    "four keypoints": (lambda f: np.save(f / "video_keypoints.npy", np.ones((48, 4, 3))),
                       r"video_keypoints.npy: shape is \(48, 4, 3\), must be \(48, 5, 3\)"),
    "too few keypoints": (lambda f: np.save(f / "front_keypoints.npy", np.ones((7, 5, 3))), r"must be \(8, 5, 3\)"),
    "other width": (lambda f: (np.save(f / "video_feature.npy", np.ones((48, 16))),
                               edit_json(f / "video_metadata.json", lambda m: m.update(feature_dim=16))),
                    r"embeddings are 16 wide, the frontal ones 32"),
    "no sample": (lambda f: np.save(f / "front_feature.npy", np.ones((0, 32))), r"front_feature.npy: holds no sample"),
    "no JSON": (rewrite("video_metadata.json", lambda p: b"{"), r"video_metadata.json: not valid JSON"),
    "JSON list": (rewrite("video_metadata.json", lambda p: b"[]"), r"at least 'poses' and 'metadata'"),
    "count": (metadata("video", lambda m: m.update(num_samples=3)), r"num_samples is 3, but video_feature.npy has 48"),
    "width": (metadata("front", lambda m: m.update(feature_dim=7)), r"feature_dim is 7, but front_feature.npy has 32"),
    "few poses": (metadata("video", lambda m: m["poses"].pop()), r"'poses' must list 48 entries.*got 47"),
    "poses a dict": (metadata("video", lambda m: m.update(poses={})), r"'poses' must list 48 entries.*got dict"),
    "pose text": (metadata("video", lambda m: m["poses"].__setitem__(4, "left")), r"video_metadata.json: row 4: a pose"),
    "pose NaN": (metadata("video", lambda m: m["poses"][5].__setitem__(1, float("nan"))), r"row 5: a pose"),
    "pose huge": (metadata("video", lambda m: m["poses"][6].__setitem__(1, 400.0)), r"row 6: a pose .* within 180"),
    "unnamed": (metadata("front", lambda m: m["metadata"].__setitem__(3, {})), r"row 3: needs a person_name"),
    "unknown person": (metadata("video", lambda m: m["metadata"][11].update(person_name="nobody")),
                       r"video_metadata.json: row 11: person 'nobody' has no frontal sample"),
    "two fronts": (metadata("front", lambda m: m["metadata"][5].update(person_name="person_0001")),
                   r"row 5: person 'person_0001' already has a frontal sample in row 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_clear_error_and_changes_nothing(face_set, case):
    damage, message = BAD[case]
    damage(face_set)
    before = {path.name: path.read_bytes() for path in face_set.iterdir()}
    with pytest.raises(FaceDataError, match=message):
        load_face_views(face_set)
    assert {path.name: path.read_bytes() for path in face_set.iterdir()} == before


def test_missing_files_are_all_named(face_set):
    (face_set / "front_keypoints.npy").unlink()
    (face_set / "video_metadata.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks .*front_keypoints.npy, .*video_metadata.json"):
        load_face_views(face_set)


def test_float16_is_read_as_float32(face_set):
    for name in ("front_feature.npy", "video_feature.npy"):
        np.save(face_set / name, np.load(face_set / name).astype(np.float16))
    assert load_face_views(face_set).src.dtype == torch.float32


def test_split_is_by_identity_complete_and_seeded():
    faces = people(40)
    split = split_by_person(faces, val=5, test=10, seed=3)
    names = [set(part.names) for part in (split.train, split.val, split.test)]
    assert [len(n) for n in names] == [25, 5, 10] and len(set.union(*names)) == 40
    assert sum(len(part) for part in (split.train, split.val, split.test)) == len(faces)
    for part in (split.train, split.val, split.test):
        wanted = torch.stack([faces.front[faces.names.index(name)] for name in part.names])
        assert torch.equal(part.front, wanted) and torch.equal(part.target, wanted[part.person])
    assert split_by_person(faces, 5, 10, seed=3).test.names == split.test.names
    assert split_by_person(faces, 5, 10, seed=4).test.names != split.test.names
    assert split_by_person(faces, 8, 10, seed=3).test.names == split.test.names  # val does not move the test people


def test_split_refuses_too_few_people():
    with pytest.raises(ValueError, match="of 10 people, val=5 and test=4"):
        split_by_person(people(10), 5, 4)


def test_where_and_select_keep_people_and_views_together():
    faces = people(6)
    near = faces.where(faces.abs_yaw < 45)
    assert len(near) < len(faces) and near.names == faces.names and near.abs_yaw.max() < 45
    picked = faces.select(torch.tensor([4, 1]))
    assert picked.names == (faces.names[4], faces.names[1])
    for i in range(len(picked)):
        assert torch.equal(picked.target[i], faces.front[faces.names.index(picked.names[picked.person[i]])])
    assert faces.conditions(slice(0, 2))["keypoints_3d"].shape == (2, 5, 3)
