"""The builder with three people and a small stand-in for the recogniser: no network."""

import json
from dataclasses import replace

import numpy as np
import pytest
from people import build as builder
from people.build import BuildConfig, Studio, build, claim_folder, crop_alone, main, sample_poses
from people.sheet import draw_sheet

from viewdiff_nb.faces.crops import PROFILE, PROFILE_CROPS
from viewdiff_nb.faces.geometry import face_rotation, rotation_matrix
from viewdiff_nb.faces.recogniser import MobileFaceNet, embed_crops

FILES = [f"{kind}_{part}" for kind in ("front", "video") for part in ("feature.npy", "keypoints.npy", "metadata.json")]
CONFIG = BuildConfig(people=3, views=4, seed=7, chunk=1)


class Averages:
    """Embeds a crop as the normalised mean colours of its 16 x 16 blocks."""

    name = "block averages"
    feature_dim = 7 * 7 * 3

    def embed(self, crops):
        blocks = crops.reshape(len(crops), 7, 16, 7, 16, 3).mean((2, 4)).reshape(len(crops), -1)
        return (blocks / np.linalg.norm(blocks, axis=1, keepdims=True)).astype(np.float32)


class Interrupted(Averages):
    """Works for one person, then stops like a user pressing Ctrl-C."""

    calls = 0

    def embed(self, crops):
        Interrupted.calls += 1
        if Interrupted.calls > 1:
            raise KeyboardInterrupt
        return super().embed(crops)


@pytest.fixture(scope="module")
def studio():
    return Studio()


@pytest.fixture
def one_studio(studio, monkeypatch):
    """Let all builds share the studio, which takes seconds to make."""
    monkeypatch.setattr(builder, "Studio", lambda: studio)
    monkeypatch.setattr(builder, "_tools_of", {})


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_the_six_files_agree(tmp_path, one_studio, studio):
    build(tmp_path, CONFIG, make_recogniser=Averages)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == sorted(FILES)
    for kind, count in (("front", 3), ("video", 12)):
        features = np.load(tmp_path / f"{kind}_feature.npy", allow_pickle=False)
        keypoints = np.load(tmp_path / f"{kind}_keypoints.npy", allow_pickle=False)
        metadata = json.loads((tmp_path / f"{kind}_metadata.json").read_text(encoding="utf-8"))
        assert features.shape == (count, Averages.feature_dim) and features.dtype == np.float16
        assert keypoints.shape == (count, 5, 3) and keypoints.dtype == np.float32
        assert metadata["num_samples"] == count == len(metadata["poses"]) == len(metadata["metadata"])
        assert metadata["feature_dim"] == Averages.feature_dim
        assert metadata["standard_info"]["pose_order"] == ["pitch", "yaw", "roll"]
        assert metadata["standard_info"]["recogniser"] == "block averages"
        assert metadata["standard_info"]["crops_of_profiles"] == list(PROFILE_CROPS)
    names = [sample["person_name"] for sample in metadata["metadata"]]
    assert names == [f"person_{index:04d}" for index in range(3) for _ in range(4)]
    shot = studio.shoot(7, 1, 4)  # person 1 anew: its samples are where the metadata says
    np.testing.assert_array_equal(metadata["poses"][4:8], shot.poses[1:])
    np.testing.assert_allclose(keypoints[4:8], shot.keypoints[1:], atol=1e-3)
    np.testing.assert_allclose(features[4:8], embed_crops(Averages(), shot.crops)[1:], atol=1e-3)


def test_metadata_has_one_sample_a_line(tmp_path, one_studio):
    build(tmp_path, CONFIG, make_recogniser=Averages)
    lines = (tmp_path / "video_metadata.json").read_text(encoding="utf-8").splitlines()
    assert sum('"person_name"' in line for line in lines) == 12
    assert max(len(line) for line in lines if '"person_name"' in line) < 40


def test_an_interrupted_build_goes_on_and_ends_with_the_same_bytes(tmp_path, one_studio):
    whole, broken, work = tmp_path / "whole", tmp_path / "broken", tmp_path / "work"
    for folder in (whole, broken):
        folder.mkdir()
    build(whole, CONFIG, make_recogniser=Averages)
    Interrupted.calls = 0
    with pytest.raises(KeyboardInterrupt):
        build(broken, CONFIG, work=work, make_recogniser=Interrupted)
    assert sorted(path.name for path in work.iterdir()) == ["config.json", "part_00000.npz"]
    first = (work / "part_00000.npz").stat().st_mtime_ns
    build(broken, CONFIG, work=work, make_recogniser=Averages)
    assert (work / "part_00000.npz").stat().st_mtime_ns == first  # not made again
    assert contents(whole) == contents(broken)


def test_parts_of_another_build_are_refused(tmp_path):
    claim_folder(tmp_path, {"seed": 0, "views": 16})
    claim_folder(tmp_path, {"seed": 0, "views": 16})
    with pytest.raises(ValueError, match=r"parts of another build \(seed: 0 there, 1 now\)"):
        claim_folder(tmp_path, {"seed": 1, "views": 16})


def test_parts_without_their_configuration_are_refused(tmp_path):
    (tmp_path / "part_00000.npz").touch()
    with pytest.raises(ValueError, match=r"holds parts but no config\.json"):
        claim_folder(tmp_path, {})


