"""What the kit does on real faces: verification in ten folds and identification, every row chosen by one protocol.

A benchmark is a face set with pairs in folds of different people, as `viewdiff_nb.faces.cfp` makes it. For every fold,
models are fitted to the people of the other nine; settings (a step's length, how embeddings are centred, a ridge's
strength) are chosen inside those nine, by the AUC of the frontal-profile pairs of people left out in turn. Nobody who
is tested was trained or tuned on. The gallery of an identification holds everybody, so that the training people are
among the impostors.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb import metrics
from viewdiff_nb.modules.baselines import enrolled
from viewdiff_nb.studies.adaptation import Profile
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.real_benchmark import Benchmark
from viewdiff_nb.studies.real_models import Family
from viewdiff_nb.studies.real_rates import fold_rates
from viewdiff_nb.studies.store import Store, run_jobs

INNER_FOLDS = 3  # into which the training folds are gathered to choose settings


@torch.no_grad()
def similarities(model: nn.Module, benchmark: Benchmark, protocol: str, keep: Tensor) -> Tensor:
    """(K,) cosines of the enrolled first and the predicted second picture of the pairs in keep, a mask."""
    pairs, faces = benchmark.pairs[protocol], benchmark.faces
    probes, rows = pairs.second[keep].unique(return_inverse=True)
    enrolled_first = F.normalize(enrolled(model, faces.src[pairs.first[keep]]), dim=1)
    return (enrolled_first * predicted(model, benchmark, probes)[rows]).sum(1)


def predicted(model: nn.Module, benchmark: Benchmark, rows: Tensor) -> Tensor:
    """(K, D) predictions of length 1 for some views."""
    faces = benchmark.faces
    return F.normalize(model.eval()(faces.src[rows], **faces.conditions(rows), return_residual=False), dim=1)


@torch.no_grad()
def ranks(model: nn.Module, benchmark: Benchmark, fold: int) -> dict[str, list[int]]:
    """Of every profile of a fold its person's rank among all, by the mean front and by the first frontal picture."""
    faces, rows = benchmark.faces, benchmark.profiles_of(fold)
    probes = predicted(model, benchmark, rows)
    found = {}
    for name, gallery in (("rank1", faces.front), ("rank1_one", faces.src[benchmark.first_fronts])):
        scores = metrics.similarity_scores(probes, enrolled(model, gallery), faces.person[rows])
        found[name] = scores.rank.tolist()
    return found


def choose(family: Family, benchmark: Benchmark, fold: int, seed: int) -> dict[str, tuple]:
    """Of each row that chooses: the setting with the best AUC of frontal-profile pairs of people left out in turn.

    The people of fold are not among them. The other folds make three groups, which are left out one by one. Rows with
    several seeds leave out one group with each seed, since each time they are trained.
    """
    pairs, faces = benchmark.pairs["FP"], benchmark.faces
    others = [i for i in range(benchmark.folds) if i != fold]
    groups = [torch.tensor(others[start::INNER_FOLDS]) for start in range(INNER_FOLDS)]
    total: dict[tuple, float] = {}
    for group in [groups[seed % INNER_FOLDS]] if family.random else groups:
        outside = torch.isin(benchmark.fold, torch.cat((group, torch.tensor([fold]))))
        keep = torch.isin(pairs.fold, group)
        for setting, model in family.candidates(faces.select(~outside), seed, None).items():
            similarity = similarities(model, benchmark, "FP", keep)
            counts = metrics.pair_counts(similarity, pairs.same[keep])
            total[setting] = total.get(setting, 0.0) + metrics.roc_auc(*counts).item()
    return {row: max(filter(fits, total), key=total.__getitem__) for row, fits in family.rows.items() if callable(fits)}


def score_fold(family: Family, benchmark: Benchmark, fold: int, seed: int) -> dict[str, dict]:
    """Of each row of a family: the setting, similarities of the fold's pairs, and ranks of its profiles."""
    fixed = {row: setting for row, setting in family.rows.items() if not callable(setting)}
    settings = fixed if len(fixed) == len(family.rows) else choose(family, benchmark, fold, seed) | fixed
    fitted = family.candidates(benchmark.faces.select(benchmark.fold != fold), seed, settings.values())
    found = {}
    for name in family.rows:
        setting = settings[name]
        values: dict = {"setting": str(setting)}
        for protocol, pairs in benchmark.pairs.items():
            values[protocol] = similarities(fitted[setting], benchmark, protocol, pairs.fold == fold).tolist()
        found[name] = values | ranks(fitted[setting], benchmark, fold)
    return found


def _stored(store: Store, profile: Profile, benchmark: Benchmark, every: dict[str, Family], job: tuple) -> dict:
    name, fold, seed = job
    make = partial(score_fold, every[name], benchmark, fold, seed)
    key, config = _key(profile, benchmark, every, job)
    found = store.get(key, config, lambda: {"rows": make(), "machine": machine()})
    return {row: values | {"machine": found["machine"]} for row, values in found["rows"].items()}


def _key(profile: Profile, benchmark: Benchmark, every: dict[str, Family], job: tuple) -> tuple:
    name, fold, seed = job
    base = str(every[name].bases[seed]) if every[name].bases else None
    config = replace(profile.common, epochs=profile.real_epochs, seed=seed, base_model_path=base)
    return f"{benchmark.name} {benchmark.fingerprint}, {name}, fold {fold}", config


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
        {(row, seed): {rate: (value, [the value in each resample of people]), settings, machines}}.
    """
    store = store or Store(benchmark.as_split)
    jobs = [
        (name, fold, seed)
        for name, family in every.items()
        for seed in range(profile.real_seeds if family.random else 1)
        for fold in range(benchmark.folds)
    ]
    work = partial(_stored, store, profile, benchmark, every)
    missing = [(job,) for job in jobs if store.find(*_key(profile, benchmark, every, job)) is None]
    run_jobs(work, missing, workers, progress)
    by_row: dict[tuple[str, int], list[dict]] = {}
    for job in jobs:
        for row, values in work(job).items():
            by_row.setdefault((row, job[2]), []).append(values)
    return {key: fold_rates(benchmark, parts) for key, parts in by_row.items()}
