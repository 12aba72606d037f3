"""Trainings of studies, side by side; their results are kept, so that a second run only does what is missing."""

import ast
import functools
import hashlib
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import joblib
import torch
from joblib.parallel import get_active_backend
from torch import nn

from viewdiff_nb import files
from viewdiff_nb.faces import Split
from viewdiff_nb.files import RUNS, read_json, write_text
from viewdiff_nb.modules.projection import FINE
from viewdiff_nb.training import TrainConfig, TrainingAdvice, TrainResult, train, train_together
from viewdiff_nb.training.devices import with_cuda_graph
from viewdiff_nb.training.one_pass import refusal, shared_part

Result = TypeVar("Result")
PACKAGE = Path(__file__).parents[1]
RESULT_CODE = (
    "faces/crops.py",
    "faces/geometry.py",
    "faces/pairs.py",
    "faces/splits.py",
    "faces/views.py",
    "calibration.py",
    "drop_in.py",
    "metrics.py",
    "modules/*.py",
    "training/*.py",
    "studies/ablation.py",
    "studies/adaptation.py",
    "studies/candidates.py",
    "studies/control_rows.py",
    "studies/controls.py",
    "studies/operating_points.py",
    "studies/real_benchmark.py",
    "studies/real_faces.py",
    "studies/real_models.py",
    "studies/real_points.py",
    "studies/real_rates.py",
    "studies/robustness.py",
    "studies/significance.py",
    "studies/store.py",
)
"""What trains and scores. The rest of the package draws, or makes faces, whose tensors are in the key."""


class DamagedResult(UserWarning):
    """A stored result that cannot be read, and is made again."""


