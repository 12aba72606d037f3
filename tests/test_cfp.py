"""CFP as a face set, from a stand-in in its layout: twenty people of random colours, and landmarks of turned mean faces."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from viewdiff_nb.faces import FaceDataError, cfp, load_face_views
from viewdiff_nb.faces.cfp import CfpOptions, embed_cfp
from viewdiff_nb.faces.crops import PROFILE_CROPS, crop_transforms, cut_crops
from viewdiff_nb.faces.geometry import MEAN_FACE, SEEN_FROM, rotation_matrix
from viewdiff_nb.faces.pairs import read_pairs
from viewdiff_nb.faces.photo_reader import Face, RefusedError

PEOPLE, FRONTAL, PROFILES, SIZE = 20, 10, 4, 120
FRONTALS = PEOPLE * FRONTAL
COUNT = FRONTALS + PEOPLE * PROFILES
SCALE, MIDDLE = 40.0, (62.0, 57.0)  # pixels of a unit of the mean face, and where it is in a picture
PERSON = np.concatenate([np.arange(PEOPLE).repeat(FRONTAL), np.arange(PEOPLE).repeat(PROFILES)])
PATHS = [
    f"{person + 1:03d}/{kind}/{number + 1:02d}"
    for kind, each in (("frontal", FRONTAL), ("profile", PROFILES))
    for person in range(PEOPLE)
    for number in range(each)
]
SIX = [f"{kind}_{part}" for kind in ("front", "video") for part in ("feature.npy", "keypoints.npy", "metadata.json")]


class Averages:
    """Embeds a crop as the mean colours of its 28 x 28 blocks, scaled to length 1."""

    name, feature_dim, seen = "block averages", 48, 0

    def embed(self, crops):
        Averages.seen += len(crops)
        blocks = crops.reshape(len(crops), 4, 28, 4, 28, 3).mean((2, 4)).reshape(len(crops), -1)
        return (blocks / np.linalg.norm(blocks, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Count what is embedded by a recogniser that needs no weights."""
    monkeypatch.setattr(Averages, "seen", 0)
    for name in ("make_recogniser", "_cached_recogniser"):
        monkeypatch.setattr(cfp, name, lambda name: Averages())


def true_pose(row):
    """Degrees; every other picture looks to the image's left."""
    rng = np.random.default_rng(row)
    yaw = rng.uniform(2, 10) if row < FRONTALS else rng.uniform(65, 85)
    return np.array([rng.normal(0, 5), yaw * (-1) ** row, rng.normal(0, 10)])


def true_points(row):
    """(5, 3) pixels."""
    turned = np.array(MEAN_FACE) @ rotation_matrix(torch.from_numpy(np.deg2rad(true_pose(row)))).numpy().T
    return SCALE * turned + (*MIDDLE, 0)


def landmarks(row):
    """CFP's 30 points of the half that is seen; those that nobody reads are far away."""
    looks_left = true_pose(row)[1] < 0
    eye, nose, mouth = true_points(row)[list(SEEN_FROM[looks_left]), :2]
    points = np.full((30, 2), -1e4)
    points[0:5] = nose + (50 if looks_left else -50, 10) + np.arange(5)[:, None] * (0, 5)  # contour, behind the nose
    points[12:18] = eye + 3 * np.array([(-1, 0), (0, -1), (1, 0), (0, 1), (0.5, -0.5), (-0.5, 0.5)])
    points[18:22] = nose + np.array([(0, -15), (0, -10), (0, -5), (0, 0)])  # ridge and tip
    points[25] = mouth
    return "".join(f"{x:.6f},{y:.6f}\n" for x, y in points)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def fold_rows(protocol, fold, same):
    """Numbers from 1 in the two lists, of two people a fold."""
    each = FRONTAL if protocol == "FF" else PROFILES
    people = (2 * fold, 2 * fold + 1)
    return [
        (FRONTAL * p + k + 1, each * q + k + 2) for p in people for q in people for k in range(2) if (p == q) == same
    ]


