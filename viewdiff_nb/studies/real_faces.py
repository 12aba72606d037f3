"""What the kit does on real faces: verification in ten folds and identification, every row chosen by one protocol.

A benchmark is a face set with pairs in folds of different people, as `viewdiff_nb.faces.cfp` makes it. For every fold,
models are fitted to the people of the other nine; settings (a step's length, how embeddings are centred, a ridge's
strength) are chosen inside those nine, by the AUC of the frontal-profile pairs of people left out in turn. Nobody who
is tested was trained or tuned on. The gallery of an identification holds everybody, so that the training people are
among the impostors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb import metrics
from viewdiff_nb.faces import FaceViews, Split, load_face_views
from viewdiff_nb.faces.crops import PROFILE
from viewdiff_nb.faces.pairs import FOLDS, Pairs, read_pairs
from viewdiff_nb.modules.baselines import enrolled
from viewdiff_nb.studies.adaptation import Profile
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.candidates import Setting
from viewdiff_nb.studies.real_models import Family
from viewdiff_nb.studies.significance import Estimate, over_seeds
from viewdiff_nb.studies.store import Store, run_jobs
from viewdiff_nb.training.config import TrainConfig

INNER_FOLDS = 3  # into which the training folds are gathered to choose settings


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
    faces, profile = benchmark.faces, benchmark.faces.abs_yaw >= PROFILE
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


@torch.no_grad()
def similarities(model: nn.Module, benchmark: Benchmark, protocol: str, keep: Tensor) -> Tensor:
    """(K,) cosines of the enrolled first and the predicted second picture of the pairs in keep, a mask."""
    pairs, faces = benchmark.pairs[protocol], benchmark.faces
    probes, rows = pairs.second[keep].unique(return_inverse=True)
    enrolled_first = F.normalize(enrolled(model, faces.src[pairs.first[keep]]), dim=1)
    return (enrolled_first * predicted(model, faces, probes)[rows]).sum(1)


def predicted(model: nn.Module, faces: FaceViews, rows: Tensor) -> Tensor:
    """(K, D) predictions of length 1 for some views."""
    return F.normalize(model.eval()(faces.src[rows], **faces.conditions(rows), return_residual=False), dim=1)


@torch.no_grad()
def ranks(model: nn.Module, benchmark: Benchmark, fold: int) -> dict[str, list[int]]:
    """Of every profile of a fold its person's rank among all, by the mean front and by the first frontal picture."""
    faces = benchmark.faces
    rows = ((faces.abs_yaw >= PROFILE) & (benchmark.fold[faces.person] == fold)).nonzero()[:, 0]
    frontal = faces.abs_yaw < PROFILE
    order = torch.arange(len(faces)).masked_fill(~frontal, len(faces))
    first = torch.full((len(faces.names),), len(faces)).scatter_reduce_(0, faces.person, order, "amin")
    probes = predicted(model, faces, rows)
    found = {}
    for name, gallery in (("rank1", faces.front), ("rank1_one", faces.src[first])):
        scores = metrics.similarity_scores(probes, enrolled(model, gallery), faces.person[rows])
        found[name] = scores.rank.tolist()
    return found


def choose(family: Family, benchmark: Benchmark, fold: int, seed: int) -> Setting:
    """The setting with the best AUC of frontal-profile pairs of people left out in turn, without those of fold.

    The other folds make three groups, which are left out one by one. Rows with several seeds leave out one group with
    each seed, since each time they are trained.
    """
    pairs, faces = benchmark.pairs["FP"], benchmark.faces
    others = [i for i in range(benchmark.folds) if i != fold]
    groups = [torch.tensor(others[start::INNER_FOLDS]) for start in range(INNER_FOLDS)]
    total: dict[Setting, float] = {}
    for group in [groups[seed % INNER_FOLDS]] if family.random else groups:
        outside = torch.isin(benchmark.fold, torch.cat((group, torch.tensor([fold]))))
        keep = torch.isin(pairs.fold, group)
        for setting, model in family.candidates(faces.select(~outside), seed, None).items():
            similarity = similarities(model, benchmark, "FP", keep)
            counts = metrics.pair_counts(similarity, pairs.same[keep], torch.zeros_like(pairs.fold[keep]), 1)
            total[setting] = total.get(setting, 0.0) + metrics.roc_auc(*counts).item()
    return max(total, key=total.__getitem__)


def score_fold(family: Family, benchmark: Benchmark, fold: int, seed: int) -> dict[str, dict]:
    """Of each row of a family: the setting, similarities of the fold's pairs, and ranks of its profiles."""
    chosen = choose(family, benchmark, fold, seed) if None in family.rows.values() else None
    settings = {name: chosen or () if fixed is None else fixed for name, fixed in family.rows.items()}
    fitted = family.candidates(benchmark.faces.select(benchmark.fold != fold), seed, settings.values())
    found = {}
    for name, setting in settings.items():
        values: dict = {"setting": str(setting)}
        for protocol, pairs in benchmark.pairs.items():
            values[protocol] = similarities(fitted[setting], benchmark, protocol, pairs.fold == fold).tolist()
        found[name] = values | ranks(fitted[setting], benchmark, fold)
    return found


