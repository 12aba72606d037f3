"""A folder of photos and videos to a face set, through InsightFace itself with the small models of tiny_insightface."""

import json
import os
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from insightface.model_zoo.landmark import Landmark
from insightface.model_zoo.scrfd import SCRFD
from insightface.utils.face_align import estimate_norm, norm_crop
from tiny_insightface import SIZE, head, make_pack, take_photo

from viewdiff_nb.faces import embed, load_face_views
from viewdiff_nb.faces.crops import crop_transforms, cut_crops
from viewdiff_nb.faces.embed import EmbedError, EmbedOptions, embed_folder
from viewdiff_nb.faces.photo_reader import FaceReader, RefusedError, read_pictures
from viewdiff_nb.files import only_writer

POSES = {  # of anna's photos: pitch, yaw, roll in degrees
    "00_left.png": (5.0, -40.0, 0.0),
    "01_front_blurred.png": (0.0, 0.0, 0.0),
    "02_near_front.png": (-3.0, 6.0, 0.0),
    "03_up.png": (22.0, 0.0, 0.0),
    "04_roll.png": (0.0, 20.0, 25.0),
    "session 2/right.png": (-15.0, 55.0, -10.0),
}
FRAMES, STRIDE = 13, 4
SWEEP = [(0.0, float(yaw), 0.0) for yaw in np.linspace(-44, 52, FRAMES)]  # of bert's video
PIXELS, DEPTH, DEGREES = 1.0, 2.0, 4.0  # tolerances; perspective, which InsightFace leaves out, makes up to 3 degrees
VIDEO_PIXELS, VIDEO_DEPTH, BLURRED_DEPTH = 1.0, 4.0, 5.0  # depth is in the colours, which codec and blur change


def options(models, **more):
    return EmbedOptions(i_have_consent=True, models=models, frame_stride=STRIDE, **more)


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)


def blurred(picture, sigma):
    return cv2.GaussianBlur(picture, (0, 0), sigma)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("insightface")
    make_pack(root)
    return root


@pytest.fixture(scope="module")
def truth():
    """Anna's photos and the frames of bert's video."""
    anna, bert = head(1), head(2)
    return {
        "anna": {name: take_photo(anna, pose) for name, pose in POSES.items()},
        "bert": [take_photo(bert, pose) for pose in SWEEP],
    }