def write_stand_in(root):
    for row, name in enumerate(PATHS):
        rng = np.random.default_rng([PERSON[row], row >= FRONTALS])
        colours = rng.integers(0, 256, (8, 8, 3)) + np.random.default_rng(row).integers(-20, 20, (8, 8, 3))
        picture = Image.fromarray(colours.clip(0, 255).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        path = root / "Data" / "Images" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=95)
        write(root / "Data" / "Fiducials" / f"{name}.txt", landmarks(row))
    for kind, names in (("F", PATHS[:FRONTALS]), ("P", PATHS[FRONTALS:])):
        lines = [f"{number} ../Data/Images/{name}.jpg\n" for number, name in enumerate(names, 1)]
        write(root / "Protocol" / f"Pair_list_{kind}.txt", "".join(lines))
    for protocol in ("FF", "FP"):
        for fold in range(10):
            for name, same in (("same", True), ("diff", False)):
                lines = [f"{first},{second}\n" for first, second in fold_rows(protocol, fold, same)]
                write(root / "Protocol" / "Split" / protocol / f"{fold + 1:02d}" / f"{name}.txt", "".join(lines))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The stand-in; tests that change it copy it."""
    root = tmp_path_factory.mktemp("cfp")
    write_stand_in(root)
    return root


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "cfp")


@pytest.fixture(scope="module")
def done(whole, tmp_path_factory):
    """The set that comes out."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_recogniser", "_cached_recogniser"):
            patch.setattr(cfp, name, lambda name: Averages())
        return embed_cfp(whole, tmp_path_factory.mktemp("out") / "set")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_set_loads_with_all_pictures_in_the_order_of_the_lists(done):
    assert set(contents(done)) == {*SIX, "pairs_FF.csv", "pairs_FP.csv", ".gitignore", ".lock"}
    assert (done / ".gitignore").read_text(encoding="utf-8") == "*\n"
    faces = load_face_views(done)
    assert faces.names == tuple(f"{i:03d}" for i in range(1, PEOPLE + 1))
    assert len(faces) == COUNT and faces.feature_dim == Averages.feature_dim
    assert faces.person.tolist() == PERSON.tolist()
    info = json.loads((done / "video_metadata.json").read_text(encoding="utf-8"))["standard_info"]
    assert info["recogniser"] == "block averages" and info["crops_of_profiles"] == list(PROFILE_CROPS)


@pytest.mark.parametrize("row", [0, 1, 57, FRONTALS - 1, FRONTALS, FRONTALS + 1, COUNT - 1])
def test_a_picture_is_embedded_by_the_crops_of_its_kind(whole, done, row):
    names = PROFILE_CROPS if row >= FRONTALS else ("five@1",)
    faces = load_face_views(done)
    transforms = crop_transforms(faces.keypoints_3d[row, :, :2].double().numpy(), true_pose(row)[1], names)
    with Image.open(whole / "Data" / "Images" / f"{PATHS[row]}.jpg") as picture:
        wanted = Averages().embed(cut_crops(picture, transforms)).sum(0)
    np.testing.assert_allclose(faces.src[row], wanted / np.linalg.norm(wanted), atol=2e-3)


def test_the_front_is_the_mean_of_the_frontal_embeddings(done):
    faces = load_face_views(done)
    wanted = faces.src[:FRONTALS].view(PEOPLE, FRONTAL, -1).mean(1)
    torch.testing.assert_close(faces.front, torch.nn.functional.normalize(wanted, dim=1))
    front = json.loads((done / "front_metadata.json").read_text(encoding="utf-8"))
    video = json.loads((done / "video_metadata.json").read_text(encoding="utf-8"))
    assert front["poses"] == video["poses"][:FRONTALS:FRONTAL]
    np.testing.assert_array_equal(
        np.load(done / "front_keypoints.npy"), np.load(done / "video_keypoints.npy")[:FRONTALS:FRONTAL]
    )


def test_keypoints_of_the_seen_side_are_the_landmarks(done):
    keypoints = load_face_views(done).keypoints_3d.numpy()
    for row in range(COUNT):
        seen = list(SEEN_FROM[true_pose(row)[1] < 0])
        np.testing.assert_allclose(keypoints[row, seen, :2], true_points(row)[seen, :2], atol=1e-3)


