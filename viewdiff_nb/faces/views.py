"""Face views in memory, and as a folder of six files (the guide's format):

    front_feature.npy    [N, D]     frontal embeddings, one per person
    front_keypoints.npy  [N, 5, 3]  pixels; x right, y down, z toward the camera
    front_metadata.json             num_samples, feature_dim, standard_info,
                                    poses: [pitch, yaw, roll] in degrees per sample,
                                    metadata: a list with a person_name per sample
    video_feature.npy, video_keypoints.npy, video_metadata.json   the same for M side views

The target of a side view is the frontal sample of the same person_name.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from viewdiff_nb.faces.geometry import KEYPOINT_NAMES, YAW_BINS
from viewdiff_nb.files import DiskRows, chunks, is_text, read_json, read_npy, shorten, write_atomically, write_text

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("front", "video")
MAX_ANGLE = 180.0
SAMPLE_LIMIT = 2**14  # bytes of metadata a sample
# Of an embedding's length: far from 1e-12, below which F.normalize gives no unit vectors, and from 1e19, above which
# squares are infinite in float32. Recognisers give 1, or some tens.
NORMS = (1e-6, 1e6)
NORMS_WANTED = f"float32 calculates with {NORMS[0]:g} to {NORMS[1]:g}. Scale all embeddings alike"
CONVENTIONS = {  # of poses and keypoints, as the metadata states them; see viewdiff_nb.faces.geometry
    "pose_order": ["pitch", "yaw", "roll"],
    "pose_unit": "degrees",
    "pose_signs": "+pitch looks up, +yaw turns the nose to the image's right, +roll is clockwise",
    "rotation": "Rz(roll) Ry(yaw) Rx(pitch)",
    "keypoint_names": list(KEYPOINT_NAMES),
    "keypoint_axes": "x right, y down, z toward the camera",
}

Rows = Tensor | DiskRows  # a first dimension of samples, in memory or in a file


class FaceDataError(ValueError):
    """A face set that cannot be used; the message names the file and the row."""


@dataclass(frozen=True, eq=False)  # two sets are equal if they are the same one: comparing tensors gives no bool
class FaceViews:
    """P people with one frontal embedding each, and M side views of them.

    names, front: P person names, and their (P, D) frontal embeddings.
    src: (M, D) side-view embeddings.
    keypoints_3d: (M, 5, 3) of the side views, pixels, x right, y down, z toward the camera.
    angles: (M, 3) pitch, yaw, roll of the side views in radians.
    person: (M,) int64, the row of front (and of names) that a side view belongs to.
    pose_error: (M, 3) standard deviations of angles in radians; None where poses are exact.

    src and keypoints_3d of a memory-mapped set are `DiskRows`, which give tensors when indexed.
    """

    names: tuple[str, ...]
    front: Tensor
    src: Rows
    keypoints_3d: Rows
    angles: Tensor
    person: Tensor
    pose_error: Tensor | None = None

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
    def on_disk(self) -> bool:
        """Whether side views are read from files when asked for."""
        return isinstance(self.src, DiskRows)

    @property
    def nbytes(self) -> int:
        """Bytes that the set takes in memory."""
        held = self.front, self.src, self.keypoints_3d, self.angles, self.pose_error
        return 8 * len(self.person) + 4 * sum(int(np.prod(values.shape)) for values in held if values is not None)

    @property
    def abs_yaw(self) -> Tensor:
        """(M,) |yaw| of the side views in degrees."""
        return self.angles[:, 1].rad2deg().abs()

    @property
    def target(self) -> Tensor:
        """(M, D) the frontal embedding of each side view's person."""
        return self.front[self.person]

    def conditions(self, index: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        """The model's inputs beside src for some side views."""
        return model_conditions(self.angles[index], self.keypoints_3d[index], _pick(self.pose_error, index))

    def to(self, device: torch.device | str) -> "FaceViews":
        """The set on another device; on the CPU a memory-mapped one stays on disk, see `in_memory`."""
        stays_on_disk = self.on_disk and torch.device(device).type == "cpu"
        return self if stays_on_disk else self.in_memory(device)

    def in_memory(self, device: torch.device | str | None = None) -> "FaceViews":
        """The set with all side views read, if it was memory-mapped; on another device, if one is given."""
        device = self.device if device is None else device
        return replace(
            self,
            front=self.front.to(device),
            src=_read(self.src, device),
            keypoints_3d=_read(self.keypoints_3d, device),
            angles=self.angles.to(device),
            person=self.person.to(device),
            pose_error=_read(self.pose_error, device),
        )

    def where(self, keep: Tensor) -> "FaceViews":
        """Only the side views in keep, a (M,) mask or index; all people stay."""
        return replace(
            self,
            src=_pick(self.src, keep),
            keypoints_3d=_pick(self.keypoints_3d, keep),
            angles=self.angles[keep],
            person=self.person[keep],
            pose_error=_pick(self.pose_error, keep),
        )

    def select(self, people: Tensor) -> "FaceViews":
        """Only the people in (Q,) rows of front, in that order, or in a (P,) mask, and their side views.

        Raises ValueError if somebody comes twice: a side view belongs to one row of front.
        """
        people = torch.arange(len(self.names), device=self.device)[people]
        if (counts := torch.bincount(people, minlength=1)).max() > 1:
            raise ValueError(f"person {int(counts.argmax())} is selected {int(counts.max())} times; select each once")
        new_row = torch.full((len(self.names),), -1, dtype=torch.long, device=self.device)
        new_row[people] = torch.arange(len(people), device=self.device)
        kept = self.where(new_row[self.person] >= 0)
        names = tuple(self.names[i] for i in people.tolist())
        return replace(kept, names=names, front=self.front[people], person=new_row[kept.person])

    def sample_views(self, n: int, generator: torch.Generator) -> "FaceViews":
        """n random side views of every person, or all of one who has fewer, in their old order; by a CPU generator."""
        if n < 1:
            raise ValueError(f"n must be 1 or more, got {n}")
        order = torch.randperm(len(self), generator=generator).to(self.device)
        return self.where(order[running_number(self.person[order]) < n].sort().values)

    def frame(self) -> "pd.DataFrame":
        """One row per side view: person, pitch, yaw, roll (degrees), yaw_bin, cosine (with the person's front).

        yaw_bin is a category of |yaw|, "0-30" to "75-90"; above 90 degrees there is none.
        """
        import pandas as pd  # here, because importing the package shall be quick

        table = pd.DataFrame(self.angles.rad2deg().cpu().numpy(), columns=["pitch", "yaw", "roll"])
        table.insert(0, "person", np.array(self.names, object)[self.person.cpu().numpy()])
        edges = [low for low, _ in YAW_BINS] + [np.nextafter(YAW_BINS[-1][1], np.inf, dtype=np.float32)]
        labels = [f"{low}-{high}" for low, high in YAW_BINS]
        table["yaw_bin"] = pd.cut(self.abs_yaw.cpu().numpy(), edges, right=False, labels=labels)
        cosine = torch.empty(len(self))
        for part in chunks(self.src.shape):
            cosine[part] = torch.cosine_similarity(self.src[part], self.front[self.person[part]])
        table["cosine"] = cosine.numpy()
        return table


def model_conditions(angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None) -> dict[str, Tensor]:
    """What a model is told beside the embedding."""
    told = {"angles": angles, "keypoints_3d": keypoints_3d, "pose": angles}
    return told if pose_error is None else told | {"pose_error": pose_error}


def _pick(values: Any, keep: Tensor | slice) -> Any:  # rows, or None where there are none
    return values.pick(keep) if isinstance(values, DiskRows) else values if values is None else values[keep]


def _read(values: Any, device: torch.device | str) -> Any:
    return values.read(device) if isinstance(values, DiskRows) else values if values is None else values.to(device)


def running_number(owner: Tensor) -> Tensor:
    """(N,) int64 to (N,): how many earlier entries have the same owner.

    >>> running_number(torch.tensor([2, 0, 2, 2, 0])).tolist()
    [0, 0, 1, 2, 1]
    """
    order, counts = owner.argsort(stable=True), torch.bincount(owner)
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[owner[order]]
    return number


def load_face_views(folder: str | Path, device: torch.device | str = "cpu", mmap: bool = False) -> FaceViews:
    """Load and check a face set.

    Args:
        mmap: leave embeddings and keypoints of the side views on disk, for sets larger than memory. Frontal
            embeddings, poses and names are in memory all the same. Device must be the CPU; see `FaceViews.to`.

    Raises:
        FileNotFoundError: naming the files that are not there.
        FaceDataError: naming file and row, for anything that does not hold together.
    """
    folder = Path(folder)
    if mmap and torch.device(device).type != "cpu":
        raise ValueError(f"a memory-mapped set stays on disk; it cannot be loaded to {device}")
    paths = [folder / f"{kind}_{part}" for kind in KINDS for part in ("feature.npy", "keypoints.npy", "metadata.json")]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"face set {folder} lacks {', '.join(missing)}")
    front, _, _, _, names = _load_samples(folder, "front")
    src, keypoints, angles, errors, owners = _load_samples(folder, "video", mmap)
    if front.shape[1] != src.shape[1]:
        wide = f"embeddings are {src.shape[1]} wide, the frontal ones {front.shape[1]}"
        raise FaceDataError(f"{folder / 'video_feature.npy'}: {wide}")
    rows: dict[str, int] = {}
    for i, name in enumerate(names):
        if rows.setdefault(name, i) != i:
            twice = f"{shorten(name)} already has a frontal sample in row {rows[name]}; keep one per person"
            raise FaceDataError(f"{folder / 'front_metadata.json'}: row {i}: person {twice}")
    for i, name in enumerate(owners):
        if name not in rows:
            stranger = f"person {shorten(name)} has no frontal sample"
            raise FaceDataError(f"{folder / 'video_metadata.json'}: row {i}: {stranger}")
    person = torch.tensor([rows[name] for name in owners])
    return FaceViews(tuple(names), front[:], src, keypoints, angles, person, errors).to(device)


