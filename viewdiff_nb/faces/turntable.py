"""Synthetic people on a turntable: one picture and one embedding for every step of yaw and pitch.

A folder holds `metadata.json`, `features.npy` (float16 [P, pitches, yaws, D]), `keypoints.npy` (float32
[P, pitches, yaws, 5, 3], pixels of the photo, x right, y down, z toward the camera), and one sheet of pictures a
person, `NAME.webp`, a row a pitch and a column a yaw. `shoot_turntable.py` makes it. What the explorers show is
therefore what the recogniser saw, not something in between.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from viewdiff_nb.faces.crops import CROP_SIZE, crop_transforms, crops_of
from viewdiff_nb.faces.geometry import rotation_matrix
from viewdiff_nb.faces.views import FaceDataError, FaceViews, load_rows
from viewdiff_nb.files import TURNTABLE, is_text, read_json, shorten

GREY = (128, 128, 128)  # around a picture that is rolled


@dataclass(frozen=True, eq=False)
class Turntable:
    """P people, each seen at every pitch and yaw of a grid.

    names: P person names, those of the shipped face set.
    pitches, yaws: degrees, rising.
    features: (P, pitches, yaws, D) embeddings, float32.
    keypoints: (P, pitches, yaws, 5, 3) pixels of a square photo of photo_size.
    photo_size: side of that photo in pixels; its middle is the head's pivot.
    pixels_per_photo_pixel: scale of the pictures against it.
    picture_size: side of a picture in pixels, the pivot in its middle.
    folder: where the sheets of pictures are.
    """

    names: tuple[str, ...]
    pitches: tuple[float, ...]
    yaws: tuple[float, ...]
    features: Tensor
    keypoints: Tensor
    photo_size: int
    pixels_per_photo_pixel: float
    picture_size: int
    folder: Path

    def row(self, person: int, pitch: float = 0.0, roll: float = 0.0) -> FaceViews:
        """The person in a row of names at all yaws and the closest pitch there is, as a face set without a front.

        Roll turns keypoints and pose; the embedding stays, because aligning a crop by its keypoints takes roll out.
        """
        i = _closest(self.pitches, pitch)
        yaw = torch.tensor(self.yaws).float()
        angles = torch.stack((torch.full_like(yaw, self.pitches[i]), yaw, torch.full_like(yaw, roll)), 1).deg2rad()
        src, keypoints = self.features[person, i], self.keypoints[person, i]
        if roll:
            turn = rotation_matrix(torch.tensor([0.0, 0.0, roll]).deg2rad())
            middle = keypoints.new_tensor([self.photo_size / 2, self.photo_size / 2, 0.0])
            keypoints = (keypoints - middle) @ turn.T + middle
        owner = torch.zeros(len(yaw), dtype=torch.long)
        return FaceViews((self.names[person],), torch.zeros_like(src[:1]), src, keypoints, angles, owner)

    def closest(self, person: int, pitch: float, yaw: float, roll: float = 0.0) -> int:
        """Which view of `row` is closest to a pose in degrees."""
        return _closest(self.yaws, yaw)

    def shows(self, gallery: FaceViews) -> bool:
        """Whether these people are in the gallery, under the same names and by the same recogniser.

        Other sets may use the same names for other people, so a frontal view must be closest to the front of its name.
        """
        if not set(self.names) <= set(gallery.names) or gallery.feature_dim != self.features.shape[-1]:
            return False
        own = torch.tensor([gallery.names.index(name) for name in self.names])
        frontal = self.features[:, _closest(self.pitches, 0), _closest(self.yaws, 0)]
        similarity = F.normalize(frontal, dim=1) @ F.normalize(gallery.front.cpu(), dim=1).T
        return bool((similarity.argmax(1) == own).all())

    def picture(self, person: int, pitch: float, yaw: float, roll: float = 0.0) -> Image.Image:
        """The head at a pose in degrees: RGB, picture_size square, the pivot in the middle.

        Roll turns the picture about the optical axis, which is what turning the head about it looks like.
        """
        size = self.picture_size
        left, top = _closest(self.yaws, yaw) * size, _closest(self.pitches, pitch) * size
        picture = _sheet(self.folder / f"{self.names[person]}.webp").crop((left, top, left + size, top + size))
        return picture.rotate(-roll, Image.Resampling.BILINEAR, fillcolor=GREY) if roll else picture

    def picture_keypoints(self, person: int, pitch: float, yaw: float, roll: float = 0.0) -> np.ndarray:
        """(5, 2) keypoints in the pixels of `picture`."""
        keypoints = self.row(person, pitch, roll).keypoints_3d[_closest(self.yaws, yaw)][:, :2].numpy()
        return (keypoints - self.photo_size / 2) * self.pixels_per_photo_pixel + self.picture_size / 2

    def crop(self, person: int, pitch: float, yaw: float, roll: float = 0.0) -> Image.Image:
        """`picture` aligned as the crop that was embedded (of a profile's several, the first), cut from the picture."""
        points = self.picture_keypoints(person, pitch, yaw, roll)
        (to_crop,) = crop_transforms(points, yaw, crops_of(yaw)[:1])
        turn = np.linalg.inv(to_crop[:, :2])
        to_picture = np.column_stack([turn, -turn @ to_crop[:, 2]]).ravel().tolist()
        return self.picture(person, pitch, yaw, roll).transform(
            (CROP_SIZE, CROP_SIZE), Image.Transform.AFFINE, to_picture, Image.Resampling.BICUBIC, fillcolor=GREY
        )

    def sheet(self, people: list[int], yaws: tuple[float, ...], pitch: float = 0.0) -> Image.Image:
        """Pictures side by side: a row a person, a column a yaw in degrees."""
        rows = [np.hstack([np.asarray(self.picture(person, pitch, yaw)) for yaw in yaws]) for person in people]
        return Image.fromarray(np.vstack(rows))


def load_turntable(folder: str | Path = TURNTABLE) -> Turntable:
    """Load and check a turntable.

    Raises:
        FileNotFoundError: naming the file that is not there.
        FaceDataError: naming the file, for values that cannot be, and for sizes that do not fit together.
    """
    folder = Path(folder)
    about = read_json(folder / "metadata.json", FaceDataError)
    for keys, fits, wanted in CHECKS:
        for key in keys:
            value = about.get(key) if isinstance(about, dict) else None
            if not fits(value):
                raise FaceDataError(f"{folder / 'metadata.json'}: {key} must be {wanted}, got {shorten(value)}")
    names, pitches, yaws = (tuple(about[key]) for key in ("people", "pitches", "yaws"))
    grid = len(names), len(pitches), len(yaws)
    features = load_rows(folder / "features.npy", (*grid, about["feature_dim"]), embeddings=True)[:]
    keypoints = load_rows(folder / "keypoints.npy", (*grid, 5, 3))[:]
    sheet_size = about["picture_size"] * len(yaws), about["picture_size"] * len(pitches)
    for path in (folder / f"{name}.webp" for name in names):
        try:
            with Image.open(path) as sheet:  # which reads no more than the header
                size = sheet.size
        except FileNotFoundError:
            raise FileNotFoundError(f"turntable {folder} lacks the pictures {path.name}") from None
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise FaceDataError(f"{path}: not a readable picture") from error
        if size != sheet_size:
            raise FaceDataError(f"{path}: must be {sheet_size} pixels as metadata.json says, got {size}")
    sizes = about["photo_size"], about["pixels_per_photo_pixel"], about["picture_size"]
    return Turntable(names, pitches, yaws, features, keypoints, *sizes, folder)


def _are_file_names(value: object) -> bool:
    """Pictures lie in files of these names, which must not lead out of the folder."""
    names = value if isinstance(value, list) else []
    allowed = all(is_text(name) and re.fullmatch(r"[^/\\:\0]{1,100}", name) for name in names)
    return allowed and 0 < len(names) == len(set(names))


def _are_angles(value: object) -> bool:
    angles = value if isinstance(value, list) else []
    numbers = len(angles) > 0 and all(type(angle) in (int, float) and abs(angle) <= 90 for angle in angles)
    return numbers and all(low < high for low, high in itertools.pairwise(angles))


CHECKS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (  # of metadata.json
    (("people",), _are_file_names, "different names that can be names of files"),
    (("pitches", "yaws"), _are_angles, "rising degrees within ±90"),
    (("feature_dim", "photo_size", "picture_size"), lambda n: type(n) is int and 0 < n < 2**31, "a whole number > 0"),
    (("pixels_per_photo_pixel",), lambda n: type(n) in (int, float) and 0 < n < 1e6, "a number > 0"),
)


def _closest(values: tuple[float, ...], wanted: float) -> int:
    return int(np.abs(np.asarray(values) - wanted).argmin())


@lru_cache(maxsize=4)
def _sheet(path: Path) -> Image.Image:
    """A decoded sheet of pictures; decoding takes a quarter of a second, and people are looked at for a while."""
    with Image.open(path) as sheet:
        return sheet.convert("RGB")


class RecordedPeople:
    """What `Turntable` offers, for any face set, your own too: the recorded view nearest to a pose, no pictures."""

    pitches = yaws = None  # no grid: any pose may have been recorded

    def __init__(self, faces: FaceViews) -> None:
        self.faces, self.names = faces.to("cpu"), faces.names

    def row(self, person: int, pitch: float = 0.0, roll: float = 0.0) -> FaceViews:
        """All views of a person, by rising yaw; pitch and roll are as recorded."""
        own = (self.faces.person == person).nonzero()[:, 0]
        if not len(own):
            raise ValueError(f"{self.names[person]} has no side view")
        return self.faces.where(own[self.faces.angles[own, 1].argsort()])

    def closest(self, person: int, pitch: float, yaw: float, roll: float = 0.0) -> int:
        """Which view of `row` is closest to a pose in degrees."""
        wanted = torch.tensor([pitch, yaw, roll]).deg2rad()
        return int((self.row(person).angles - wanted).norm(dim=1).argmin())

    def picture(self, person: int, pitch: float, yaw: float, roll: float = 0.0) -> None:
        """There is none."""
