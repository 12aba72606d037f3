"""The shipped turntable, and small ones that are damaged."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import people
from PIL import Image

from viewdiff_nb.faces import load_face_views, split_by_person
from viewdiff_nb.faces.crops import crop_transforms, crops_of
from viewdiff_nb.faces.geometry import ARCFACE_TEMPLATE, euler_angles, face_rotation
from viewdiff_nb.faces.turntable import RecordedPeople, Turntable, load_turntable
from viewdiff_nb.faces.views import FaceDataError
from viewdiff_nb.files import HEADS, TURNTABLE


@pytest.fixture(scope="module")
def turntable():
    return load_turntable()


def test_its_people_are_test_people_of_the_shipped_set(turntable):
    test = split_by_person(load_face_views(HEADS), val=200, test=300).test
    assert set(turntable.names) <= set(test.names)
    for i, name in enumerate(turntable.names):  # a near-frontal view is closest to the own front
        front = turntable.row(i).src[turntable.closest(i, 0, 0)]
        cosine = torch.cosine_similarity(front, test.front)
        assert cosine.argmax() == test.names.index(name)


def test_poses_are_those_of_the_keypoints(turntable):
    """The pose read off the keypoints agrees but for the tilt between the keypoints' plane and the face's, and
    for perspective."""
    for pitch, roll in ((-20, 0), (0, 25), (20, -10)):
        row = turntable.row(2, pitch, roll)
        found = euler_angles(face_rotation(row.keypoints_3d)).rad2deg()
        assert (found[:, 1] - torch.tensor(turntable.yaws)).abs().max() < 12
        torch.testing.assert_close(row.angles[:, 2].rad2deg(), torch.full((37,), float(roll)))


def test_roll_turns_keypoints_clockwise_about_the_middle_of_the_photo(turntable):
    upright, rolled = (turntable.row(0, 0, roll).keypoints_3d[18] for roll in (0, 90))
    middle = torch.tensor([128.0, 128.0, 0.0])
    x, y, z = (upright - middle).unbind(-1)
    torch.testing.assert_close(rolled - middle, torch.stack((-y, x, z), -1), atol=1e-4, rtol=0)


def test_the_view_closest_to_a_pose(turntable):
    assert turntable.closest(0, 0, 62.4) == turntable.yaws.index(60)
    assert turntable.closest(0, 0, -200) == 0
    torch.testing.assert_close(turntable.row(0, 4.9).angles[0, 0].rad2deg(), torch.tensor(0.0))
    torch.testing.assert_close(turntable.row(0, 5.1).angles[0, 0].rad2deg(), torch.tensor(10.0))


@pytest.mark.parametrize("pose", [(0, 0, 0), (0, 40, 0), (-10, 30, 15), (0, 60, 0)])
def test_the_crop_has_the_keypoints_where_the_recogniser_wants_them(turntable, pose, monkeypatch):
    """A mark painted at a keypoint of the picture lies, in the crop, where the fitted similarity takes it."""
    points = turntable.picture_keypoints(1, *pose)
    template = np.array(ARCFACE_TEMPLATE)
    (fitted,) = crop_transforms(points, pose[1], crops_of(pose[1])[:1])
    wanted = points @ fitted[:, :2].T + fitted[:, 2]
    for point, there in zip(points, wanted, strict=True):
        y, x = np.mgrid[:192, :192] + 0.5
        mark = np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / 8) * 255
        picture = Image.fromarray(mark[..., None].repeat(3, 2).astype(np.uint8))
        monkeypatch.setattr(Turntable, "picture", lambda *_, picture=picture: picture)
        crop = np.asarray(turntable.crop(1, *pose))[..., 0].astype(float)
        crop[crop == 128] = 0  # beyond the picture
        found = (np.mgrid[:112, :112] + 0.5).reshape(2, -1) @ crop.ravel() / crop.sum()
        np.testing.assert_allclose(found[::-1], there, atol=1)
    assert np.linalg.norm(wanted - template, axis=1).max() < (4 if pose == (0, 0, 0) else 30)


def test_roll_turns_the_picture_clockwise(turntable):
    upright, rolled = (np.asarray(turntable.picture(0, 0, 0, roll)).astype(int) for roll in (0, 90))
    inside = slice(20, 172)
    difference = np.abs(np.rot90(upright, -1) - rolled)[inside, inside]
    assert np.median(difference) <= 1


def test_the_sheet_shows_people_by_row_and_yaws_by_column(turntable):
    sheet = turntable.sheet([0, 3], (-30, 30))
    assert sheet.size == (384, 384)
    np.testing.assert_array_equal(np.asarray(sheet)[192:, 192:], np.asarray(turntable.picture(3, 0, 30)))


def test_what_does_not_fit_together_is_named(tmp_path):
    folder = tmp_path / "table"
    shutil.copytree(TURNTABLE, folder)
    (folder / "person_0012.webp").unlink()
    with pytest.raises(FileNotFoundError, match=r"person_0012\.webp"):
        load_turntable(folder)
    about = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    (folder / "metadata.json").write_text(json.dumps(about | {"yaws": about["yaws"][1:]}))
    with pytest.raises(FaceDataError, match=r"features\.npy: shape is \(8, 5, 37, 384\), must be \(8, 5, 36, 384\)"):
        load_turntable(folder)


def about(**changes):
    def damage(folder):
        content = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        (folder / "metadata.json").write_text(json.dumps(content | changes))

    return damage


def array(name, change):
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def with_nan(values):
    values[1, 0, 2] = np.nan
    return values


BAD = {
    "a name that leads away": (about(people=["person_0000", "../person_0003"]), "metadata.json: people must be"),
    "a name that is a path": (about(people=["person_0000", "/tmp/person"]), "metadata.json: people must be"),
    "a long name": (about(people=["person_0000", "x" * 5000]), "metadata.json: people must be"),
    "half a name": (about(people=["person_0000", "\ud800"]), "metadata.json: people must be"),
    "one name for two": (about(people=["person_0000", "person_0000"]), "metadata.json: people must be"),
    "no people": (about(people=None), "metadata.json: people must be"),
    "falling yaws": (about(yaws=[60, 0, -60]), "metadata.json: yaws must be"),
    "yaws in words": (about(yaws=["left", "0", "right"]), "metadata.json: yaws must be"),
    "a pitch that is no number": (about(pitches=[-10, float("nan")]), "metadata.json: pitches must be"),
    "width": (about(feature_dim=None), "metadata.json: feature_dim must be"),
    "huge pictures": (about(picture_size=10**9), r"webp: must be \(3000000000, 2000000000\) pixels.* got \(192, 128\)"),
    "no scale": (about(pixels_per_photo_pixel=0), "metadata.json: pixels_per_photo_pixel must be"),
    "a list": (lambda f: (f / "metadata.json").write_text("[]"), "metadata.json: people must be"),
    "no JSON": (lambda f: (f / "metadata.json").write_text("[" * 100_000), "metadata.json: not valid JSON"),
    "NaN": (array("features.npy", with_nan), "features.npy: row 1: not finite"),
    "keypoint NaN": (array("keypoints.npy", with_nan), "keypoints.npy: row 1: not finite"),
    "zeros": (array("features.npy", np.zeros_like), "features.npy: row 0: the embedding has length 0"),
    "complex": (array("keypoints.npy", lambda v: v.astype(complex)), "keypoints.npy: must hold floats"),
    "no picture": (
        lambda f: (f / "person_0003.webp").write_bytes(b"RIFF"),
        r"person_0003\.webp: not a readable picture",
    ),
}


def write_turntable(folder) -> None:
    """Two people at two pitches and three yaws, in noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    np.save(folder / "features.npy", random.standard_normal((2, 2, 3, 147)).astype(np.float16))
    np.save(folder / "keypoints.npy", random.uniform(0, 256, (2, 2, 3, 5, 3)).astype(np.float32))
    content = {
        "feature_dim": 147,
        "people": ["person_0000", "person_0003"],
        "pitches": [-10, 10],
        "yaws": [-60, 0, 60],
        "photo_size": 256,
        "picture_size": 64,
        "pixels_per_photo_pixel": 0.3,
    }
    for name in content["people"]:
        Image.new("RGB", (3 * 64, 2 * 64)).save(folder / f"{name}.webp")
    (folder / "metadata.json").write_text(json.dumps(content))