def _stored(store: Store, config: TrainConfig, benchmark: Benchmark, every: dict[str, Family], job: tuple) -> dict:
    name, fold, seed = job
    make = partial(score_fold, every[name], benchmark, fold, seed)
    found = store.get(*_key(config, benchmark, every, job), lambda: {"rows": make(), "machine": machine()})
    return {row: values | {"machine": found["machine"]} for row, values in found["rows"].items()}


def _key(config: TrainConfig, benchmark: Benchmark, every: dict[str, Family], job: tuple) -> tuple[str, TrainConfig]:
    name, fold, seed = job
    base = str(every[name].bases[seed]) if every[name].bases else None
    return f"{benchmark.name}, {name}, fold {fold}", replace(config, seed=seed, base_model_path=base)


def run_real_faces(
    benchmark: Benchmark,
    every: dict[str, Family],
    profile: Profile,
    progress: Callable = iter,
    workers: int | None = None,
    store: Store | None = None,
) -> dict[tuple[str, int], dict]:
    """Rates of every row and seed; what was done before is reused.

    Args:
        every: what `families` gives.
        progress: wraps the list of (family, fold, seed), e.g. tqdm.
        workers: jobs side by side, see `store.run_jobs`.
        store: by default that of the benchmark's set.

    Returns:
        {(row, seed): {rate of `RATES`: (value, [the value without the people of each fold]), settings, machines}}.
    """
    faces = benchmark.faces
    store = store or Store(Split(faces, faces, faces))
    config = replace(profile.common, epochs=profile.real_epochs)
    jobs = [
        (name, fold, seed)
        for name, family in every.items()
        for seed in range(profile.real_seeds if family.random else 1)
        for fold in range(benchmark.folds)
    ]
    work = partial(_stored, store, config, benchmark, every)
    missing = [(job,) for job in jobs if store.find(*_key(config, benchmark, every, job)) is None]
    run_jobs(work, missing, workers, progress)
    by_row: dict[tuple[str, int], list[dict]] = {}
    for job in jobs:
        for row, values in work(job).items():
            by_row.setdefault((row, job[2]), []).append(values)
    return {key: fold_rates(benchmark, parts) for key, parts in by_row.items()}


def fold_rates(benchmark: Benchmark, parts: Sequence[dict]) -> dict:
    """Rates of what `score_fold` gave for each fold of one row and seed; see `run_real_faces`."""
    found: dict = {"settings": pd.Series([part["setting"] for part in parts]).value_counts().to_dict()}
    found["machines"] = sorted({part["machine"] for part in parts})
    for protocol, pairs in benchmark.pairs.items():
        similarity = torch.empty(len(pairs))
        for fold, part in enumerate(parts):
            similarity[pairs.fold == fold] = torch.tensor(part[protocol])
        hits = metrics.fold_hits(similarity, pairs.same, pairs.fold)
        by_fold = torch.stack([hits[pairs.fold == fold].mean() for fold in range(len(parts))])
        found[protocol] = _with_each_left_out(by_fold)
        if protocol == "FP":
            counts = metrics.pair_counts(similarity, pairs.same, pairs.fold, len(parts))
            whole = [count.sum(0) for count in counts]
            without = [all_of - count for all_of, count in zip(whole, counts, strict=True)]
            rates = {"auc": metrics.roc_auc, "eer": metrics.equal_error_rate}
            for far in (1e-2, 1e-3):
                rates[f"tar@{far:.0e}".replace("e-0", "e-")] = partial(metrics.tar_at_far, far=far)
            found |= {name: (rate(*whole).item(), rate(*without).tolist()) for name, rate in rates.items()}
    for name in ("rank1", "rank1_one"):
        found[name] = _with_each_left_out(torch.tensor([_share_of_ones(part[name]) for part in parts]))
    return found


def _share_of_ones(values: Sequence[int]) -> float:
    return sum(value == 1 for value in values) / len(values)


def _with_each_left_out(by_fold: Tensor) -> tuple[float, list[float]]:
    """The mean over folds, as is usual for CFP, and the means without each of them."""
    folds = len(by_fold)
    return by_fold.mean().item(), ((by_fold.sum() - by_fold) / (folds - 1)).tolist()


def rate_estimate(results: dict, row: str, rate: str, other: str | None = None) -> Estimate:
    """A rate in percent, or how far it is above another row's; 95 % over folds of people, and over seeds.

    The standard error over people is the jackknife's, of leaving out the people of one fold (Efron & Stein 1981):
    sqrt((F - 1) / F sum (r_i - mean r)^2).
    """
    ours = [found[rate] for (name, _), found in sorted(results.items()) if name == row]
    theirs = [found[rate] for (name, _), found in sorted(results.items()) if name == other] if other else []
    if theirs:
        theirs = theirs * len(ours) if len(theirs) == 1 else theirs
        ours = ours * len(theirs) if len(ours) == 1 else ours
        ours = [
            (a - b, [x - y for x, y in zip(left, right, strict=True)])
            for (a, left), (b, right) in zip(ours, theirs, strict=True)
        ]
    left_out = 100 * torch.tensor([left for _, left in ours], dtype=torch.float64).mean(0)
    folds = len(left_out)
    error = ((folds - 1) * left_out.var(unbiased=False)).sqrt().item()
    over = over_seeds([100 * value for value, _ in ours])
    return replace(over, people_error=error, people=folds, seeds_error=over.seeds_error if over.seeds > 1 else 0.0)