@pytest.fixture(scope="module")
def photos(truth, tmp_path_factory):
    """Two good people, one without a front, one with every failure, one with a single photo."""
    root = tmp_path_factory.mktemp("photos")
    for name, photo in truth["anna"].items():
        save(root / "anna" / name, blurred(photo.picture, 3) if "blurred" in name else photo.picture)
    (root / "bert").mkdir()
    video = cv2.VideoWriter(str(root / "bert/clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (SIZE, SIZE))
    for photo in truth["bert"]:
        video.write(photo.picture)
    video.release()
    for yaw in (-30, 25, 40):
        save(root / f"clara/{yaw}.png", take_photo(head(3), (0, yaw, 0)).picture)
    front, side = (take_photo(head(4), (0, yaw, 0)).picture for yaw in (2, 35))
    save(root / "dora/front.jpg", front)
    save(root / "dora/side.jpg", side)
    save(root / "dora/nobody.png", take_photo(head(4), (0, 0, 0), discs=False).picture)
    save(root / "dora/two.png", np.hstack([front, side]))
    save(root / "dora/blurry.png", blurred(front, 6))
    small = np.full_like(front, 128)
    small[200:320, 200:320] = cv2.resize(front, (120, 120), interpolation=cv2.INTER_AREA)
    save(root / "dora/small.png", small)
    (root / "dora/empty.png").touch()
    (root / "dora/broken.jpg").write_bytes(b"\xff\xd8\xff this is no photo")
    (root / "dora/broken.mp4").write_bytes(b"this is no video")
    (root / "dora/notes.txt").write_text("no photo")
    save(root / "émile/only.png", front)
    save(root / ".hidden/front.png", front)
    return root


@pytest.fixture(scope="module")
def done(photos, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    return out, embed_folder(photos, out, options(models, min_sharpness=15.0))


@pytest.fixture
def two_people(photos, tmp_path):
    for name in ("anna", "bert"):
        shutil.copytree(photos / name, tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def model_calls(monkeypatch):
    """How often InsightFace's three models ran."""
    counts = {}

    def count(kind, method):
        real = getattr(kind, method)

        def counted(*args, **kwargs):
            counts[kind.__name__] = counts.get(kind.__name__, 0) + 1
            return real(*args, **kwargs)

        monkeypatch.setattr(kind, method, counted)

    for kind, method in ((SCRFD, "detect"), (Landmark, "get"), (ArcFaceONNX, "get_feat")):
        count(kind, method)
    return counts


def metadata(out, kind):
    return json.loads((out / f"{kind}_metadata.json").read_text(encoding="utf-8"))


def rows_of(out, person):
    """{file or frame: (keypoints, pose, embedding)} of a person, fronts and side views together."""
    found = {}
    for kind in ("front", "video"):
        text = metadata(out, kind)
        keypoints, features = (np.load(out / f"{kind}_{part}.npy") for part in ("keypoints", "feature"))
        for i, entry in enumerate(text["metadata"]):
            if entry["person_name"] == person:
                key = entry.get("frame_index", entry["image_path"].removeprefix(f"{person}/"))
                found[key] = keypoints[i], np.array(text["poses"][i]), features[i]
    return found


def check_against_truth(row, photo, pixels=PIXELS, depth=DEPTH):
    keypoints, pose, _ = row
    assert abs(keypoints[:, :2] - photo.keypoints[:, :2]).max() < pixels
    centred, wanted = (points[:, 2] - points[:, 2].mean() for points in (keypoints, photo.keypoints))
    assert abs(centred - wanted).max() < depth
    assert abs(pose - photo.pose).max() < DEGREES


def test_the_set_loads(done):
    out, summary = done
    faces = load_face_views(out)
    assert faces.names == summary.people == ("anna", "bert", "dora")
    assert summary.side_views == len(faces) == 5 + 3 + 1
    assert torch.bincount(faces.person).tolist() == [5, 3, 1]
    assert faces.feature_dim == 512 and metadata(out, "front")["feature_dim"] == 512
    assert metadata(out, "front")["standard_info"]["pose_order"] == ["pitch", "yaw", "roll"]
    assert metadata(out, "video")["metadata"][-1] == {"person_name": "dora", "image_path": "dora/side.jpg"}
    assert not list(out.glob("*.partial"))


def test_keypoints_and_poses_of_photos_are_those_of_the_renderer(done, truth):
    rows = rows_of(done[0], "anna")
    assert set(rows) == set(POSES)
    for name, photo in truth["anna"].items():
        blurs = {"depth": BLURRED_DEPTH} if "blurred" in name else {}
        check_against_truth(rows[name], photo, **blurs)


def test_keypoints_and_poses_of_a_video_are_those_of_its_frames(done, truth):
    rows = rows_of(done[0], "bert")
    assert sorted(rows) == [0, 4, 8, 12]  # every STRIDE-th of FRAMES
    for frame, row in rows.items():
        check_against_truth(row, truth["bert"][frame], VIDEO_PIXELS, VIDEO_DEPTH)


@pytest.mark.parametrize(("pose", "axis"), [((20, 0, 0), 0), ((0, 30, 0), 1), ((0, 0, 25), 2)])
@pytest.mark.parametrize("sign", [1, -1])
def test_pose_signs(models, pose, axis, sign):
    photo = take_photo(head(5), tuple(sign * angle for angle in pose))
    face = FaceReader(options(models)).read(photo.picture)
    assert sign * face.pose[axis] > 15
    assert abs(face.pose - photo.pose).max() < DEGREES
    left_eye, right_eye, nose, mouth_left, mouth_right = face.keypoints
    assert left_eye[0] < right_eye[0] and mouth_left[0] < mouth_right[0] and left_eye[1] < mouth_left[1]
    assert nose[2] > max(left_eye[2], right_eye[2])  # toward the camera
    middle = (left_eye + right_eye) / 2
    if axis == 1:  # the nose goes to the image's side, and that side's eye away from the camera
        assert sign * (nose[0] - middle[0]) > 20 and sign * (right_eye[2] - left_eye[2]) < -20
    if axis == 0:  # looking up brings the mouth nearer than the eyes
        straight = FaceReader(options(models)).read(take_photo(head(5), (0, 0, 0)).picture).keypoints
        assert sign * ((mouth_left - left_eye)[2] - (straight[3] - straight[0])[2]) > 15
    if axis == 2:  # clockwise: the eye at the right goes down
        assert sign * (right_eye[1] - left_eye[1]) > 20


def test_the_embedding_is_the_models_own(done, models, truth):
    """As InsightFace's own pipeline gives it, and not normalised."""
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(str(models / "models/buffalo_l"), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_size=(640, 640))
    (face,) = app.get(truth["anna"]["00_left.png"].picture)
    keypoints, pose, embedding = rows_of(done[0], "anna")["00_left.png"]
    np.testing.assert_allclose(embedding, face.embedding, rtol=1e-5)
    np.testing.assert_allclose(pose, face.pose, rtol=1e-5)
    np.testing.assert_array_equal(keypoints[2:], face.landmark_3d_68[[30, 48, 54]])
    assert abs(np.linalg.norm(embedding) - 1) > 10


@pytest.mark.parametrize("crops", [("five@1",), ("five@1.12", "three@1.12")])
def test_a_profile_is_embedded_by_the_mean_of_its_crops(models, truth, crops):
    """With points that InsightFace's detector and models find: yaw 55 is a profile, and 20 is none."""
    reader = FaceReader(options(models, crops=crops))
    recogniser, detector = reader._models["recognition"], reader._models["detection"]
    for name, names in (("session 2/right.png", crops), ("04_roll.png", ("five@1",))):
        picture = truth["anna"][name].picture
        (points,) = detector.detect(picture, max_num=1)[1]
        cut = [
            cv2.warpAffine(picture, transform, (112, 112))
            for transform in crop_transforms(points, truth["anna"][name].pose[1], names)
        ]
        wanted = np.stack([recogniser.get_feat(crop)[0] for crop in cut]).mean(0)
        np.testing.assert_allclose(reader.read(picture).embedding, wanted, rtol=1e-4, atol=1e-3)


def test_five_at_1_is_insightfaces_own_crop(truth):
    photo = truth["anna"]["04_roll.png"]
    points = photo.keypoints[:, :2].astype(np.float32)
    (transform,) = crop_transforms(points, 20, ["five@1"])
    np.testing.assert_allclose(transform, estimate_norm(points), atol=1e-4)
    wanted = norm_crop(photo.picture, points).astype(int)
    found = cv2.warpAffine(photo.picture, transform, (112, 112)).astype(int)
    assert abs(found - wanted).max() <= 1


def test_pillow_cuts_what_opencv_cuts(truth):
    """Their pixel centres are at halves and at whole numbers, and one is cubic, the other linear."""
    photo = truth["anna"]["00_left.png"]
    picture = blurred(photo.picture, 3)
    transforms = crop_transforms(photo.keypoints[:, :2], -40, ["five@1", "three@1.12"])
    for transform in transforms:
        from_halves = transform.copy()
        from_halves[:, 2] += 0.5 - transform[:, :2] @ (0.5, 0.5)
        (found,) = cut_crops(picture, from_halves[None])
        wanted = cv2.warpAffine(picture, transform, (112, 112))
        assert abs(found.astype(int) - wanted)[1:-1, 1:-1].mean() < 1
        (apart,) = cut_crops(picture, transform[None])
        assert abs(apart.astype(int) - wanted).mean() < 5


def test_the_front_is_the_sharp_near_frontal_one(done):
    entries = [entry["image_path"] for entry in metadata(done[0], "front")["metadata"]]
    assert entries == ["anna/02_near_front.png", "bert/clip.avi", "dora/front.jpg"]
    assert metadata(done[0], "front")["metadata"][1]["frame_index"] == 4  # at yaw -12


def test_failures_have_reasons(done):
    report = json.loads((done[0] / "failed_images.json").read_text(encoding="utf-8"))
    reasons = {
        reason: sorted(item["image_path"] for item in items) for reason, items in report["failed_details"].items()
    }
    assert reasons == {
        "read_error": ["dora/broken.jpg", "dora/broken.mp4", "dora/empty.png"],
        "no_face_detected": ["dora/nobody.png"],
        "face_too_small": ["dora/small.png"],
        "several_faces": ["dora/two.png"],
        "too_blurry": ["dora/blurry.png"],
        "not_a_picture": ["dora/notes.txt"],
    }
    assert report["failed"] == done[1].failed == 8
    assert report["successful"] == 6 + 4 + 3 + 2 + 1 and report["total_images"] == 16 + 8
    assert report["failed_details"]["several_faces"][0]["error"] == "2 faces, at most 1 may be in a picture"
    assert "it must have 60" in report["failed_details"]["face_too_small"][0]["error"]
    assert report["skipped_persons"] == done[1].skipped
    assert set(done[1].skipped) == {"clara", "émile"}
    assert "no frame within 15° of frontal, the nearest is 2" in done[1].skipped["clara"]
    assert done[1].skipped["émile"] == "usable frames: 1; a front and at least one side view are needed"


def test_only_the_kept_face_is_embedded(models, photos, model_calls):
    picture = cv2.imread(str(photos / "dora/two.png"))
    reader = FaceReader(options(models, max_faces=2))
    face = reader.read(picture)
    assert model_calls == {"SCRFD": 1, "Landmark": 1, "ArcFaceONNX": 1}
    assert abs(face.keypoints[2, 0] - SIZE / 2) < 50 or abs(face.keypoints[2, 0] - 1.5 * SIZE) < 80
    with pytest.raises(RefusedError, match="2 faces, at most 1"):
        FaceReader(options(models)).read(picture)


def test_a_bystander_too_small_to_count_does_no_harm(models, truth):
    picture = truth["anna"]["02_near_front.png"].picture
    small = cv2.resize(picture, (100, 100), interpolation=cv2.INTER_AREA)
    wide = np.full((SIZE, SIZE + 200, 3), 128, np.uint8)
    wide[:, :SIZE], wide[50:150, SIZE + 50 : SIZE + 150] = picture, small
    face = FaceReader(options(models)).read(wide)
    assert abs(face.keypoints[:, :2] - truth["anna"]["02_near_front.png"].keypoints[:, :2]).max() < PIXELS


def test_another_embedding_width(tmp_path, two_people):
    make_pack(tmp_path / "root", "narrow", width=128)
    summary = embed_folder(two_people, tmp_path / "out", options(tmp_path / "root", pack="narrow"))
    assert summary.people == ("anna", "bert") and load_face_views(tmp_path / "out").feature_dim == 128


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path, two_people, models, model_calls, monkeypatch
):
    embed_folder(two_people, tmp_path / "whole", options(models))
    assert model_calls == {"SCRFD": 10, "Landmark": 10, "ArcFaceONNX": 10}  # 6 photos, 4 frames
    real, calls = FaceReader.read, []

    def killed(self, picture):
        calls.append(1)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return real(self, picture)

    monkeypatch.setattr(FaceReader, "read", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_folder(two_people, tmp_path / "broken", options(models))
    assert len(list((tmp_path / "broken/.parts").iterdir())) == 1 and not list((tmp_path / "broken").glob("*.npy"))
    monkeypatch.setattr(FaceReader, "read", real)
    model_calls.clear()
    embed_folder(two_people, tmp_path / "broken", options(models))
    assert model_calls["SCRFD"] == 4  # bert's frames only
    names = [path.name for path in (tmp_path / "whole").iterdir() if path.is_file() and path.name != ".lock"]
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


def test_what_changed_is_embedded_again(tmp_path, two_people, models, model_calls):
    out = tmp_path / "out"

    def calls_of(**more):
        model_calls.clear()
        embed_folder(two_people, out, options(models, **more))
        return model_calls.get("SCRFD", 0)

    assert calls_of() == 10
    assert calls_of() == 0
    os.utime(two_people / "anna/03_up.png")  # a new time stamp: anna's files may have changed
    assert calls_of() == 6
    assert calls_of(min_face=61) == 10
    (next((out / ".parts").glob("*.pt"))).write_bytes(b"damaged")
    assert calls_of(min_face=61) in (4, 6)
    (two_people / "anna/03_up.png").unlink()
    assert calls_of(min_face=61) == 5
    shutil.rmtree(two_people / "bert")  # who is gone leaves the set and the parts
    assert calls_of(min_face=61) == 0
    assert load_face_views(out).names == ("anna",) and len(list((out / ".parts").iterdir())) == 1


def test_other_models_invalidate_the_parts(tmp_path, two_people, models, model_calls):
    embed_folder(two_people, tmp_path / "out", options(models))
    make_pack(tmp_path / "root", width=64)
    model_calls.clear()
    embed_folder(two_people, tmp_path / "out", options(tmp_path / "root"))
    assert model_calls["SCRFD"] == 10 and load_face_views(tmp_path / "out").feature_dim == 64


def test_a_truncated_video_keeps_what_can_be_read(photos, tmp_path):
    content = (photos / "bert/clip.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    frames = []
    with pytest.raises(RefusedError, match="decoding stopped after|not a video"):
        for frame, _ in read_pictures(tmp_path / "cut.avi", 1):
            frames.append(frame)
    assert frames == list(range(len(frames))) and len(frames) < FRAMES


def refused(two_people, tmp_path, models, case):
    """(photos, out, options) of a case that must be refused before any work."""
    if case == "missing":
        return tmp_path / "nowhere", tmp_path / "out", options(models)
    if case == "file":
        return two_people / "anna/03_up.png", tmp_path / "out", options(models)
    if case == "empty":
        (tmp_path / "empty/anna").mkdir(parents=True)
        return tmp_path / "empty", tmp_path / "out", options(models)
    if case == "inside":
        return two_people, two_people / "out", options(models)
    if case == "foreign":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/front_feature.npy").touch()
        return two_people, tmp_path / "out", options(models)
    if case == "unwritable":
        (tmp_path / "out").touch()  # a file where the folder should be
        return two_people, tmp_path / "out", options(models)
    if case == "models":
        return two_people, tmp_path / "out", options(tmp_path)
    make_pack(tmp_path / "root", landmarks=False)
    return two_people, tmp_path / "out", options(tmp_path / "root")


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("missing", FileNotFoundError, "nowhere does not exist; give the folder that holds one folder per person"),
        ("file", NotADirectoryError, "is a file; give the folder"),
        ("empty", ValueError, "holds no folder with photos .*make one folder per person"),
        ("inside", ValueError, "out lies in .*photos, where it would be a person"),
        ("foreign", ValueError, "holds a face set that this command did not make"),
        ("unwritable", OSError, "cannot write to .*out.*choose another folder"),
        ("models", FileNotFoundError, r"models.buffalo_l holds no \.onnx file; put the model pack buffalo_l there"),
        ("landmarks", ValueError, "the model pack buffalo_l has no landmark_3d_68"),
    ],
)
def test_errors_come_before_any_work(case, error, message, two_people, tmp_path, models, model_calls):
    with pytest.raises(error, match=message):
        embed_folder(*refused(two_people, tmp_path, models, case))
    assert model_calls == {}


def test_nobody_usable(photos, tmp_path, models):
    shutil.copytree(photos / "clara", tmp_path / "photos/clara")
    with pytest.raises(EmbedError, match=r"nobody has a front and a side view \(clara: no frame within 15°"):
        embed_folder(tmp_path / "photos", tmp_path / "out", options(models))
    report = json.loads((tmp_path / "out/failed_images.json").read_text(encoding="utf-8"))
    assert "clara" in report["skipped_persons"] and report["successful"] == 3
    summary = embed_folder(tmp_path / "photos", tmp_path / "out", options(models, front_angle=30.0))
    assert summary.people == ("clara",)


def test_the_command_line(two_people, tmp_path, models, capsys):
    flags = ["--i_have_consent", "--models", str(models), "--frame_stride", "4", "--front-angle", "20"]
    embed.main([str(two_people), str(tmp_path / "out"), *flags])
    assert "2 people, 8 side views; 0 pictures not used" in capsys.readouterr().out
    assert load_face_views(tmp_path / "out").names == ("anna", "bert")
    with pytest.raises(SystemExit, match="error: face embeddings are biometric data"):
        embed.main([str(two_people), str(tmp_path / "out")])


def test_without_insightface_one_message_says_what_to_install(two_people, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(ImportError, match=r'needs InsightFace: pip install "\.\[insightface\]"'):
        embed_folder(two_people, tmp_path / "out", EmbedOptions(i_have_consent=True))
    with pytest.raises(SystemExit, match=r'error: embedding photos needs InsightFace: pip install "\.\[insightface'):
        embed.main([str(two_people), str(tmp_path / "out"), "--i_have_consent"])


def test_half_written_files_of_a_killed_run_are_removed_and_a_second_run_is_refused(two_people, models, tmp_path):
    """They hold embeddings, perhaps of people who were taken away since."""
    left = tmp_path / "set/video_feature.npy.4321.part"
    left.parent.mkdir()
    left.write_bytes(b"half of an array")
    embed_folder(two_people, left.parent, options(models))
    assert not left.exists() and (left.parent / "video_feature.npy").is_file()
    with only_writer(left.parent, "OUT"), pytest.raises(OSError, match=f"another run is writing to {left.parent}"):
        embed_folder(two_people, left.parent, options(models))
