"""Which people train, validate and test: drawn by identity, written down, read again."""

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from viewdiff_nb.faces.views import FaceDataError, FaceViews, running_number
from viewdiff_nb.files import is_text, read_json, shorten, write_text

SIDE_VIEW = 45.0  # degrees of |yaw|: from here on a view counts as one from the side
STRATA = 10
HELD_OUT = (0.10, 0.15)  # shares of the people who validate, and test
IMPOSTOR_PAIRS = 1000
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Three sets of different people. seed: of the draw, None if they were not drawn."""

    train: FaceViews
    val: FaceViews
    test: FaceViews
    seed: int | None = None


def split_by_person(
    faces: FaceViews, val: int | None = None, test: int | None = None, seed: int = 0, stratify: bool = False
) -> Split:
    """Split by identity, never by sample, into train, val and test people.

    Args:
        val, test: number of people in each, by default those of `default_held_out`; the others train.
        seed: of the draw. It is not the training seed: test people stay the same whatever is trained.
        stratify: give the three parts similar shares of people with few and with many views from the side.
            It changes nothing where all people have the same numbers of views below and above `SIDE_VIEW`.
    """
    total = len(faces.names)
    usual_val, usual_test = default_held_out(faces)
    val, test = usual_val if val is None else val, usual_test if test is None else test
    if val < 2 or test < 2 or val + test > total - 2:
        raise ValueError(f"of {total} people, val={val} and test={test} must be at least 2 each and leave 2 to train")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(faces.device)
    if stratify:
        order = order[_spread(yaw_strata(faces)[order])]
    parts = order[: total - val - test], order[total - val - test : total - test], order[total - test :]
    return Split(*(faces.select(part.sort().values) for part in parts), seed=seed)


def default_held_out(faces: FaceViews) -> tuple[int, int]:
    """How many people validate and test if nobody says it: 10 and 15 % of all.

    Small sets hold out more of their people, at most a quarter each: so many that a false accept rate of 1e-3 can be
    told, which takes 1,000 pairs of a view and somebody else's front.
    """
    total = len(faces.names)
    views = max(1, len(faces) // total)
    needed = next(n for n in itertools.count(2) if n * (n - 1) * views >= IMPOSTOR_PAIRS)
    return tuple(max(2, min(max(round(share * total), needed), total // 4)) for share in HELD_OUT)


def yaw_strata(faces: FaceViews) -> Tensor:
    """(P,) int64: about `STRATA` groups of people who are seen from the side about equally often.

    People are ranked by their number of views from the side, then by that of the others; equal numbers
    are never in different strata.
    """
    side = faces.abs_yaw >= SIDE_VIEW
    counts = [torch.bincount(faces.person[mask], minlength=len(faces.names)) for mask in (side, ~side)]
    profile = counts[0] * (counts[1].max() + 1) + counts[1]
    rank = torch.searchsorted(profile.sort().values, profile)  # of the first person with that profile
    return rank * STRATA // len(faces.names)


def _spread(strata: Tensor) -> Tensor:
    """An order of rows in which every stretch holds its share of every stratum, each in the old order."""
    return ((running_number(strata) + 0.5) / torch.bincount(strata)[strata]).argsort(stable=True)


def save_split(path: str | Path, split: Split) -> None:
    """Write the names of a split's people, its sizes, seed and the fingerprint of the whole set's names as JSON."""
    names = {part: list(getattr(split, part).names) for part in PARTS}
    everybody = [name for part in PARTS for name in names[part]]
    about = {
        "seed": split.seed,
        "sizes": {part: len(names[part]) for part in PARTS},
        "people": names_fingerprint(everybody),
    }
    write_text(path, json.dumps(about | names, indent=0) + "\n")


def load_split_file(path: str | Path, faces: FaceViews) -> Split:
    """The split of faces that a file of `save_split` describes; it names every person of the set.

    A file made by hand needs only the three lists train, val and test; what else it has must agree.

    Raises:
        FaceDataError: if the file is damaged, puts someone into two parts, or is of another set.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no split file {path}; write one with save_split, or correct split_file")
    content = read_json(path, FaceDataError)
    parts = {part: content.get(part) if isinstance(content, dict) else None for part in PARTS}
    for part, names in parts.items():
        if not isinstance(names, list) or len(names) < 2 or not all(map(is_text, names)):
            raise FaceDataError(f"{path}: '{part}' must list the names of 2 people or more")
    if (sizes := {part: len(names) for part, names in parts.items()}) != content.get("sizes", sizes):
        raise FaceDataError(f"{path}: sizes are {shorten(content['sizes'])}, but the lists hold {sizes}")
    if not isinstance(seed := content.get("seed"), int | None):
        raise FaceDataError(
            f"{path}: seed must be a whole number, or null for a split that was not drawn, got {shorten(seed)}"
        )
    rows, part_of = {name: i for i, name in enumerate(faces.names)}, {}
    for part, names in parts.items():
        for name in names:
            if name in part_of:
                raise FaceDataError(f"{path}: person {shorten(name)} is in {part_of[name]} and again in {part}")
            part_of[name] = part
    if content.get("people", fingerprint := names_fingerprint(faces.names)) != fingerprint:
        raise FaceDataError(
            f"{path}: a split of another set: the fingerprint of its people is "
            f"{shorten(content['people'])}, of this set's {fingerprint}"
        )
    if unknown := [name for name in part_of if name not in rows]:
        raise FaceDataError(f"{path}: {len(unknown)} people are not in this face set, e.g. {shorten(unknown[0])}")
    if missing := [name for name in faces.names if name not in part_of]:
        raise FaceDataError(
            f"{path}: {len(missing)} of this set's {len(faces.names)} people are in no part, e.g. {shorten(missing[0])}"
        )
    index = (torch.tensor([rows[name] for name in names], device=faces.device) for names in parts.values())
    return Split(*(faces.select(people) for people in index), seed=seed)


def names_fingerprint(names: Iterable[str]) -> str:
    """A hash of a set of person names, whatever their order."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]
