"""Through InsightFace's own FaceAnalysis, with the small models of tiny_insightface."""

import numpy as np
import pytest
import torch
from conftest import network_that_moves
from insightface.app import FaceAnalysis
from tiny_insightface import head, make_pack, take_photo

from viewdiff_nb.drop_in import DropIn
from viewdiff_nb.face_analysis import FrontalFaceAnalysis
from viewdiff_nb.faces.photo_reader import EmbedOptions, FaceReader

RAW, WHOLE = (0.0, "none"), (1.0, "none")
WAYS = (RAW, RAW, WHOLE, WHOLE, WHOLE)


def model_of(width):
    return DropIn(network_that_moves(width), WAYS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("insightface")
    make_pack(root, "tiny", width=24)
    return root


def make_app(root, **options):
    app = FaceAnalysis("tiny", root=str(root), providers=["CPUExecutionProvider"], **options)
    return app


@pytest.fixture(scope="module")
def app(root):
    app = FrontalFaceAnalysis(make_app(root), model_of(24))
    app.prepare(ctx_id=-1, det_size=(512, 512))  # of the app itself
    return app


@pytest.mark.parametrize("yaw", [-60.0, 5.0, 55.0])
def test_a_face_has_what_the_model_makes_of_its_pose_and_keypoints(app, root, yaw):
    photo = take_photo(head(3), (4.0, yaw, -3.0))
    (face,) = app.get(photo.picture)
    read = FaceReader(EmbedOptions(models=root, pack="tiny", det_size=512, min_sharpness=0.0, crops=("five@1",)))
    own = read.read(photo.picture)
    assert abs(own.pose[1] - yaw) < 4
    src = torch.from_numpy(own.embedding)[None]
    angles, points = torch.from_numpy(own.pose).float().deg2rad()[None], torch.from_numpy(own.keypoints)[None]
    expected = app.model(src, angles, points, return_residual=False)[0].detach().numpy()
    np.testing.assert_allclose(face.frontal_embedding, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    near = abs(yaw) < 45
    cosine = face.frontal_embedding @ face.embedding / np.linalg.norm(face.embedding) ** 2
    assert (cosine > 0.9999) == near
    np.testing.assert_allclose(np.linalg.norm(face.frontal_embedding), np.linalg.norm(face.embedding), rtol=1e-5)


def test_a_picture_without_a_face(app):
    assert app.get(take_photo(head(3), (0.0, 0.0, 0.0), discs=False).picture) == []


def test_a_model_of_another_recogniser_is_refused(root):
    app = FrontalFaceAnalysis(make_app(root), model_of(32))
    app.prepare(ctx_id=-1, det_size=(512, 512))
    with pytest.raises(ValueError, match="this app's embeddings have 24 numbers, the model reads 32"):
        app.get(take_photo(head(3), (0.0, 0.0, 0.0)).picture)


def test_an_app_that_tells_no_pose_is_refused_before_any_work(root):
    app = make_app(root, allowed_modules=["detection", "recognition"])
    with pytest.raises(ValueError, match="the app has no landmark_3d_68"):
        FrontalFaceAnalysis(app, model_of(24))