class Store:
    """Finished results of trainings, a JSON file each.

    Its name is a hash of all that made it: the training's name and config, the data, the code and torch's version. A
    base model counts by the name of its file, wherever that lies. Training times are those of the machine, and of its
    load, on which a result was made.
    """

    def __init__(self, split: Split, folder: Path = RUNS) -> None:
        self.folder = folder / "study"
        self.made_by = {"data": fingerprint(split), "code": code_fingerprint(), "torch": torch.__version__}

    def path(self, name: str, config: TrainConfig) -> Path:
        return self._path(_key(name, config))

    def _path(self, key: dict) -> Path:
        text = json.dumps(key | self.made_by, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def checkpoint(self, name: str, config: TrainConfig) -> Path:
        """Where weights are kept beside the result."""
        return self.path(name, config).with_suffix(".pth")

    def find(self, name: str, config: TrainConfig, with_weights: bool = False) -> dict | None:
        """The stored result; None if it or its `checkpoint` is missing, or (with a warning) if it is damaged."""
        path = self._path(key := _key(name, config))
        if not path.is_file() or (with_weights and not path.with_suffix(".pth").is_file()):
            return None
        try:
            found = read_json(path, ValueError)
            if not isinstance(found, dict) or found.get("key") != key:
                raise ValueError(f"{path}: is not the result of its key")
            if found.pop("sha256", None) != files.fingerprint(json.dumps(found).encode()):
                raise ValueError(f"{path}: its checksum is that of another result")
        except ValueError as error:
            warnings.warn(f"{error}; the result is made again", DamagedResult, stacklevel=3)
            return None
        return found

    def get(self, name: str, config: TrainConfig, make: Callable[[], dict], with_weights: bool = False) -> dict:
        """The stored result, or make(), stored; with_weights: make also writes the file `checkpoint`."""
        if (found := self.find(name, config, with_weights)) is not None:
            return found
        made = json.loads(json.dumps({"key": _key(name, config)} | make()))  # what is read again
        write_text(self.path(name, config), json.dumps(made | {"sha256": files.fingerprint(json.dumps(made).encode())}))
        return made


def _key(name: str, config: TrainConfig) -> dict:
    told = config.to_dict()
    if told["base_model_path"]:
        told["base_model_path"] = Path(told["base_model_path"]).name
    return json.loads(json.dumps({"name": name, "config": told}))


def fingerprint(split: Split) -> str:
    """A hash of all tensors of a split."""
    digest = hashlib.sha256()
    for faces in (split.train, split.val, split.test):
        for rows in (faces.front, faces.src, faces.keypoints_3d, faces.angles, faces.person, faces.pose_error):
            if rows is not None:
                digest.update(rows[:].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@functools.cache
def code_fingerprint(folder: Path = PACKAGE, patterns: Iterable[str] = RESULT_CODE) -> str:
    """A hash of what Python files do; comments, docstrings and the layout of the lines are no part of it."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        tree = _WithoutTexts().visit(ast.parse(path.read_text(encoding="utf-8")))
        digest.update(f"{path.relative_to(folder).as_posix()} {ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


class _WithoutTexts(ast.NodeTransformer):
    """Removes statements that are nothing but a text, as docstrings are."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def passes(configs: Iterable[TrainConfig], most: int) -> list[list[TrainConfig]]:
    """Configs grouped by what can be trained in one pass, at most so many; expensive passes first.

    Of grids finer than `FINE` only as many as have the voxels of so many of that one: their base is the smaller part.
    """
    groups: dict[TrainConfig, list[TrainConfig]] = {}
    for config in configs:
        groups.setdefault(config if refusal(config) else shared_part(config), []).append(config)
    found = []
    for shared, group in groups.items():
        resolution = max(FINE, shared.voxel_resolution if shared.use_projection_layer else FINE)
        size = max(1, most * FINE**3 // resolution**3)
        found += [group[i : i + size] for i in range(0, len(group), size)]
    return sorted(found, key=lambda group: -len(group) * group[0].voxel_resolution ** 3 * group[0].use_projection_layer)


def train_pass(configs: Sequence[TrainConfig], split: Split, model: nn.Module | None = None) -> list[TrainResult]:
    """Train a config, or several in one pass; on a GPU as a CUDA graph.

    Raises:
        FloatingPointError, TrainingDiverged: if a loss is not finite.
    """
    configs = [with_cuda_graph(config) for config in configs]
    with warnings.catch_warnings(action="ignore", category=TrainingAdvice):  # bad settings are compared on purpose
        if len(configs) == 1:
            return [train(configs[0], split.train, split.val, model, progress=False)]
        results = train_together(configs, split.train, split.val)
    for config, result in zip(configs, results, strict=True):
        if result.stopped == "diverged":
            what = f"rank {config.rank}, lambda {config.lambda_prior:g}, seed {config.seed}"
            raise FloatingPointError(f"{what}: the loss is not finite")
    return results


def run_jobs(
    function: Callable[..., Result], jobs: Sequence[tuple], workers: int | None = None, progress: Callable = iter
) -> list[Result]:
    """function(*job) of every job, in the order in which they are done.

    The caller's `joblib.parallel_config` says where: by default in processes of this machine, which share its cores.
    Steps of these models are small: two processes with a core each get more done than one with two.

    Args:
        workers: at once; by default what the parallel_config says, or one per GPU, or per core, eight at most. With
            several GPUs each worker stays on one.
        progress: wraps the list of jobs, e.g. tqdm.
    """
    if not jobs:
        return []
    backend, configured = get_active_backend()
    workers = workers or configured or torch.cuda.device_count() or min(os.cpu_count() or 1, 8)
    return_as = "generator_unordered" if backend.supports_return_generator else "list"
    parallel = joblib.Parallel(min(workers, len(jobs)), return_as=return_as, batch_size=1)
    done = parallel(joblib.delayed(_on_own_gpu)(function, *job) for job in jobs)
    return [result for _, result in zip(progress(jobs), done, strict=True)]


def _on_own_gpu(function: Callable[..., Result], *job: object) -> Result:
    """function(*job) on the GPU that falls to this process of a pool, whose name ends with a number."""
    number = multiprocessing.current_process().name.rpartition("-")[2]
    if torch.cuda.device_count() > 1 and number.isdigit():
        torch.cuda.set_device(int(number) % torch.cuda.device_count())
    return function(*job)