@pytest.mark.parametrize("case", BAD)
def test_a_turntable_that_cannot_be_is_refused(tmp_path, case):
    damage, message = BAD[case]
    folder = tmp_path / "table"
    write_turntable(folder)
    assert load_turntable(folder).names == ("person_0000", "person_0003")
    damage(folder)
    with pytest.raises(FaceDataError, match=message) as caught:
        load_turntable(folder)
    assert len(str(caught.value)) < 500


def test_pictures_are_small():
    """A clone should stay quick."""
    assert sum(path.stat().st_size for path in TURNTABLE.iterdir()) < 6e6
    with Image.open(TURNTABLE / "person_0007.webp") as sheet:
        assert sheet.size == (37 * 192, 5 * 192)


def test_a_row_is_a_persons_views_by_yaw():
    faces = people(4, views=6)
    shuffled = faces.where(torch.randperm(len(faces)))
    row = RecordedPeople(shuffled).row(2)
    assert (row.person == 2).all() and len(row) == 6
    assert (row.angles[1:, 1] > row.angles[:-1, 1]).all()
    recorded = RecordedPeople(shuffled)
    wanted = row.angles[4].rad2deg().tolist()
    assert recorded.closest(2, wanted[0] + 1, wanted[1] - 1, wanted[2]) == 4
    assert recorded.picture(2, 0, 0) is None


def test_a_person_without_views_is_named():
    faces = people(3, views=2)
    recorded = RecordedPeople(faces.where(faces.person != 1))
    with pytest.raises(ValueError, match="person_0001 has no side view"):
        recorded.row(1)
