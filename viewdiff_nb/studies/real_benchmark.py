"""People with frontal and profile pictures, in pairs and folds: CFP, or synthetic people in its place."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from viewdiff_nb.faces import FaceViews, Split, load_face_views
from viewdiff_nb.faces.crops import PROFILE
from viewdiff_nb.faces.pairs import FOLDS, Pairs, read_pairs
from viewdiff_nb.faces.views import FaceDataError
from viewdiff_nb.files import fingerprint, read_json

FEWEST_FOLDS = 4  # one to test, and three groups of others


@dataclass(frozen=True, eq=False)
class Benchmark:
    """faces: every picture a view; front: the mean of a person's frontal pictures. fold: (P,) of each person.

    pairs: of FF and FP, rows of views; the first of a pair is enrolled, the second is the probe.
    is_profile: (M,) which views are profiles; the others are frontal.
    seen_by: recogniser and crops, of `seen_by`.
    """

    faces: FaceViews
    pairs: dict[str, Pairs]
    fold: Tensor
    is_profile: Tensor
    name: str
    seen_by: str

    @property
    def folds(self) -> int:
        return int(self.fold.max()) + 1

    @property
    def as_split(self) -> Split:
        """All people as each part, for a `Store`'s key."""
        return Split(self.faces, self.faces, self.faces)

    def profiles_of(self, fold: int) -> Tensor:
        """Rows of a fold's profiles."""
        return (self.is_profile & (self.fold[self.faces.person] == fold)).nonzero()[:, 0]

    @property
    def first_fronts(self) -> Tensor:
        """(P,) each person's first frontal view."""
        views, people = len(self.faces), len(self.faces.names)
        order = torch.arange(views).masked_fill(self.is_profile, views)
        return torch.full((people,), views).scatter_reduce_(0, self.faces.person, order, "amin")

    @cached_property
    def fingerprint(self) -> str:
        """Of pairs and folds, which are no part of the face set."""
        tensors = [self.fold, self.is_profile]
        for found in self.pairs.values():
            tensors += [found.first, found.second, found.same, found.fold]
        return fingerprint(*(tensor.numpy().tobytes() for tensor in tensors))


def seen_by(folder: str | Path) -> str:
    """Which recogniser saw which crops, as a face set's metadata say: what models can be carried between sets of."""
    return _seen_by(_metadata(folder))


def _metadata(folder: str | Path) -> dict:
    return read_json(Path(folder) / "video_metadata.json", FaceDataError, 2**30)


def _seen_by(metadata: dict) -> str:
    info = metadata.get("standard_info") or {}
    return f"{info.get('recogniser', 'unknown recogniser')}; profiles {info.get('crops_of_profiles', 'as they were')}"


def load_benchmark(folder: str | Path) -> Benchmark:
    """A set of `viewdiff_nb.faces.cfp`, or one like it: a sample's metadata may say profile, else its yaw does."""
    faces = load_face_views(folder)
    pairs = {protocol: read_pairs(Path(folder) / f"pairs_{protocol}.csv", len(faces)) for protocol in ("FF", "FP")}
    metadata = _metadata(folder)
    entries = metadata["metadata"]
    by_yaw = (faces.abs_yaw >= PROFILE).tolist()
    is_profile = torch.tensor([bool(entry.get("profile", side)) for entry, side in zip(entries, by_yaw, strict=True)])
    return Benchmark(faces, pairs, _folds_of_people(faces, pairs), is_profile, "CFP", _seen_by(metadata))


