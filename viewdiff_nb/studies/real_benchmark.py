"""People with frontal and profile pictures, in pairs and folds: CFP, or synthetic people in its place."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from viewdiff_nb.faces import FaceViews, load_face_views
from viewdiff_nb.faces.crops import PROFILE
from viewdiff_nb.faces.pairs import FOLDS, Pairs, read_pairs


@dataclass(frozen=True, eq=False)
class Benchmark:
    """faces: every picture a view; front: the mean of a person's frontal pictures. fold: (P,) of each person.

    pairs: of FF and FP, rows of views; the first of a pair is enrolled, the second is the probe.
    """

    faces: FaceViews
    pairs: dict[str, Pairs]
    fold: Tensor
    name: str

    @property
    def folds(self) -> int:
        return int(self.fold.max()) + 1

    @property
    def is_profile(self) -> Tensor:
        """(M,) which views are profiles; the others are frontal."""
        return self.faces.abs_yaw >= PROFILE

    @property
    def first_fronts(self) -> Tensor:
        """(P,) each person's first frontal view."""
        views, people = len(self.faces), len(self.faces.names)
        order = torch.arange(views).masked_fill(self.is_profile, views)
        return torch.full((people,), views).scatter_reduce_(0, self.faces.person, order, "amin")


def load_benchmark(folder: str | Path) -> Benchmark:
    """A set of `viewdiff_nb.faces.cfp`, or one like it."""
    faces = load_face_views(folder)
    pairs = {protocol: read_pairs(Path(folder) / f"pairs_{protocol}.csv", len(faces)) for protocol in ("FF", "FP")}
    return Benchmark(faces, pairs, _folds_of_people(faces, pairs), "CFP")


def _folds_of_people(faces: FaceViews, pairs: dict[str, Pairs]) -> Tensor:
    fold = torch.full((len(faces.names),), -1)
    for protocol, found in pairs.items():
        for rows in (found.first, found.second):
            person = faces.person[rows]
            fold[person] = torch.where(fold[person] < 0, found.fold, fold[person])
            if (odd := fold[person] != found.fold).any():
                who = faces.names[person[odd][0]]
                raise ValueError(f"{protocol}: person {who} is in fold {fold[person][odd][0]} and {found.fold[odd][0]}")
    if (fold < 0).any():
        raise ValueError(f"person {faces.names[int((fold < 0).int().argmax())]} is in no pair, and so in no fold")
    return fold


def stand_in(faces: FaceViews, frontal: float = 25.0, profile: float = 60.0, seed: int = 0) -> Benchmark:
    """Synthetic people as if they were CFP: |yaw| < frontal is a frontal picture, |yaw| >= profile a profile (degrees).

    Every frontal picture is paired with one of the same person and with one of another of the fold, every profile too.
    """
    kept = faces.where((faces.abs_yaw < frontal) | (faces.abs_yaw >= profile))
    generator = torch.Generator().manual_seed(seed)
    fold = torch.randperm(len(kept.names), generator=generator) % FOLDS
    fronts = (kept.abs_yaw < frontal).nonzero()[:, 0]
    kinds = {"FF": fronts, "FP": (kept.abs_yaw >= profile).nonzero()[:, 0]}
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
    return Benchmark(kept, pairs, fold, "synthetic stand-in")


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