def test_every_person_covers_the_yaw_range_from_both_sides():
    for seed in range(20):
        poses = sample_poses(np.random.default_rng(seed), 16)
        assert poses.shape == (17, 3)
        assert abs(poses[0]).max() <= 5
        edges = np.linspace(-90, 90, 17)
        assert (poses[1:, 1] >= edges[:-1] - 0.005).all() and (poses[1:, 1] <= edges[1:] + 0.005).all()
        assert abs(poses[1:, [0, 2]]).max() <= 20
        assert (poses == np.round(poses, 2)).all()


def test_stored_poses_are_those_of_the_keypoints(studio):
    """The rotation read off the keypoints differs between views as the stored poses do."""
    import torch

    shot = studio.shoot(0, 2, 8)
    read = face_rotation(torch.from_numpy(shot.keypoints))
    stored = rotation_matrix(torch.from_numpy(shot.poses).deg2rad())
    constant_tilt = stored.mT @ read  # the same for all views of one head, but for jitter and perspective
    spread = torch.linalg.matrix_norm(constant_tilt - constant_tilt.mean(0))
    assert spread.max() < 0.35  # a yaw of 20 degrees would make 0.49


def same_crops(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first.crops, second.crops, strict=True))


def test_profiles_get_the_named_crops_and_others_one(studio):
    shot = studio.shoot(0, 0, 8, ("five@1", "three@1.2", "five@0.8"))
    profile = abs(shot.poses[:, 1]) >= PROFILE
    assert 2 <= profile.sum() <= 6 and not profile[0]
    assert [len(crops) for crops in shot.crops] == [3 if side else 1 for side in profile]
    usual = studio.shoot(0, 0, 8, ("five@1",))  # nothing else depends on the crops
    assert all(np.array_equal(many[0], one[0]) for many, one in zip(shot.crops, usual.crops, strict=True))
    np.testing.assert_array_equal(shot.keypoints, usual.keypoints)
    np.testing.assert_array_equal(shot.poses, usual.poses)


def test_crops_decide_what_is_embedded(tmp_path, one_studio):
    features = []
    for number, crops in enumerate((("five@1",), ("five@1", "three@1.2"))):
        (tmp_path / str(number)).mkdir()
        build(tmp_path / str(number), replace(CONFIG, crops=crops), make_recogniser=Averages)
        features.append(np.load(tmp_path / str(number) / "video_feature.npy"))
    poses = np.array(json.loads((tmp_path / "0" / "video_metadata.json").read_text(encoding="utf-8"))["poses"])
    differs = (features[0] != features[1]).any(1)
    assert (differs == (abs(poses[:, 1]) >= PROFILE)).all() and differs.any() and not differs.all()


def test_people_differ_and_are_reproducible(studio):
    first, again, other = studio.shoot(0, 0, 2), studio.shoot(0, 0, 2), studio.shoot(0, 1, 2)
    assert same_crops(first, again)
    assert not same_crops(first, other) and (first.poses != other.poses).any()
    assert not same_crops(first, studio.shoot(1, 0, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"people": 0}, "people must be a whole number of 1 or more, got 0"),
        ({"views": 1.5}, "views .* got 1.5"),
        ({"seed": -1}, "seed must be a whole number of 0 or more, got -1"),
        ({"crops": ()}, "crops must name one crop or more"),
        ({"crops": ("five@1", "side@1")}, "a crop is named by .* got 'side@1'"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BuildConfig(**change)


def test_no_workers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="workers must be 1 or more, got 0"):
        build(tmp_path, CONFIG, workers=0, make_recogniser=Averages)


def test_the_sheet_shows_a_row_a_person(tmp_path, studio):
    from PIL import Image

    draw_sheet(tmp_path / "sheet.png", studio, people=2)
    assert Image.open(tmp_path / "sheet.png").size == (9 * 112, 2 * 112)


def test_the_command_line_builds(tmp_path, one_studio, monkeypatch):
    monkeypatch.setattr(builder, "build", lambda *arguments: calls.append(arguments))
    calls = []
    flags = ["--people", "5", "--views", "3", "--seed", "2", "--workers", "2"]
    main([str(tmp_path / "new"), *flags])
    main([str(tmp_path / "new"), *flags, "--recogniser", "mobilefacenet192"])
    main([str(tmp_path / "new"), *flags, "--crops", "five@1", "three@1.3"])
    usual = BuildConfig(people=5, views=3, seed=2)
    assert calls == [
        (tmp_path / "new", usual, 2, None, MobileFaceNet),
        (tmp_path / "new", usual, 2, None, crop_alone),
        (tmp_path / "new", replace(usual, crops=("five@1", "three@1.3")), 2, None, MobileFaceNet),
    ]
    assert usual.crops == PROFILE_CROPS


def test_recognisers_are_made_by_their_names(monkeypatch):
    monkeypatch.setattr(builder, "MobileFaceNet", lambda mirrored=True: mirrored)
    assert builder.crop_alone() is False and builder.RECOGNISERS["mobilefacenet192"] is crop_alone
    assert builder.RECOGNISERS["mobilefacenet"] is MobileFaceNet


def test_the_command_line_wants_a_folder(capsys):
    with pytest.raises(SystemExit):
        main(["--people", "5"])
    assert "give the folder for the six files, or --sheet PATH" in capsys.readouterr().err