def _folds_of_people(faces: FaceViews, pairs: dict[str, Pairs]) -> Tensor:
    fold = torch.full((len(faces.names),), -1)
    for protocol, found in pairs.items():
        for rows in (found.first, found.second):
            person = faces.person[rows]
            fold[person] = torch.where(fold[person] < 0, found.fold, fold[person])
            if (odd := fold[person] != found.fold).any():
                who = faces.names[person[odd][0]]
                raise FaceDataError(
                    f"{protocol}: person {who} is in fold {fold[person][odd][0]} and {found.fold[odd][0]}"
                )
        there = found.fold.unique().tolist()
        if there != list(range(len(there))) or len(there) < FEWEST_FOLDS:
            wanted = f"folds must count from 0 without gaps, {FEWEST_FOLDS} or more"
            raise FaceDataError(f"{protocol}: {wanted}, got {there}")
    if (fold < 0).any():
        raise FaceDataError(f"person {faces.names[int((fold < 0).int().argmax())]} is in no pair, and so in no fold")
    return fold


def stand_in(
    faces: FaceViews, frontal: float = 25.0, profile: float = 60.0, seed: int = 0, seen: str = ""
) -> Benchmark:
    """Synthetic people as if they were CFP: |yaw| < frontal is a frontal picture, |yaw| >= profile a profile (degrees).

    Every frontal picture is paired with one of the same person and with one of another of the fold, every profile too.
    """
    kept = faces.where((faces.abs_yaw < frontal) | (faces.abs_yaw >= profile))
    generator = torch.Generator().manual_seed(seed)
    fold = torch.randperm(len(kept.names), generator=generator) % FOLDS
    is_profile = kept.abs_yaw >= profile
    fronts = (~is_profile).nonzero()[:, 0]
    kinds = {"FF": fronts, "FP": is_profile.nonzero()[:, 0]}
    pairs = {}
    for protocol, probes in kinds.items():
        rows = []
        for i in range(FOLDS):
            gallery = fronts[fold[kept.person[fronts]] == i]
            tested = probes[fold[kept.person[probes]] == i]
            same = kept.person[tested][:, None] == kept.person[gallery]
            for is_same, fits in ((True, same & (tested[:, None] != gallery)), (False, ~same)):
                drawn = torch.rand(fits.shape, generator=generator).masked_fill(~fits, -1).max(1)
                there = drawn.values >= 0
                first, second = gallery[drawn.indices[there]], tested[there]
                rows.append(Pairs(first, second, torch.full_like(first, is_same).bool(), torch.full_like(first, i)))
        pairs[protocol] = Pairs(
            *(torch.cat([getattr(r, f) for r in rows]) for f in ("first", "second", "same", "fold"))
        )
    return Benchmark(kept, pairs, fold, is_profile, "synthetic stand-in", seen)


def embedding_statistics(benchmark: Benchmark) -> pd.Series:
    """How a recogniser sees the people of a benchmark: what a change of generator or of crops does, before training."""
    faces, profile = benchmark.faces, benchmark.is_profile
    unit, fronts = F.normalize(faces.src[:], dim=1), F.normalize(faces.front, dim=1)
    side, owner = unit[profile], faces.person[profile]
    of_fronts = (fronts @ fronts.T)[~torch.eye(len(fronts), dtype=torch.bool)]
    across = side @ fronts.T
    own = torch.zeros_like(across, dtype=torch.bool).scatter_(1, owner[:, None], True)
    variances = torch.linalg.eigvalsh(torch.cov(fronts.T.double())).clamp_min(0)

    def spread(values: Tensor) -> str:
        return f"{values.mean():.2f} ± {values.std():.2f}"

    def highest(values: Tensor) -> str:
        return f"{values.sort().values[int(0.999 * len(values))]:.2f}"

    return pd.Series(
        {
            "people": str(len(fronts)),
            "cosine of different fronts, mean ± sd": spread(of_fronts),
            "the same, 99.9 %": highest(of_fronts),
            "cosine of profile and own front, mean ± sd": spread(across[own]),
            "cosine of profile and another's front, mean ± sd": spread(across[~own]),
            "the same, 99.9 % ": highest(across[~own]),
            "length of mean profile minus mean front": f"{(side.mean(0) - fronts.mean(0)).norm():.2f}",
            "total variance of fronts": f"{variances.sum():.2f}",
            "participation ratio of fronts": f"{variances.sum() ** 2 / variances.square().sum():.0f}",
        }
    )
