"""Embeds your own photos and videos:  python -m viewdiff_nb.faces.embed PHOTOS OUT --i_have_consent

PHOTOS has one folder per person with photos and videos of that person. Every photo and every frame_stride-th
frame of a video goes through InsightFace: detection, five 3-D keypoints, head pose, embedding. The most frontal
sharp frame of a person becomes their front, all others become side views, and OUT gets the guide's six files, for
`viewdiff_nb.faces.load_face_views`. What could not be used is in OUT/failed_images.json with its reason.

Face embeddings are biometric data: the command wants to hear that the people shown have agreed. InsightFace's models
are for non-commercial research; it downloads them when first used, unless --models names a folder.

A person's frames are kept in OUT/.parts, so an interrupted run goes on with the next person, and a later one embeds
only the people whose files (or the options) have changed. Who is no longer in PHOTOS leaves OUT with the next run.
"""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from viewdiff_nb.faces.photo_reader import EmbedOptions, FaceReader, RefusedError, list_people, read_pictures
from viewdiff_nb.faces.views import CONVENTIONS, KINDS, write_samples
from viewdiff_nb.files import only_writer, read_torch, write_atomically, write_text

PARTS_VERSION = 2
BLUR_COST = 5.0  # degrees away from frontal that weigh as much as half the sharpness


class ConsentError(ValueError):
    """Nobody has confirmed that the people shown agreed."""


class EmbedError(ValueError):
    """Nothing that a face set could be made of."""


@dataclass
class Person:
    """A person's n frames.

    arrays: features (n, D), keypoints (n, 5, 3), poses (n, 3), sharpness (n,).
    entries, failed: dicts with person_name, image_path and, of videos, frame_index; of failed also reason and error.
    """

    arrays: dict[str, np.ndarray]
    entries: list[dict]
    failed: list[dict]


@dataclass(frozen=True)
class Summary:
    """people: names in the set. side_views: their number. skipped: {name: reason}. failed: pictures not used."""

    people: tuple[str, ...]
    side_views: int
    skipped: dict[str, str]
    failed: int


def embed_folder(
    photos: Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOS")],
    out: Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    options: Annotated[EmbedOptions, tyro.conf.arg(name="")] = EmbedOptions(),  # noqa: B008 (it is frozen)
) -> Summary:
    """Embed the people of a folder into a face set; see the top of this file.

    Args:
        photos: folder with one folder per person.
        out: folder for the six files, failed_images.json and the parts.

    Raises:
        ConsentError: without options.i_have_consent.
        ImportError: without InsightFace.
        OSError, ValueError: if photos, out or the models cannot be used; before any work.
        EmbedError: if nobody has a front and a side view; the work is kept.
    """
    if not options.i_have_consent:
        raise ConsentError(
            "face embeddings are biometric data that identify people: confirm with --i_have_consent (in "
            "Python EmbedOptions(i_have_consent=True)) that everybody shown has agreed"
        )
    photos, out = Path(photos).expanduser(), Path(out).expanduser()
    people = list_people(photos)
    if out.resolve().is_relative_to(photos.resolve()):
        raise ValueError(f"{out} lies in {photos}, where it would be a person; choose a folder elsewhere")
    if not (out / ".parts").is_dir() and any((out / f"{kind}_feature.npy").exists() for kind in KINDS):
        raise ValueError(f"{out} holds a face set that this command did not make; choose another folder")
    with only_writer(out, "OUT"):
        return _embed_people(photos, people, out, options)