def test_poses_are_guessed_from_the_landmarks(done):
    """The side tells the sign; the people here are mean faces, so what is hidden is guessed about right."""
    faces = load_face_views(done)
    truth = torch.tensor(np.array([true_pose(row) for row in range(COUNT)]), dtype=torch.float32)
    off = (faces.angles.rad2deg() - truth).abs()
    profile = torch.arange(COUNT) >= FRONTALS
    assert torch.equal(faces.angles[profile, 1] < 0, truth[profile, 1] < 0)
    assert off[profile, 1].max() < 15 and off[~profile, 1].max() < 12 and off[:, 2].max() < 20
    nose = faces.keypoints_3d[:, 2] - faces.keypoints_3d.mean(1)
    assert torch.equal(nose[profile, 0] < 0, truth[profile, 1] < 0) and (nose[~profile, 2] > 0).all()


def test_errors_of_poses_are_radians_below_what_was_known_before(done):
    error = load_face_views(done).pose_error
    assert error.shape == (COUNT, 3) and (error > 0.01).all()
    assert (error <= torch.tensor([10.0, 10.0, 30.0]).deg2rad() + 1e-3).all()
    told = json.loads((done / "video_metadata.json").read_text(encoding="utf-8"))["metadata"][FRONTALS]
    assert told["person_name"] == "001" and set(told) == {"person_name", "profile", "pose_error"}
    assert told["profile"]
    np.testing.assert_allclose(error[FRONTALS], np.deg2rad(told["pose_error"]), rtol=1e-5)