def _load_samples(folder: Path, kind: str, mmap: bool = False) -> tuple[Rows, Rows, Tensor, Tensor | None, list[str]]:
    """One half of a set: features (N, D), keypoints (N, 5, 3), poses and their errors in radians (N, 3), N names."""
    features = load_rows(folder / f"{kind}_feature.npy", (None, None), mmap, embeddings=True)
    count, width = features.shape
    if not count:
        raise FaceDataError(f"{folder / f'{kind}_feature.npy'}: holds no sample")
    keypoints = load_rows(folder / f"{kind}_keypoints.npy", (count, 5, 3), mmap)
    path = folder / f"{kind}_metadata.json"
    metadata = read_json(path, FaceDataError, 2**20 + SAMPLE_LIMIT * count)
    if not isinstance(metadata, dict) or not {"poses", "metadata"} <= metadata.keys():
        raise FaceDataError(f"{path}: must be an object with at least 'poses' and 'metadata'")
    for key, value in (("num_samples", count), ("feature_dim", width)):
        if metadata.get(key, value) != value:
            raise FaceDataError(f"{path}: {key} is {shorten(metadata[key])}, but {kind}_feature.npy has {value}")
    poses, entries = metadata["poses"], metadata["metadata"]
    for key, values in (("poses", poses), ("metadata", entries)):
        if not isinstance(values, list) or len(values) != count:
            got = len(values) if isinstance(values, list) else type(values).__name__
            raise FaceDataError(f"{path}: '{key}' must list {count} entries, one per sample, got {got}")
    for i, (pose, entry) in enumerate(zip(poses, entries, strict=True)):
        if not _is_pose(pose):
            wanted = f"a pose is [pitch, yaw, roll] in degrees within {MAX_ANGLE:g}"
            raise FaceDataError(f"{path}: row {i}: {wanted}, got {shorten(pose)}")
        if not isinstance(entry, dict) or not is_text(entry.get("person_name")):
            raise FaceDataError(f"{path}: row {i}: needs a person_name, a text in UTF-8, got {shorten(entry)}")
    angles = torch.tensor(poses, dtype=torch.float32).deg2rad()
    errors = _pose_errors(path, [entry.get("pose_error") for entry in entries])
    return features, keypoints, angles, errors, [entry["person_name"] for entry in entries]


