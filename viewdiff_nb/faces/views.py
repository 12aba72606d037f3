"""Face views on disk and in memory.

On disk a set is a folder of six files (the guide's format):

    front_feature.npy    [N, D]     frontal embeddings, one per person
    front_keypoints.npy  [N, 5, 3]  pixels; x right, y down, z toward the camera
    front_metadata.json             num_samples, feature_dim, standard_info,
                                    poses: [pitch, yaw, roll] in degrees per sample,
                                    metadata: a list with a person_name per sample
    video_feature.npy, video_keypoints.npy, video_metadata.json   the same for M side views

The target of a side view is the frontal sample of the same person_name.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

YAW_BINS = ((0, 30), (30, 45), (45, 60), (60, 75), (75, 90))  # |yaw| in degrees, upper end included in the last
MAX_ANGLE = 180.0


class FaceDataError(ValueError):
    """A face set that cannot be used; the message names the file and the row."""


@dataclass(frozen=True)
class FaceViews:
    """P people with one frontal embedding each, and M side views of them.

    names: P person names.
    front: (P, D) frontal embeddings.
    src: (M, D) side-view embeddings.
    keypoints_3d: (M, 5, 3) of the side views, pixels, x right, y down, z toward the camera.
    angles: (M, 3) pitch, yaw, roll of the side views in radians.
    person: (M,) int64, the row of front (and of names) that a side view belongs to.
    """

    names: tuple[str, ...]
    front: Tensor
    src: Tensor
    keypoints_3d: Tensor
    angles: Tensor
    person: Tensor

    def __len__(self) -> int:
        """The number of side views."""
        return len(self.src)

    @property
    def feature_dim(self) -> int:
        return self.src.shape[1]

    @property
    def device(self) -> torch.device:
        return self.src.device

    @property
    def abs_yaw(self) -> Tensor:
        """(M,) |yaw| of the side views in degrees."""
        return self.angles[:, 1].rad2deg().abs()

    @property
    def target(self) -> Tensor:
        """(M, D) the frontal embedding of each side view's person."""
        return self.front[self.person]

    def conditions(self, index: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        """The model's inputs beside src for some side views: angles, keypoints_3d, pose."""
        angles = self.angles[index]
        return {"angles": angles, "keypoints_3d": self.keypoints_3d[index], "pose": angles}

    def to(self, device: torch.device | str) -> "FaceViews":
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "names"}
        return replace(self, **moved)

    def where(self, keep: Tensor) -> "FaceViews":
        """Only the side views in keep, a (M,) mask or index; all people stay."""
        picked = {name: getattr(self, name)[keep] for name in ("src", "keypoints_3d", "angles", "person")}
        return replace(self, **picked)

    def select(self, people: Tensor) -> "FaceViews":
        """Only the people in the index (Q,), in that order, and their side views; person is renumbered."""
        new_row = torch.full((len(self.names),), -1, dtype=torch.long, device=self.device)
        new_row[people] = torch.arange(len(people), device=self.device)
        kept = self.where(new_row[self.person] >= 0)
        return replace(kept, names=tuple(self.names[i] for i in people.tolist()), front=self.front[people],
                       person=new_row[kept.person])  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Three sets of different people."""

    train: FaceViews
    val: FaceViews
    test: FaceViews


def split_by_person(faces: FaceViews, val: int, test: int, seed: int = 0) -> Split:
    """Split by identity, never by sample, into train, val and test people.

    Args:
        val, test: number of people in each; the others train.
        seed: of the draw. It is not the training seed: test people stay the same whatever is trained.
    """
    total = len(faces.names)
    if val < 2 or test < 2 or val + test > total - 2:
        raise ValueError(f"of {total} people, val={val} and test={test} must be at least 2 each and leave 2 to train")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(faces.device)
    parts = order[: total - val - test], order[total - val - test : total - test], order[total - test :]
    return Split(*(faces.select(part.sort().values) for part in parts))


def load_face_views(folder: str | Path, device: torch.device | str = "cpu") -> FaceViews:
    """Load and check a face set.

    Raises:
        FileNotFoundError: naming the files that are not there.
        FaceDataError: naming file and row, for anything that does not hold together.
    """
    folder = Path(folder)
    paths = [folder / f"{kind}_{part}" for kind in ("front", "video")
             for part in ("feature.npy", "keypoints.npy", "metadata.json")]  # fmt: skip
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"face set {folder} lacks {', '.join(missing)}")
    front, _, _, names = _load_samples(folder, "front")
    src, keypoints, angles, owners = _load_samples(folder, "video")
    if front.shape[1] != src.shape[1]:
        raise FaceDataError(f"{folder / 'video_feature.npy'}: embeddings are {src.shape[1]} wide, the frontal ones "
                            f"{front.shape[1]}")  # fmt: skip
    rows = {}
    for i, name in enumerate(names):
        if name in rows:
            raise FaceDataError(f"{folder / 'front_metadata.json'}: row {i}: person {name!r} already has a frontal "
                                f"sample in row {rows[name]}; keep one per person")  # fmt: skip
        rows[name] = i
    for i, name in enumerate(owners):
        if name not in rows:
            raise FaceDataError(f"{folder / 'video_metadata.json'}: row {i}: person {name!r} has no frontal sample")
    person = torch.tensor([rows[name] for name in owners])
    return FaceViews(tuple(names), front, src, keypoints, angles.deg2rad(), person).to(device)


def _load_samples(folder: Path, kind: str) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Features (N, D), keypoints (N, 5, 3), poses in degrees (N, 3) and person names of one half of a set."""
    features = _load_array(folder / f"{kind}_feature.npy", (None, None))
    count = len(features)
    if not count:
        raise FaceDataError(f"{folder / f'{kind}_feature.npy'}: holds no sample")
    lengths = np.linalg.norm(features, axis=1)
    if not lengths.all():
        raise FaceDataError(f"{folder / f'{kind}_feature.npy'}: row {int(lengths.argmin())}: the embedding is zero")
    keypoints = _load_array(folder / f"{kind}_keypoints.npy", (count, 5, 3))
    path = folder / f"{kind}_metadata.json"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FaceDataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(metadata, dict) or not {"poses", "metadata"} <= metadata.keys():
        raise FaceDataError(f"{path}: must be an object with at least 'poses' and 'metadata'")
    declared = {"num_samples": count, "feature_dim": features.shape[1]}
    for key, value in declared.items():
        if metadata.get(key, value) != value:
            raise FaceDataError(f"{path}: {key} is {metadata[key]}, but {kind}_feature.npy has {value}")
    for key in ("poses", "metadata"):
        if not isinstance(metadata[key], list) or len(metadata[key]) != count:
            size = len(metadata[key]) if isinstance(metadata[key], list) else type(metadata[key]).__name__
            raise FaceDataError(f"{path}: '{key}' must list {count} entries, one per sample, got {size}")
    return (torch.from_numpy(features), torch.from_numpy(keypoints), _poses(path, metadata["poses"]),
            _person_names(path, metadata["metadata"]))  # fmt: skip