def _embed_people(photos: Path, people: dict[str, list[Path]], out: Path, options: EmbedOptions) -> Summary:
    parts = out / ".parts"
    parts.mkdir(exist_ok=True)
    reader = FaceReader(options)
    settings = {key: value for key, value in asdict(options).items() if key not in ("i_have_consent", "models")}
    settings["checksums"] = reader.checksums
    paths = {name: parts / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.pt" for name in people}  # of any length
    done = {}
    with tqdm(total=sum(map(len, people.values())), unit="file", desc="photos and videos") as bar:
        for name, files in people.items():
            bar.set_postfix_str(name)
            fingerprint = fingerprint_of(files, photos, settings)
            person = load_part(paths[name], fingerprint)
            if person is None:
                person = embed_person(name, files, photos, reader, options.frame_stride)
                save_part(paths[name], fingerprint, person)
            done[name] = person
            bar.update(len(files))
    for path in set(parts.iterdir()) - set(paths.values()):
        path.unlink()  # of people who are no longer there
    return write_set(out, done, settings, reader.name)


def embed_person(name: str, files: list[Path], photos: Path, reader: FaceReader, frame_stride: int) -> Person:
    """Read all pictures of a person."""
    faces, entries, failed = [], [], []
    for path in files:
        entry: dict[str, str | int] = {"person_name": name, "image_path": path.relative_to(photos).as_posix()}
        try:
            for frame, picture in read_pictures(path, frame_stride):
                numbered = entry if frame is None else entry | {"frame_index": frame}
                try:
                    faces.append(reader.read(picture))
                    entries.append(numbered)
                except RefusedError as error:
                    failed.append({"reason": error.reason, **numbered, "error": str(error)})
        except RefusedError as error:
            failed.append({"reason": error.reason, **entry, "error": str(error)})
    arrays = {
        "features": np.array([face.embedding for face in faces]),
        "keypoints": np.array([face.keypoints for face in faces]),
        "poses": np.array([face.pose for face in faces]),
        "sharpness": np.array([face.sharpness for face in faces]),
    }
    return Person(arrays, entries, failed)


def fingerprint_of(files: list[Path], photos: Path, settings: dict) -> str:
    """Changes with the names, sizes and times of a person's files, and with the settings."""
    stats = [(path.relative_to(photos).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([PARTS_VERSION, settings, stats], sort_keys=True).encode()).hexdigest()


def save_part(path: Path, fingerprint: str, person: Person) -> None:
    """Write a person's frames; the file appears whole or not at all."""
    arrays = {name: torch.from_numpy(values) for name, values in person.arrays.items()}
    content = {"fingerprint": fingerprint, "entries": person.entries, "failed": person.failed, "arrays": arrays}
    write_atomically(path, partial(torch.save, content))


def load_part(path: Path, fingerprint: str) -> Person | None:
    """A person's frames; None if they are not there or damaged, or were made of other files or with other options."""
    try:
        part = read_torch(path, ValueError)
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(part, dict) or part.get("fingerprint") != fingerprint:
        return None
    if not {"arrays", "entries", "failed"} <= part.keys():
        return None
    arrays = {name: values.numpy() for name, values in part["arrays"].items()}
    return Person(arrays, part["entries"], part["failed"])


def frontal_angles(poses: np.ndarray) -> np.ndarray:
    """(N,) degrees between where faces look and the camera, of poses (N, 3): pitch, yaw, roll in degrees.

    Roll does not count, alignment undoes it.

    >>> frontal_angles(np.array([[0.0, 0.0, 20.0], [0.0, -30.0, 0.0], [45.0, 45.0, 0.0]])).round(3).tolist()
    [0.0, 30.0, 60.0]
    """
    pitch, yaw = np.deg2rad(poses[:, 0]), np.deg2rad(poses[:, 1])
    return np.rad2deg(np.arccos(np.clip(np.cos(pitch) * np.cos(yaw), -1, 1)))


def choose_front(poses: np.ndarray, sharpness: np.ndarray, front_angle: float = 15.0) -> int | None:
    """The row of the most frontal and sharp frame of poses (N, 3) and sharpness (N,), or None.

    It has the smallest angle + BLUR_COST · log2(sharpest / sharpness), so one of half the sharpness must be BLUR_COST
    degrees more frontal. Only frames within front_angle (degrees) take part, and the sharpest is the sharpest of them;
    of equals the first is taken.

    >>> poses = np.array([[0.0, 1.0, 0.0], [0.0, 8.0, 0.0], [0.0, 40.0, 0.0]])
    >>> choose_front(poses, np.array([20.0, 300.0, 900.0])), choose_front(poses, np.array([200.0, 300.0, 900.0]))
    (1, 0)
    """
    angles = frontal_angles(poses)
    near = np.flatnonzero(angles <= front_angle)
    if not len(near):
        return None
    sharp = np.maximum(sharpness[near], 1e-6)
    return int(near[(angles[near] + BLUR_COST * np.log2(sharp.max() / sharp)).argmin()])


def write_set(out: Path, people: dict[str, Person], settings: dict, recogniser: str) -> Summary:
    """Choose the fronts; write the six files, and failed_images.json with what was not used and why, by reason."""
    fronts, skipped = {}, {}
    for name, person in people.items():
        count, poses = len(person.entries), person.arrays["poses"]
        if count < 2:
            skipped[name] = f"usable frames: {count}; a front and at least one side view are needed"
        elif (row := choose_front(poses, person.arrays["sharpness"], settings["front_angle"])) is None:
            nearest = f"the nearest is {frontal_angles(poses).min():.1f}° away"
            skipped[name] = f"no frame within {settings['front_angle']:g}° of frontal, {nearest}"
        else:
            fronts[name] = np.arange(count) == row
    failed = [failure for person in people.values() for failure in person.failed]
    used = sum(len(person.entries) for person in people.values())
    details = defaultdict(list)
    for failure in failed:
        details[failure["reason"]].append({key: value for key, value in failure.items() if key != "reason"})
    report = {
        "total_images": used + len(failed),
        "successful": used,
        "failed": len(failed),
        "failed_details": details,
        "skipped_persons": skipped,
    }
    write_text(out / "failed_images.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if not fronts:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise EmbedError(f"nobody has a front and a side view ({reasons}); see {out / 'failed_images.json'}")
    info = {
        "content": "faces of people who agreed, as confirmed by who ran the command",
        "recogniser": recogniser,
        "feature": "float32, not normalised",
        **CONVENTIONS,
        "keypoint_unit": "pixels of the photo or frame",
        "settings": settings,
    }
    is_front = np.concatenate(list(fronts.values()))
    features, keypoints, poses = (
        np.concatenate([people[name].arrays[key] for name in fronts]) for key in ("features", "keypoints", "poses")
    )
    entries = np.array([entry for name in fronts for entry in people[name].entries])
    for kind, rows in zip(KINDS, (is_front, ~is_front), strict=True):
        write_samples(out, kind, features[rows], keypoints[rows], poses[rows], entries[rows].tolist(), info)
    return Summary(tuple(fronts), int((~is_front).sum()), skipped, len(failed))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        program = "python -m viewdiff_nb.faces.embed"
        summary = tyro.cli(embed_folder, args=arguments, description=__doc__, prog=program)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(summary.people)} people, {summary.side_views} side views; {summary.failed} pictures not used")
    for name, reason in summary.skipped.items():
        print(f"{name} was left out: {reason}")


if __name__ == "__main__":
    main()
