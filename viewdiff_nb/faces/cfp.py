"""CFP as a face set:  python -m viewdiff_nb.faces.cfp CFP OUT

CFP (Celebrities in Frontal-Profile in the Wild; Sengupta et al., WACV 2016, http://www.cfpw.io) has 10 frontal and 4
profile photographs of each of 500 people. CFP is the authors' folder with Data and Protocol. Every photograph is
cropped by CFP's own landmarks, or by InsightFace's, and embedded, and OUT gets the guide's six files:

* video_*: all pictures, in the order of Pair_list_F.txt and then of Pair_list_P.txt;
* front_*: of each person the mean of the frontal embeddings, with pose and keypoints of the first frontal picture;
* pairs_FF.csv, pairs_FP.csv: the ten folds, see `viewdiff_nb.faces.pairs`.

People are called by their folders' numbers. OUT holds embeddings of real people, which are biometric data: it must not
lie in the kit's folder, and nothing of it may be published but rates over many people.

Parts are kept in OUT/.parts, so an interrupted run goes on where it stopped, and a finished one costs nothing.
"""

import itertools
import json
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal
from zipfile import BadZipFile

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm.auto import tqdm

from viewdiff_nb.faces.crops import PROFILE, PROFILE_CROPS, check_crop_names, crop_transforms, crops_of, cut_crops
from viewdiff_nb.faces.geometry import SEEN_FROM, fit_pose
from viewdiff_nb.faces.pairs import FOLDS, Pairs, numbers, read_lines, write_pairs
from viewdiff_nb.faces.photo_reader import EmbedOptions, FaceReader, RefusedError
from viewdiff_nb.faces.recogniser import embed_crops, make_recogniser, unit_rows
from viewdiff_nb.faces.views import CONVENTIONS, FaceDataError, load_rows, write_samples
from viewdiff_nb.files import PROJECT, RUNS, fingerprint, only_writer, shorten, write_atomically, write_text

KINDS = {"F": ("frontal", 10), "P": ("profile", 4)}  # of pictures: folder, and how many of a person
PROTOCOLS = ("FF", "FP")
POINTS = 30  # CFP's landmarks, of the half of a face that is seen
# No documentation says what they are; from their mean shapes: 0-8 contour, 9-11 brow, 12-17 eye, 18-22 ridge and tip
# of the nose, 23-24 nostril, 25 mouth corner, 26-29 middle of the mouth.
CONTOUR, EYE, RIDGE, NOSE_TIP, MOUTH_CORNER = slice(0, 5), slice(12, 18), slice(18, 22), 21, 25
# What is known of a pose before landmarks are looked at, degrees: the yaw of profiles has the sign of the seen side.
PROFILE_YAW = 75.0
POSE_ERROR = (10.0, 10.0, 30.0)  # standard deviations of pitch, yaw, roll
PART = 100  # pictures in one part


@dataclass(frozen=True)
class CfpOptions:
    """How to embed. Field names are the flags of the command line."""

    recogniser: str = "mobilefacenet"
    """mobilefacenet, mobilefacenet192, insightface:PACK, insightface:PACK@MODELS, or a .npy file of ready embeddings,
    a row a picture, those of Pair_list_F.txt first."""
    crops: tuple[str, ...] = PROFILE_CROPS
    """Crops of a profile whose embeddings are summed; see `viewdiff_nb.faces.crops`."""
    landmarks: Literal["cfp", "insightface"] = "cfp"
    """Whose keypoints and pose: CFP's own (the pose is a guess), or InsightFace's, where it finds the face."""
    pack: str = "buffalo_l"
    """InsightFace's model pack for landmarks."""
    models: Path | None = None
    """InsightFace's root folder with models/PACK/*.onnx; nothing is downloaded then."""
    workers: int = 1
    """Processes that share the work."""

    def __post_init__(self) -> None:
        check_crop_names(self.crops)
        if self.workers < 1:
            raise ValueError(f"workers must be 1 or more, got {self.workers}")
        if self.recogniser.endswith(".npy") and self.landmarks == "insightface":
            raise ValueError("ready embeddings go with CFP's landmarks; leave out the landmarks of InsightFace")


@dataclass(frozen=True)
class Picture:
    """path: below Data/Images. person: from 0. profile: or frontal. listed: where, for messages."""

    path: str
    person: int
    profile: bool
    listed: str


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Of N pictures: keypoints (N, 5, 3) in pixels, poses (N, 3) in degrees, and the poses' standard errors (N, 3)."""

    keypoints: np.ndarray
    poses: np.ndarray
    errors: np.ndarray

    def __getitem__(self, rows: slice) -> "Landmarks":
        return Landmarks(self.keypoints[rows], self.poses[rows], self.errors[rows])


