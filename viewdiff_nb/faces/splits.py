"""Which people train, validate and test: drawn by identity, written down, read again."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from viewdiff_nb.faces.views import FaceDataError, FaceViews
from viewdiff_nb.files import fingerprint, is_text, read_json, shorten, write_text

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


def split_by_person(faces: FaceViews, val: int | None = None, test: int | None = None, seed: int = 0) -> Split:
    """Split by identity, never by sample, into train, val and test people.

    Args:
        val, test: number of people in each, by default those of `default_held_out`; the others train.
        seed: of the draw. It is not the training seed: test people stay the same whatever is trained.
    """
    total = len(faces.names)
    usual_val, usual_test = default_held_out(faces)
    val, test = usual_val if val is None else val, usual_test if test is None else test
    if val < 2 or test < 2 or val + test > total - 2:
        raise ValueError(f"of {total} people, val={val} and test={test} must be at least 2 each and leave 2 to train")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(faces.device)
    return _select_parts(faces, (part.sort().values for part in order.split((total - val - test, val, test))), seed)


def _select_parts(faces: FaceViews, people: Iterable[Tensor], seed: int | None) -> Split:
    train, val, test = map(faces.select, people)
    return Split(train, val, test, seed)


def default_held_out(faces: FaceViews) -> tuple[int, int]:
    """How many people validate and test if nobody says it: 10 and 15 % of all.

    Small sets hold out more of their people, at most a quarter each: enough to measure a false accept rate of 1e-3,
    which takes 1,000 pairs of a view and somebody else's front.
    """
    total = len(faces.names)
    views = max(1, len(faces) // total)
    needed = next(n for n in itertools.count(2) if n * (n - 1) * views >= IMPOSTOR_PAIRS)
    val, test = (max(2, min(max(round(share * total), needed), total // 4)) for share in HELD_OUT)
    return val, test


def save_split(path: str | Path, split: Split) -> None:
    """Write the names of a split's people, its sizes, seed and the fingerprint of the whole set's names as JSON."""
    names = {part: list(getattr(split, part).names) for part in PARTS}
    about = {
        "seed": split.seed,
        "sizes": {part: len(names[part]) for part in PARTS},
        "people": names_fingerprint(itertools.chain(*names.values())),
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
    row_of, part_of = {name: row for row, name in enumerate(faces.names)}, dict[str, str]()
    for part in PARTS:
        names = content.get(part) if isinstance(content, dict) else None
        if not isinstance(names, list) or len(names) < 2 or not all(map(is_text, names)):
            raise FaceDataError(f"{path}: '{part}' must list the names of 2 people or more")
        for name in names:
            if name in part_of:
                raise FaceDataError(f"{path}: person {shorten(name)} is in {part_of[name]} and again in {part}")
            part_of[name] = part
    seed, fingerprint = content.get("seed"), names_fingerprint(faces.names)
    sizes = {part: len(content[part]) for part in PARTS}
    if content.get("sizes", sizes) != sizes:
        raise FaceDataError(f"{path}: sizes are {shorten(content['sizes'])}, but the lists hold {sizes}")
    if not isinstance(seed, int | None):
        raise FaceDataError(f"{path}: seed must be a whole number, or null if nobody was drawn, got {shorten(seed)}")
    if content.get("people", fingerprint) != fingerprint:
        other = f"a split of another set: the fingerprint of its people is {shorten(content['people'])}"
        raise FaceDataError(f"{path}: {other}, of this set's {fingerprint}")
    if unknown := [name for name in part_of if name not in row_of]:
        raise FaceDataError(f"{path}: {len(unknown)} people are not in this face set, e.g. {shorten(unknown[0])}")
    if missing := [name for name in faces.names if name not in part_of]:
        of_all = f"{len(missing)} of this set's {len(faces.names)} people are in no part"
        raise FaceDataError(f"{path}: {of_all}, e.g. {shorten(missing[0])}")
    people = (torch.tensor([row_of[name] for name in content[part]], device=faces.device) for part in PARTS)
    return _select_parts(faces, people, seed)


def names_fingerprint(names: Iterable[str]) -> str:
    """A hash of a set of person names, whatever their order."""
    return fingerprint("\n".join(sorted(names)).encode())