def _pose_errors(path: Path, found: Sequence[Any]) -> Tensor | None:
    """(N, 3) radians; None if no sample tells one, else all must."""
    if all(error is None for error in found):
        return None
    for i, error in enumerate(found):
        if not _is_pose(error) or min(error) < 0:
            wanted = "if one sample has a pose_error all have, three angles in degrees, none negative"
            raise FaceDataError(f"{path}: row {i}: {wanted}; got {shorten(error)}")
    return torch.tensor(found, dtype=torch.float32).deg2rad()


def _is_pose(pose: object) -> bool:
    if not isinstance(pose, list) or len(pose) != 3:
        return False
    return all(type(angle) in (int, float) and abs(angle) <= MAX_ANGLE for angle in pose)  # which NaN is not


def load_rows(path: Path, shape: tuple[int | None, ...], mmap: bool = False, embeddings: bool = False) -> Rows:
    """A float array that is finite as float32, checked in chunks; left on disk if mmap.

    Args:
        shape: the one wanted; None stands for any length.
        embeddings: refuse vectors along the last dimension whose length is outside of `NORMS`.

    Raises:
        FileNotFoundError: if there is no such file.
        FaceDataError: naming the file and, where there is one, the row.
    """
    array = read_npy(path, FaceDataError, shape, mmap)
    finite, usable = np.ones((2, len(array)), bool)
    for part in chunks(array.shape):
        with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinite and is reported
            values = np.asarray(array[part], np.float32)
            finite[part] = np.isfinite(values).reshape(len(values), -1).all(1)
            if embeddings:
                norms = np.linalg.norm(values, axis=-1).reshape(len(values), -1)
                usable[part] = ((norms >= NORMS[0]) & (norms <= NORMS[1])).all(1)
    if not finite.all():
        raise FaceDataError(f"{path}: row {int(finite.argmin())}: not finite ({int((~finite).sum())} such rows)")
    if not usable.all():
        row = int(usable.argmin())
        norms = np.linalg.norm(np.asarray(array[row], np.float64), axis=-1).ravel()
        worst = norms.min() if norms.min() < NORMS[0] else norms.max()
        raise FaceDataError(
            f"{path}: row {row}: the embedding has length {worst:.3g} ({int((~usable).sum())} such "
            f"rows); {NORMS_WANTED}"
        )
    return DiskRows(path) if mmap else torch.from_numpy(array.astype(np.float32, copy=False))