def read_pictures(cfp: Path) -> list[Picture]:
    """All pictures in the order of the two lists; each line is checked, and that there is such a picture."""
    found = []
    for kind, (folder, each) in KINDS.items():
        path = cfp / "Protocol" / f"Pair_list_{kind}.txt"
        lines = read_lines(path)
        for number, line in enumerate(lines, 1):
            where = f"{path}: line {number}"
            match = re.fullmatch(rf"{number}\s+(?:.*/)?Images/((\d+)/{folder}/\d+\.jpg)", line.strip())
            if not match:
                wanted = f"{number}, a space, and ../Data/Images/PERSON/{folder}/NUMBER.jpg"
                raise FaceDataError(f"{where}: must be {wanted}, got {shorten(line.strip())}")
            picture, person = match[1], (number - 1) // each
            if int(match[2]) != person + 1:
                raise FaceDataError(f"{where}: must be of person {person + 1:03d}, {each} a person, got {picture[:80]}")
            if not (cfp / "Data" / "Images" / picture).is_file():
                raise FaceDataError(f"{where}: there is no picture {cfp / 'Data' / 'Images' / picture}")
            found.append(Picture(picture, person, kind == "P", where))
        if not lines or len(lines) % each:
            raise FaceDataError(f"{path}: has {len(lines)} lines, and a person has {each}")
    people = [max(picture.person for picture in found if picture.profile == profile) + 1 for profile in (False, True)]
    if people[0] != people[1]:
        raise FaceDataError(f"{cfp / 'Protocol'}: {people[0]} people have frontal pictures, {people[1]} have profiles")
    return found


def read_protocol(cfp: Path, protocol: str, pictures: Sequence[Picture]) -> Pairs:
    """The pairs of FF or FP, as rows of pictures.

    Raises:
        FaceDataError: naming file and line, for a row that is not there, a pair that is not what its file says, or a
            person in two folds.
    """
    frontal = sum(not picture.profile for picture in pictures)
    starts = {"F": (0, frontal), "P": (frontal, len(pictures) - frontal)}
    fold_of: dict[int, tuple[int, str]] = {}
    rows = []
    for fold, (name, same) in itertools.product(range(FOLDS), (("same", True), ("diff", False))):
        path = cfp / "Protocol" / "Split" / protocol / f"{fold + 1:02d}" / f"{name}.txt"
        for number, line in enumerate(read_lines(path), 1):
            where = f"{path}: line {number}"
            pair = []
            for kind, row in zip(protocol, numbers(line, 2, where, int), strict=True):
                start, count = starts[kind]
                if not 1 <= row <= count:
                    raise FaceDataError(f"{where}: Pair_list_{kind}.txt has rows 1 to {count}, got {row}")
                pair.append(start + row - 1)
            people = [pictures[row].person for row in pair]
            if (people[0] == people[1]) != same:
                raise FaceDataError(f"{where}: a pair of persons {people[0] + 1:03d} and {people[1] + 1:03d}")
            for person in people:
                before, there = fold_of.setdefault(person, (fold, where))
                if before != fold:
                    twice = f"person {person + 1:03d} is in fold {fold + 1}, and in fold {before + 1} by {there}"
                    raise FaceDataError(f"{where}: {twice}")
            rows.append((*pair, same, fold))
    if not rows:
        raise FaceDataError(f"{cfp / 'Protocol' / 'Split' / protocol}: holds no pair")
    first, second, same_column, fold_column = torch.tensor(rows).T
    return Pairs(first, second, same_column.bool(), fold_column)