def _load_array(path: Path, shape: tuple[int | None, ...]) -> np.ndarray:
    """A finite float array of the shape wanted (None: any length), as float32; pickles are refused."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FaceDataError(f"{path}: not a readable .npy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise FaceDataError(f"{path}: must hold floats, got {getattr(array, 'dtype', type(array).__name__)}")
    if len(array.shape) != len(shape) or any(w not in (None, n) for n, w in zip(array.shape, shape, strict=True)):
        wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
        raise FaceDataError(f"{path}: shape is {array.shape}, must be {wanted}")
    finite = np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if not finite.all():
        raise FaceDataError(f"{path}: row {int(finite.argmin())}: not finite ({int((~finite).sum())} such rows)")
    return array.astype(np.float32)


def _poses(path: Path, poses: list) -> Tensor:
    for i, pose in enumerate(poses):
        numbers = isinstance(pose, list) and len(pose) == 3 and all(type(a) in (int, float) for a in pose)
        if not numbers or not all(abs(a) <= MAX_ANGLE for a in pose):  # NaN fails the comparison too
            raise FaceDataError(f"{path}: row {i}: a pose is [pitch, yaw, roll] in degrees within "
                                f"{MAX_ANGLE:g}, got {pose!r}")  # fmt: skip
    return torch.tensor(poses, dtype=torch.float32)


def _person_names(path: Path, entries: list) -> list[str]:
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("person_name"), str) or not entry["person_name"]:
            raise FaceDataError(f"{path}: row {i}: needs a person_name, got {entry!r}")
    return [entry["person_name"] for entry in entries]