def write_samples(
    folder: str | Path,
    kind: str,
    features: np.ndarray,
    keypoints: np.ndarray,
    poses: np.ndarray,
    entries: Sequence[Mapping[str, object]],
    info: Mapping[str, object],
) -> None:
    """Write the three files of one half of a set, of kind "front" or "video"; each appears whole or not at all.

    Args:
        features, keypoints, poses: (N, D), (N, 5, 3) in pixels, and (N, 3) pitch, yaw, roll in degrees.
        entries, info: N dicts with at least `person_name`, and the metadata's `standard_info`.
    """
    counts = {len(features), len(keypoints), len(poses), len(entries)}
    if kind not in KINDS or len(counts) != 1:
        raise ValueError(f"kind must be one of {KINDS} and all counts equal, got {kind!r} and counts {sorted(counts)}")
    folder = Path(folder)
    for part, array in (("feature", features), ("keypoints", keypoints)):
        write_atomically(folder / f"{kind}_{part}.npy", partial(np.save, arr=array, allow_pickle=False))
    compact = json.JSONEncoder(separators=(",", ":")).encode
    pose_lines = ",\n".join(compact([float(angle) for angle in pose]) for pose in poses)
    entry_lines = ",\n".join(map(compact, entries))  # one sample a line
    text = (
        f'{{"num_samples":{len(poses)},\n"feature_dim":{features.shape[1]},\n"standard_info":{compact(info)},\n'
        f'"poses":[\n{pose_lines}\n],\n"metadata":[\n{entry_lines}\n]}}\n'
    )
    write_text(folder / f"{kind}_metadata.json", text)
