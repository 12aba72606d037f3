"""Frontal embeddings from a trained model:  viewdiff-predict MODEL IN OUT

MODEL is a model that the kit ships (mobilefacenet), a drop-in written by `viewdiff_nb.pretrained.save_drop_in`, or a
checkpoint of training. IN is a folder with a face set's six files, or a .npy of embeddings (N, D) with their --poses.
OUT is a .npy for the predictions (N, D), in the order of IN; beside it OUT.json says what was done.

By default predictions keep a recogniser's gallery and threshold in use (--no-drop_in: the network's whole answer). What
is larger than memory is read and written in parts.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm.auto import tqdm

from viewdiff_nb import __version__
from viewdiff_nb.drop_in import DropIn
from viewdiff_nb.faces.geometry import YAW_BINS, mean_keypoints
from viewdiff_nb.faces.views import FaceDataError, load_face_views, load_rows
from viewdiff_nb.files import write_atomically, write_text
from viewdiff_nb.metrics import yaw_bin
from viewdiff_nb.pretrained import PRETRAINED, is_drop_in, load_drop_in
from viewdiff_nb.training.checkpoint import file_fingerprint, load_model
from viewdiff_nb.training.devices import choose_device


@dataclass(frozen=True)
class PredictOptions:
    """How to predict. Field names are the flags of the command line."""

    poses: Path | None = None
    """With a .npy as IN: a .npy (N, 3) of pitch, yaw, roll in degrees; +yaw turns the nose to the image's right."""
    keypoints: Path | None = None
    """With a .npy as IN: a .npy (N, 5, 3) of keypoints; without, a mean face turned to the pose stands for them."""
    drop_in: bool = True
    """Keep a recogniser's gallery and threshold: at each |yaw| only the part of the step that does them no harm."""
    batch_size: int = 4096
    """Samples read, predicted and written at a time."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")


@dataclass(frozen=True)
class Views:
    """N side views that may lie on disk; what is not known of their keypoints and pose errors is None."""

    src: Tensor
    angles: Tensor
    keypoints_3d: Tensor | None
    pose_error: Tensor | None = None

    def __len__(self) -> int:
        return self.src.shape[0]


def frontal_embeddings(
    model: nn.Module,
    embeddings: np.ndarray | Tensor,
    poses: np.ndarray | Tensor,
    keypoints: np.ndarray | Tensor | None = None,
    batch_size: int = 4096,
) -> np.ndarray:
    """What a model makes of embeddings (N, D), as float32 (N, D).

    Args:
        model: of `load_pretrained`, `load_model` or `drop_in`; one that reads views singly.
        poses: (N, 3) pitch, yaw, roll in degrees.
        keypoints: (N, 5, 3) pixels; None if nobody knows them.

    Raises:
        ValueError: for shapes that do not fit, or numbers that are not finite.
    """
    src, angles = torch.as_tensor(embeddings).float(), torch.as_tensor(poses).float().deg2rad()
    points = None if keypoints is None else torch.as_tensor(keypoints).float()
    views = Views(src, angles, points)
    _check(views, model, "embeddings, poses and keypoints")
    parts = list(_predicted(model, views, batch_size))
    return np.concatenate(parts) if parts else np.zeros((0, src.shape[1]), np.float32)


def _check(views: Views, model: nn.Module, where: str) -> None:
    count, width = views.src.shape if len(views.src.shape) == 2 else (0, 0)
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "embeddings": (views.src, (count, width)),
        "poses": (views.angles, (count, 3)),
    }
    if views.keypoints_3d is not None:
        shapes["keypoints"] = views.keypoints_3d, (count, 5, 3)
    for name, (found, wanted) in shapes.items():
        if tuple(found.shape) != wanted or not width:
            raise ValueError(f"{where}: {name} must be (N, D), (N, 3), (N, 5, 3) of one N, got {tuple(found.shape)}")
    if getattr(model, "cross_view", None) is not None:
        raise ValueError(
            "a model with cross-view attention reads several views of a person at once; use training.predict"
        )
    if (expected := width_of(model, width)) != width:
        raise ValueError(f"{where}: embeddings are {width} wide, and the model reads {expected}")


def width_of(model: nn.Module, default: int = 0) -> int:
    """Of the embeddings that a model reads; default if it does not say."""
    network = model.model if isinstance(model, DropIn) else model
    return getattr(network, "feature_dim", default)


@torch.no_grad()
def _predicted(model: nn.Module, views: Views, batch_size: int) -> Iterator[np.ndarray]:
    """The predictions part by part; a ValueError names the first row that is not finite."""
    model.eval()
    device = next(iter((*model.parameters(), *model.buffers())), views.angles).device
    for start in range(0, len(views), batch_size):
        rows = slice(start, start + batch_size)
        src, angles = views.src[rows].to(device), views.angles[rows].to(device)
        points = mean_keypoints(angles) if views.keypoints_3d is None else views.keypoints_3d[rows].to(device)
        _check_finite(start, embedding=src, pose=angles, keypoints=points)
        told = {} if views.pose_error is None else {"pose_error": views.pose_error[rows].to(device)}
        moved, found = ~raw_rows(model, angles), src.clone()
        if moved.any():  # the network is not asked for what stays raw
            told = {name: values[moved] for name, values in told.items()}
            answer = model(src[moved], angles[moved], points[moved], return_residual=False, **told)
            found[moved] = answer.to(found.dtype)
        _check_finite(start, prediction=found)
        yield found.float().cpu().numpy()


def _check_finite(start: int, **values: Tensor) -> None:
    for name, rows in values.items():
        if not (finite := rows.flatten(1).isfinite().all(1)).all():
            raise ValueError(f"row {start + int(finite.int().argmin())}: its {name} is not finite")


def raw_rows(model: nn.Module, angles: Tensor) -> Tensor:
    """(B,) bool: which views a model answers with the raw embedding, whatever it is; a drop-in does so near the front.

    >>> yaw = torch.tensor([[0.0, 0.1, 0.0], [0.0, -1.2, 0.0]])
    >>> raw_rows(DropIn(nn.Identity(), [(0.0, "none")] * 2 + [(0.25, "none")] * 3), yaw)
    tensor([ True, False])
    """
    ways = model.ways if isinstance(model, DropIn) else [None] * len(YAW_BINS)
    stays = torch.tensor([way == (0.0, "none") for way in ways], device=angles.device)
    return stays[yaw_bin(angles[:, 1].abs().rad2deg())]


def load_any(name: str, drop_in: bool = True) -> tuple[nn.Module, dict]:
    """A model of the kit's, of a drop-in's file or of a checkpoint, and what there is to say of it.

    Raises:
        ValueError: if a drop-in is asked for, and a checkpoint holds only a network.
        FileNotFoundError, CheckpointError: as `load_drop_in` and `load_model`.
    """
    path = PRETRAINED.get(name, Path(name))
    about: dict = {"model": name, "sha256, beginning": file_fingerprint(path) if path.is_file() else None}
    if name in PRETRAINED or is_drop_in(path):
        model, recogniser = load_drop_in(path)
        about["recogniser"] = recogniser
        if drop_in:
            steps = {f"{low}-{high}": way for (low, high), way in zip(YAW_BINS, model.ways, strict=True)}
            return model, about | {"step and centring by |yaw|": steps}
        assert model.model is not None  # or it could not have been saved
        return model.model, about | {"step and centring by |yaw|": None}
    if drop_in and path.is_file():
        raise ValueError(
            f"{name} holds a network alone, whose whole answer may move impostors past a recogniser's threshold. "
            "Choose its steps on people it has not seen (studies.operating_points.drop_in), keep them "
            "(pretrained.save_drop_in), and give that file; or give --no-drop_in"
        )
    return load_model(path), about | {"step and centring by |yaw|": None}


def predict_file(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    options: Annotated[PredictOptions, tyro.conf.arg(name="")] = PredictOptions(),
) -> dict:
    """Predict a file's views; see the top of this file. Returns what OUT.json says.

    Raises:
        FileNotFoundError, ValueError, OSError: for what cannot be read, used or written; OUT is whole or not there.
    """
    if out.suffix != ".npy":
        raise ValueError(f"OUT must be a .npy file, got {out}")
    network, about = load_any(model, options.drop_in)
    network = network.to(choose_device(options.device))
    views = _read(source, options)
    _check(views, network, str(source))
    begun = time.monotonic()
    write_atomically(out, partial(_write, network, views, options.batch_size, str(source)))
    seconds = time.monotonic() - begun
    bins = torch.bincount(yaw_bin(views.angles[:, 1].abs().rad2deg()), minlength=len(YAW_BINS))
    report = {
        "kit": __version__,
        **about,
        "drop_in": options.drop_in,
        "input": str(source),
        "samples": len(views),
        "width": views.src.shape[1],
        "samples by |yaw|": {f"{low}-{high}": int(n) for (low, high), n in zip(YAW_BINS, bins, strict=True)},
        "keypoints": "a mean face at the pose" if views.keypoints_3d is None else "given",
        "seconds": round(seconds, 3),
    }
    write_text(out.with_suffix(".json"), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _read(source: Path, options: PredictOptions) -> Views:
    if source.is_dir():
        if options.poses or options.keypoints:
            raise ValueError(
                f"{source} is a face set with poses and keypoints of its own; leave out --poses, --keypoints"
            )
        faces = load_face_views(source, mmap=True)
        return Views(faces.src, faces.angles, faces.keypoints_3d, faces.pose_error)  # type: ignore[arg-type]
    if source.suffix != ".npy":
        raise ValueError(f"IN must be the folder of a face set or a .npy of embeddings, got {source}")
    if options.poses is None:
        raise ValueError(f"{source} says nothing of head poses, which the model needs; give --poses")
    src = load_rows(source, (None, None), mmap=True, embeddings=True)
    angles = load_rows(options.poses, (src.shape[0], 3))[:].deg2rad()
    points = None
    if options.keypoints is not None:
        points = load_rows(options.keypoints, (src.shape[0], 5, 3), mmap=True)
    return Views(src, angles, points)  # type: ignore[arg-type]


def _write(model: nn.Module, views: Views, batch_size: int, where: str, file: object) -> None:
    """A .npy, its header first, then the rows as they come."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(views), views.src.shape[1])}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
    total = math.ceil(len(views) / batch_size)
    try:
        for part in tqdm(_predicted(model, views, batch_size), total=total, disable=total < 10, unit="batch"):
            file.write(part.astype("<f4").tobytes())  # type: ignore[attr-defined]
    except ValueError as error:
        raise FaceDataError(f"{where}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        report = tyro.cli(
            predict_file, args=arguments, description=__doc__, prog="viewdiff-predict", use_underscores=True
        )
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        sys.exit(f"error: {error}")
    steps = report["step and centring by |yaw|"]
    way = "the network's whole answer" if steps is None else f"raw below {_raw_below(steps)}°, then a part of the step"
    print(f"{report['samples']:,} samples in {report['seconds']:.1f} s; {way}")


def _raw_below(steps: dict[str, Sequence]) -> int:
    """Degrees of |yaw| below which a drop-in answers with the raw embedding."""
    for (low, _), (step, centring) in zip(YAW_BINS, steps.values(), strict=True):
        if step or centring != "none":
            return low
    return int(YAW_BINS[-1][1])


if __name__ == "__main__":
    main()
