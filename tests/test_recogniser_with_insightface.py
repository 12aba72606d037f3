"""An InsightFace pack as a recogniser, with the small models of tiny_insightface."""

import numpy as np
import pytest
from insightface.model_zoo import get_model
from tiny_insightface import make_landmarks, make_pack

from viewdiff_nb.faces.recogniser import embed_crops, make_recogniser


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("insightface")
    make_pack(root, "tiny", width=24)
    return root


@pytest.fixture(scope="module")
def crops():
    return np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)


def test_crop_and_mirrored_crop_are_summed_as_insightfaces_benchmarks_do(models, crops):
    recogniser = make_recogniser(f"insightface:tiny@{models}")
    assert recogniser.name == "InsightFace tiny (w600k_r50.onnx), crop + mirrored crop"
    assert recogniser.feature_dim == 24
    own = get_model(str(models / "models" / "tiny" / "w600k_r50.onnx"))
    wanted = []
    for crop in crops[..., ::-1]:  # BGR
        both = own.get_feat(np.ascontiguousarray(crop)) + own.get_feat(np.ascontiguousarray(crop[:, ::-1]))
        wanted.append(both[0] / np.linalg.norm(both))
    found = recogniser.embed(crops)
    assert found.shape == (5, 24) and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(recogniser.embed(crops[:, :, ::-1]), found, atol=1e-5)  # a sum knows no order
    assert np.abs(recogniser.embed(crops[..., ::-1]) - found).max() > 0.01  # but colours have one


def test_crops_of_a_picture_are_summed(models, crops):
    recogniser = make_recogniser(f"insightface:tiny@{models}")
    each = recogniser.embed(crops)
    found = embed_crops(recogniser, [crops[:1], crops[1:]])
    np.testing.assert_allclose(found[0], each[0], atol=1e-6)
    np.testing.assert_allclose(found[1], each[1:].sum(0) / np.linalg.norm(each[1:].sum(0)), atol=1e-6)


def test_crops_of_another_kind_are_refused(models):
    with pytest.raises(ValueError, match=r"crops must be uint8 RGB of shape \(N, 112, 112, 3\), got uint8 \(1, 64, 64"):
        make_recogniser(f"insightface:tiny@{models}").embed(np.zeros((1, 64, 64, 3), np.uint8))


def test_no_crops_have_no_embeddings(models, crops):
    assert make_recogniser(f"insightface:tiny@{models}").embed(crops[:0]).shape == (0, 24)


def test_a_pack_that_is_not_there_is_named_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("insightface.utils.storage.download_file", lambda *_, **__: pytest.fail("a download"))
    with pytest.raises(FileNotFoundError, match=r"models.tiny holds no \.onnx file"):
        make_recogniser(f"insightface:tiny@{tmp_path}")


def test_a_pack_without_a_recogniser_is_refused(tmp_path):
    pack = make_pack(tmp_path, "tiny")
    (pack / "w600k_r50.onnx").unlink()
    make_landmarks(pack / "1k3d68.onnx")
    with pytest.raises(ValueError, match="the InsightFace pack tiny has no recognition model"):
        make_recogniser(f"insightface:tiny@{tmp_path}")