def read_landmarks(cfp: Path, pictures: Sequence[Picture]) -> Landmarks:
    """CFP's landmarks as five keypoints and a coarse pose, see `fit_pose`; a FaceDataError names file and line."""
    points = np.zeros((len(pictures), 5, 2))
    seen, prior = np.zeros(points.shape[:2], bool), np.zeros((len(pictures), 3))
    for row, picture in enumerate(pictures):
        path = (cfp / "Data" / "Fiducials" / picture.path).with_suffix(".txt")
        if not path.is_file():
            raise FaceDataError(f"{picture.listed}: there is no file of landmarks {path}")
        half = _read_points(path)
        # the half of the face that is seen lies where its contour is, seen from the nose
        turned_left = half[CONTOUR, 0].mean() > half[RIDGE, 0].mean()
        eye, nose, mouth = SEEN_FROM[turned_left]
        seen[row, [eye, nose, mouth]] = True
        points[row, [eye, nose, mouth]] = half[EYE].mean(0), half[NOSE_TIP], half[MOUTH_CORNER]
        if not np.ptp(points[row, seen[row]], axis=0).any():
            raise FaceDataError(f"{path}: eye, nose and corner of the mouth are in one place")
        prior[row, 1] = picture.profile * PROFILE_YAW * (-1 if turned_left else 1)
    angles, errors, keypoints = fit_pose(
        torch.from_numpy(points),
        torch.from_numpy(seen),
        torch.from_numpy(np.deg2rad(prior)),
        torch.tensor(POSE_ERROR).deg2rad().expand(len(points), 3),
    )
    return Landmarks(keypoints.numpy(), angles.rad2deg().numpy(), errors.rad2deg().numpy())


def _read_points(path: Path) -> np.ndarray:
    found = [numbers(line, 2, f"{path}: line {number}", float) for number, line in enumerate(read_lines(path), 1)]
    if len(found) != POINTS:
        raise FaceDataError(f"{path}: a face has {POINTS} landmarks, one a line, got {len(found)}")
    return np.array(found)


def embed_cfp(
    cfp: Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="CFP")],
    out: Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    options: Annotated[CfpOptions, tyro.conf.arg(name="")] = CfpOptions(),
) -> Path:
    """Embed CFP into a face set; see the top of this file.

    Args:
        cfp: the authors' folder, with Data and Protocol.
        out: folder for the set, outside of the kit's.

    Raises:
        FaceDataError, OSError: if cfp, out or ready embeddings cannot be used; before any work.
        ImportError: if the recogniser's or InsightFace's package is missing.
    """
    cfp, out = Path(cfp).expanduser(), Path(out).expanduser()
    if out.resolve().is_relative_to(PROJECT.resolve()) and not out.resolve().is_relative_to(RUNS.resolve()):
        raise FaceDataError(f"{out} is in the kit's folder, where no embeddings of real people must be; choose another")
    for needed in (cfp / "Data" / "Images", cfp / "Data" / "Fiducials", cfp / "Protocol" / "Split"):
        if not needed.is_dir():
            raise FaceDataError(f"{cfp} is not CFP: there is no folder {needed}")
    if (out / "video_feature.npy").exists() and not (out / "pairs_FP.csv").exists():
        raise FaceDataError(f"{out} holds a face set that this command did not make; choose another folder")
    pictures = read_pictures(cfp)
    pairs = {protocol: read_protocol(cfp, protocol, pictures) for protocol in PROTOCOLS}
    landmarks = read_landmarks(cfp, pictures)
    ready = Path(options.recogniser) if options.recogniser.endswith(".npy") else None
    if ready:
        features = np.asarray(load_rows(ready, (None, None), embeddings=True))
        if len(features) != len(pictures):
            raise FaceDataError(f"{ready}: has {len(features)} embeddings, and CFP {len(pictures)} pictures")
        features, name = unit_rows(features), f"embeddings of {ready.name}"
    with only_writer(out, "OUT"):
        if not ready:
            features, landmarks, name = _embed_pictures(cfp, out, pictures, landmarks, options)
        for protocol, found in pairs.items():
            write_pairs(out / f"pairs_{protocol}.csv", found)
        crops = "as they were" if ready else list(options.crops)
        write_set(out, pictures, features, landmarks, {"recogniser": name, "crops_of_profiles": crops})
    return out


def _embed_pictures(
    cfp: Path, out: Path, pictures: Sequence[Picture], landmarks: Landmarks, options: CfpOptions
) -> tuple[np.ndarray, Landmarks, str]:
    """Embeddings and landmarks of all pictures, and the recogniser's name; prints where InsightFace found no face."""
    recogniser = _cached_recogniser(options.recogniser)
    stats = [(cfp / "Data" / "Images" / picture.path).stat() for picture in pictures]
    about = asdict(replace(options, workers=1, models=None)) | {"recogniser": recogniser.name}
    if options.landmarks == "insightface":  # which downloads its models here, once for all processes
        about |= _cached_reader(options.pack, options.models).checksums
    key = [about, [(stat.st_size, stat.st_mtime_ns) for stat in stats], landmarks.keypoints.round(3).tolist()]
    parts = out / ".parts" / fingerprint(json.dumps(key, default=str).encode())
    parts.mkdir(parents=True, exist_ok=True)
    for old in set((out / ".parts").iterdir()) - {parts}:
        shutil.rmtree(old, ignore_errors=True)  # of other options
    rows = [slice(start, start + PART) for start in range(0, len(pictures), PART)]
    jobs = [(parts / f"{part.start:05d}.npz", cfp, pictures[part], landmarks[part], options) for part in rows]
    with get_context("spawn").Pool(options.workers) if options.workers > 1 else nullcontext() as pool:
        found = list(tqdm((pool.imap if pool else map)(_embed_part, jobs), "CFP", len(jobs), unit="part"))
    joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    if options.landmarks == "insightface":
        print(f"CFP's landmarks stand for {joined['missed'].sum()} faces that InsightFace did not find")
    return joined["features"], Landmarks(joined["keypoints"], joined["poses"], joined["errors"]), recogniser.name