@pytest.mark.parametrize(("protocol", "start"), [("FF", 0), ("FP", FRONTALS)])
def test_pairs_are_rows_of_the_set(done, protocol, start):
    pairs = read_pairs(done / f"pairs_{protocol}.csv", COUNT)
    wanted = [
        (first - 1, start + second - 1, same, fold)
        for fold in range(10)
        for same in (True, False)
        for first, second in fold_rows(protocol, fold, same)
    ]
    assert list(zip(*(getattr(pairs, c).tolist() for c in ("first", "second", "same", "fold")), strict=True)) == wanted
    assert len(pairs) == 80 and pairs.same.sum() == 40
    assert torch.equal(torch.from_numpy(PERSON)[pairs.first] == torch.from_numpy(PERSON)[pairs.second], pairs.same)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(whole, done, tmp_path, monkeypatch):
    monkeypatch.setattr(cfp, "PART", 30)
    real = Averages.embed

    def killed(self, crops):
        if Averages.seen >= 90:
            raise KeyboardInterrupt
        return real(self, crops)

    monkeypatch.setattr(Averages, "embed", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_cfp(whole, tmp_path / "set")
    assert not (tmp_path / "set" / "video_feature.npy").exists()
    assert len(list(tmp_path.glob("set/.parts/*/*.npz"))) == 3
    monkeypatch.setattr(Averages, "embed", real)
    Averages.seen = 0
    embed_cfp(whole, tmp_path / "set")
    assert Averages.seen == FRONTALS - 90 + len(PROFILE_CROPS) * (COUNT - FRONTALS)
    assert contents(tmp_path / "set") == contents(done)


@pytest.mark.parametrize("damage", [b"", b"garbage", b"PK\x03\x04 cut"], ids=["empty", "other", "cut"])
def test_a_damaged_part_is_made_anew(whole, done, tmp_path, damage):
    embed_cfp(whole, tmp_path / "set")
    part = sorted(tmp_path.glob("set/.parts/*/*.npz"))[0]
    part.write_bytes(damage)
    embed_cfp(whole, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(done)


def test_what_changed_is_embedded_again(copy, tmp_path):
    def crops_of(**options):
        Averages.seen = 0
        embed_cfp(copy, tmp_path / "set", CfpOptions(**options))
        return Averages.seen

    assert crops_of() == FRONTALS + len(PROFILE_CROPS) * (COUNT - FRONTALS)
    usual = contents(tmp_path / "set")
    assert crops_of() == 0 and contents(tmp_path / "set") == usual
    assert crops_of(crops=("five@1",)) == COUNT
    assert contents(tmp_path / "set")["video_feature.npy"] != usual["video_feature.npy"]
    os.utime(copy / "Data" / "Images" / f"{PATHS[7]}.jpg", (1e9, 1e9))  # a new time stamp: perhaps another picture
    assert crops_of(crops=("five@1",)) == COUNT
    assert crops_of() > 0 and contents(tmp_path / "set")["pairs_FP.csv"] == usual["pairs_FP.csv"]
    assert len(list((tmp_path / "set" / ".parts").iterdir())) == 1


def test_other_landmarks_are_other_crops(copy, tmp_path):
    embed_cfp(copy, tmp_path / "set")
    Averages.seen = 0
    shutil.copy(copy / "Data" / "Fiducials" / f"{PATHS[0]}.txt", copy / "Data" / "Fiducials" / f"{PATHS[2]}.txt")
    embed_cfp(copy, tmp_path / "set")
    assert Averages.seen > COUNT


def test_ready_embeddings_are_taken_as_they_are(whole, done, tmp_path):
    ready = torch.randn(COUNT, 16).mul(20).numpy()
    np.save(tmp_path / "other.npy", ready)
    embed_cfp(whole, tmp_path / "set", CfpOptions(recogniser=str(tmp_path / "other.npy")))
    faces, usual = load_face_views(tmp_path / "set"), load_face_views(done)
    assert Averages.seen == 0
    np.testing.assert_allclose(faces.src, ready / np.linalg.norm(ready, axis=1, keepdims=True), rtol=1e-5)
    for name in ("keypoints_3d", "angles", "pose_error", "person"):
        assert torch.equal(getattr(faces, name), getattr(usual, name)), name
    info = json.loads((tmp_path / "set" / "video_metadata.json").read_text(encoding="utf-8"))["standard_info"]
    assert info["recogniser"] == "embeddings of other.npy" and info["crops_of_profiles"] == "as they were"


class Reader:
    """Stands for InsightFace: finds a face in pictures that are brighter at the left than at the right."""

    pose = np.array([1.0, -60.0, 2.0])
    keypoints = np.arange(15.0).reshape(5, 3) ** 2 / 2
    checksums = {"detection": "d", "recognition": "r"}  # noqa: RUF012

    def read(self, picture):
        assert picture.dtype == np.uint8 and picture.flags.c_contiguous
        if picture[:, : SIZE // 2].mean() < picture[:, SIZE // 2 :].mean():
            raise RefusedError("no_face_detected", "no face was found")
        return Face(np.ones(4), self.keypoints.astype(np.float32), self.pose, 99.0)


def test_landmarks_of_insightface_are_used_where_it_finds_the_face(whole, done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cfp, "_cached_reader", lambda pack, models: Reader())
    embed_cfp(whole, tmp_path / "set", CfpOptions(landmarks="insightface", pack="tiny"))
    found, usual = load_face_views(tmp_path / "set"), load_face_views(done)
    seen = (found.pose_error == 0).all(1)
    assert 0 < seen.sum() < COUNT
    assert (
        f"CFP's landmarks stand for {int((~seen).sum())} faces that InsightFace did not find" in capsys.readouterr().out
    )
    np.testing.assert_allclose(found.angles[seen], np.tile(np.deg2rad(Reader.pose), (int(seen.sum()), 1)), rtol=1e-5)
    assert (found.keypoints_3d[seen] == torch.from_numpy(Reader.keypoints).float()).all()
    for name in ("keypoints_3d", "angles", "pose_error"):
        assert torch.equal(getattr(found, name)[~seen], getattr(usual, name)[~seen]), name
    # the pose that was read decides the crops, also of a picture in the folder of frontal ones
    crops = cut_crops(
        Image.open(whole / "Data" / "Images" / f"{PATHS[int(seen.int().argmax())]}.jpg"),
        crop_transforms(Reader.keypoints[:, :2], -60, PROFILE_CROPS),
    )
    wanted = Averages().embed(crops).sum(0)
    np.testing.assert_allclose(found.src[seen][0], wanted / np.linalg.norm(wanted), atol=1e-4)


def test_embeddings_of_people_stay_out_of_the_kit(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(cfp, "PROJECT", tmp_path / "kit")
    monkeypatch.setattr(cfp, "RUNS", tmp_path / "kit" / "runs")
    (tmp_path / "link").symlink_to(tmp_path / "kit")
    for out in ("kit", "kit/data/cfp", "elsewhere/../kit/set", "link/set"):
        with pytest.raises(FaceDataError, match="is in the kit's folder, where no embeddings of real people must be"):
            embed_cfp(whole, tmp_path / out)
    assert not (tmp_path / "kit").exists() and Averages.seen == 0
    np.save(tmp_path / "ready.npy", np.ones((COUNT, 4)))
    embed_cfp(whole, tmp_path / "kit/runs/set", CfpOptions(str(tmp_path / "ready.npy")))  # which git does not take


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": ()}, "crops must name one crop or more"),
        ({"crops": ("five@1", "six@1")}, "a crop is named by .* got 'six@1'"),
        ({"workers": 0}, "workers must be 1 or more, got 0"),
        ({"recogniser": "x.npy", "landmarks": "insightface"}, "ready embeddings go with CFP's landmarks"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CfpOptions(**options)


def edit(name, row, text):
    """Replace a line, counted from 1, or leave it out."""

    def change(root):
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        lines[row - 1 : row] = [] if text is None else [text]
        (root / name).write_text("\n".join(lines) + "\n")

    return change


def remove(name):
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def replace(name, content):
    return lambda root: (root / name).write_bytes(content)


F_LIST, P_LIST = "Protocol/Pair_list_F.txt", "Protocol/Pair_list_P.txt"
POINTS = "Data/Fiducials/003/profile/02.txt"
PICTURE = "Data/Images/003/frontal/02.jpg"
SAME, DIFF = "Protocol/Split/FP/02/same.txt", "Protocol/Split/FP/02/diff.txt"  # of persons 3 and 4
BAD = {
    "no pictures": (remove("Data/Images"), "is not CFP: there is no folder .*cfp/Data/Images"),
    "no landmarks": (remove("Data/Fiducials"), "is not CFP: there is no folder .*cfp/Data/Fiducials"),
    "no protocol": (remove("Protocol"), "is not CFP: there is no folder .*cfp/Protocol/Split"),
    "no list": (remove(P_LIST), f"{P_LIST}"),
    "an empty list": (replace(F_LIST, b""), f"{F_LIST}: has 0 lines, and a person has 10"),
    "a list that is no text": (replace(F_LIST, b"\xff\xff"), f"{F_LIST}: not a text in UTF-8"),
    "a short list": (edit(P_LIST, 80, None), f"{P_LIST}: has 79 lines, and a person has 4"),
    "people without profiles": (
        lambda root: [edit(P_LIST, 77, None)(root) for _ in range(4)],
        "Protocol: 20 people have frontal pictures, 19 have profiles",
    ),
    "a line of another kind": (edit(F_LIST, 7, "7"), f"{F_LIST}: line 7: must be 7, a space, .*NUMBER.jpg, got '7'"),
    "a line left out": (
        edit(F_LIST, 7, None),
        f"{F_LIST}: line 7: must be 7, a space, and ../Data/Images/PERSON/frontal/NUMBER.jpg, got '8 .*",
    ),
    "a profile among frontal ones": (
        edit(F_LIST, 7, "7 ../Data/Images/001/profile/01.jpg"),
        f"{F_LIST}: line 7: must be 7, .*got '7 ../Data/Images/001/profile/01.jpg'",
    ),
    "another person": (
        edit(P_LIST, 6, "6 ../Data/Images/003/profile/02.jpg"),
        f"{P_LIST}: line 6: must be of person 002, 4 a person, got 003/profile/02.jpg",
    ),
    "no picture": (remove(PICTURE), f"{F_LIST}: line 22: there is no picture .*{PICTURE}"),
    "no landmark file": (remove(POINTS), f"{P_LIST}: line 10: there is no file of landmarks .*{POINTS}"),
    "a landmark too few": (edit(POINTS, 30, None), f"{POINTS}: a face has 30 landmarks, one a line, got 29"),
    "no landmark": (replace(POINTS, b""), f"{POINTS}: a face has 30 landmarks, one a line, got 0"),
    "a landmark in space": (edit(POINTS, 5, "1,2,3"), f"{POINTS}: line 5: must be 2 numbers .*got '1,2,3'"),
    "a landmark without a number": (edit(POINTS, 5, "1;2"), f"{POINTS}: line 5: must be 2 numbers .*got '1;2'"),
    "a landmark nowhere": (edit(POINTS, 5, "nan,2"), f"{POINTS}: line 5: must be 2 numbers .*got 'nan,2'"),
    "landmarks in one place": (
        replace(POINTS, b"5,5\n" * 30),
        f"{POINTS}: eye, nose and corner of the mouth are in one",
    ),
    "landmarks that are no text": (replace(POINTS, b"\x89PNG\xff"), f"{POINTS}: not a text in UTF-8"),
    "no pairs of a fold": (remove(DIFF), f"{DIFF}"),
    "a pair of one": (edit(SAME, 2, "21"), f"{SAME}: line 2: must be 2 whole numbers with commas .*got '21'"),
    "a pair of words": (edit(SAME, 2, "21,x"), f"{SAME}: line 2: must be 2 whole numbers"),
    "no such profile": (edit(SAME, 1, "21,81"), f"{SAME}: line 1: Pair_list_P.txt has rows 1 to 80, got 81"),
    "rows from 0": (edit(SAME, 1, "0,9"), f"{SAME}: line 1: Pair_list_F.txt has rows 1 to 200, got 0"),
    "different persons": (edit(SAME, 2, "21,13"), f"{SAME}: line 2: a pair of persons 003 and 004"),
    "the same person": (edit(DIFF, 2, "21,9"), f"{DIFF}: line 2: a pair of persons 003 and 003"),
    "a person in two folds": (
        edit(SAME, 2, "1,1"),
        f"{SAME}: line 2: person 001 is in fold 2, and in fold 1 by .*Split/FP/01/same.txt: line 1",
    ),
    "no pairs at all": (
        lambda root: [path.write_text("") for path in root.glob("Protocol/Split/FF/*/*.txt")],
        "Protocol/Split/FF: holds no pair",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_file_and_line_before_any_work(copy, tmp_path, case):
    change, message = BAD[case]
    change(copy)
    with pytest.raises((FaceDataError, FileNotFoundError), match=message):
        embed_cfp(copy, tmp_path / "set")
    assert Averages.seen == 0 and not (tmp_path / "set").exists()


@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "truncated"])
def test_a_picture_that_cannot_be_read_is_named(copy, tmp_path, content):
    path = copy / PICTURE
    path.write_bytes(path.read_bytes()[:-300] if content is None else content)
    with pytest.raises(FaceDataError, match=f"{F_LIST}: line 22: .*{PICTURE} cannot be read"):
        embed_cfp(copy, tmp_path / "set")
    assert not (tmp_path / "set" / "video_feature.npy").exists()


@pytest.mark.parametrize(
    ("ready", "message"),
    [
        (np.ones((COUNT - 1, 4)), f"ready.npy: has {COUNT - 1} embeddings, and CFP {COUNT} pictures"),
        (np.ones((COUNT, 4, 1)), r"ready.npy: shape is \(280, 4, 1\), must be \(any, any\)"),
        (np.ones((COUNT, 4), int), "ready.npy: must hold floats"),
        (np.where(np.arange(COUNT)[:, None] == 7, np.nan, np.ones((COUNT, 4))), r"ready.npy: row 7: not finite"),
        (
            np.where(np.arange(COUNT)[:, None] == 7, 0, np.ones((COUNT, 4))),
            r"ready.npy: row 7: the embedding has length 0",
        ),
    ],
)
def test_unusable_embeddings_are_refused(whole, tmp_path, ready, message):
    np.save(tmp_path / "ready.npy", ready)
    with pytest.raises(FaceDataError, match=message):
        embed_cfp(whole, tmp_path / "set", CfpOptions(recogniser=str(tmp_path / "ready.npy")))
    assert not (tmp_path / "set").exists()


def test_the_command_line(whole, tmp_path, capsys):
    cfp.main([str(whole), str(tmp_path / "set"), "--crops", "five@1", "three@1"])
    assert f"face set and pairs in {tmp_path / 'set'}" in capsys.readouterr().out
    assert load_face_views(tmp_path / "set").names[0] == "001" and Averages.seen == FRONTALS + 2 * (COUNT - FRONTALS)
    with pytest.raises(SystemExit, match="^error: .*nowhere is not CFP"):
        cfp.main([str(tmp_path / "nowhere"), str(tmp_path / "set")])
    with pytest.raises(SystemExit, match="^error: .*nowhere.npy"):
        cfp.main([str(whole), str(tmp_path / "set"), "--recogniser", "nowhere.npy"])