def _embed_part(job: tuple[Path, Path, Sequence[Picture], Landmarks, CfpOptions]) -> dict[str, np.ndarray]:
    """Features (n, D), the landmarks, and where InsightFace found no face: missed (n,); kept in a file."""
    path, cfp, pictures, landmarks, options = job
    try:
        with np.load(path, allow_pickle=False) as kept:
            return dict(kept)
    except (OSError, ValueError, EOFError, BadZipFile):
        pass  # not there, or damaged: made anew
    recogniser = _cached_recogniser(options.recogniser)
    keypoints, poses, errors = landmarks.keypoints.copy(), landmarks.poses.copy(), landmarks.errors.copy()
    crops, missed = [], np.zeros(len(pictures), bool)
    for row, picture in enumerate(pictures):
        image_path = cfp / "Data" / "Images" / picture.path
        try:
            with Image.open(image_path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise FaceDataError(f"{picture.listed}: {image_path} cannot be read: {error}") from error
        if options.landmarks == "insightface":
            try:
                face = _cached_reader(options.pack, options.models).read(np.ascontiguousarray(pixels[..., ::-1]))
                keypoints[row], poses[row], errors[row] = face.keypoints, face.pose, 0
            except RefusedError:
                missed[row] = True
        looks = poses[row, 1] if options.landmarks == "insightface" else PROFILE * picture.profile
        transforms = crop_transforms(keypoints[row, :, :2], poses[row, 1], crops_of(looks, options.crops))
        crops.append(cut_crops(pixels, transforms))
    arrays = {
        "features": embed_crops(recogniser, crops),
        "keypoints": keypoints.astype(np.float32),
        "poses": poses.astype(np.float32),
        "errors": errors.astype(np.float32),
        "missed": missed,
    }
    write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type] # allow_pickle is no array
    return arrays


_cached_recogniser = cache(make_recogniser)  # each process makes it once


@cache
def _cached_reader(pack: str, models: Path | None) -> FaceReader:
    return FaceReader(EmbedOptions(pack=pack, models=models, max_faces=1000, min_face=20, min_sharpness=0))


def write_set(
    out: Path, pictures: Sequence[Picture], features: np.ndarray, landmarks: Landmarks, made_by: dict
) -> None:
    """The six files; see the top of this file."""
    person = np.array([picture.person for picture in pictures])
    frontal = np.array([not picture.profile for picture in pictures])
    names = [f"{i + 1:03d}" for i in range(person.max() + 1)]
    rows = [np.flatnonzero(frontal & (person == i)) for i in range(len(names))]
    means = unit_rows(np.stack([unit_rows(features[own]).mean(0) for own in rows]))
    firsts = [own[0] for own in rows]
    info = {
        "content": "CFP (Sengupta et al. 2016): embeddings of real people, for measuring only; do not publish",
        **made_by,
        **CONVENTIONS,
        "keypoint_unit": "pixels of the photograph",
    }
    entries = [
        {"person_name": names[i], "profile": bool(not front), "pose_error": [round(float(angle), 2) for angle in error]}
        for i, front, error in zip(person, frontal, landmarks.errors, strict=True)
    ]
    poses = landmarks.poses.round(2) + 0.0
    fronts = [entries[row] for row in firsts]
    write_samples(out, "front", means, landmarks.keypoints[firsts].astype(np.float32), poses[firsts], fronts, info)
    write_samples(out, "video", features, landmarks.keypoints.astype(np.float32), poses, entries, info)
    write_text(out / ".gitignore", "*\n")  # wherever it lies, git does not take it


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        out = tyro.cli(embed_cfp, args=arguments, description=__doc__, prog="python -m viewdiff_nb.faces.cfp")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"face set and pairs in {out}")


if __name__ == "__main__":
    main()
