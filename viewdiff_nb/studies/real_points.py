"""Operating points on real faces: models of six folds, ways and thresholds of three, counts of the tenth."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.modules.baselines import PoseRidge, RawEmbedding
from viewdiff_nb.studies.adaptation import FINE_TUNING, SMALL_OPTIONS, Profile
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.operating_points import Counts, count, drop_in, joined
from viewdiff_nb.studies.real_benchmark import Benchmark
from viewdiff_nb.studies.real_models import WHOLE, base_model, trainings
from viewdiff_nb.studies.store import Store, run_jobs


def fold_models(
    benchmark: Benchmark, profile: Profile, bases: Sequence[Path], fold: int
) -> tuple[dict[str, nn.Module], FaceViews]:
    """Models that know nobody of fold, and the people of a third of the other folds, on whom their ways were chosen."""
    others = [i for i in range(benchmark.folds) if i != fold]
    held_out = torch.isin(benchmark.fold, torch.tensor(others[::3]))
    val, train = benchmark.faces.select(held_out), benchmark.faces.select(~held_out & (benchmark.fold != fold))
    small = replace(profile.common, epochs=max(1, profile.real_epochs // 4), **SMALL_OPTIONS)  # type: ignore[arg-type]
    ridge = PoseRidge(train.src[:], train.angles, train.target, 300.0, residual=True)
    ((_, scratch),) = trainings(small, None, (), train, 0, [WHOLE])
    found: dict[str, nn.Module] = {"ridge": ridge, "transformer": scratch}
    if bases:
        tuned = replace(small, lr=FINE_TUNING["lr"])
        found["pretrained transformer"] = base_model(small, bases[0], train.feature_dim)
        ((_, found["pretrained, fine-tuned"]),) = trainings(tuned, None, bases, train, 0, [WHOLE])
    models: dict[str, nn.Module] = {"raw": RawEmbedding()}
    for name, model in found.items():
        models |= {name: model, f"{name}, drop-in": drop_in(model, train, val)}
    return models, val


def run_points(
    benchmark: Benchmark,
    profile: Profile,
    bases: Sequence[Path] = (),
    progress: Callable = iter,
    workers: int | None = None,
    store: Store | None = None,
) -> Counts:
    """`count` of every fold of a benchmark, its people together; what was done before is reused."""
    store = store or Store(benchmark.as_split)
    jobs = [(fold,) for fold in range(benchmark.folds)]
    work = partial(_stored, store, benchmark, profile, bases)
    missing = [job for job in jobs if store.find(*_key(benchmark, profile, bases, *job)) is None]
    run_jobs(work, missing, workers, progress)
    return joined([work(*job) for job in jobs])


def _stored(store: Store, benchmark: Benchmark, profile: Profile, bases: Sequence[Path], fold: int) -> Counts:
    def make() -> dict:
        models, val = fold_models(benchmark, profile, bases, fold)
        found = count(models, val, benchmark.faces.select(benchmark.fold == fold))
        return {"counts": [[*key, counts.tolist()] for key, counts in found.items()], "machine": machine()}

    key, config = _key(benchmark, profile, bases, fold)
    found = store.get(key, config, make)
    return {(model, rule): torch.tensor(counts).double() for model, rule, counts in found["counts"]}


def _key(benchmark: Benchmark, profile: Profile, bases: Sequence[Path], fold: int) -> tuple:
    base = str(bases[0]) if bases else None
    config = replace(profile.common, epochs=profile.real_epochs, base_model_path=base)
    return f"{benchmark.name} {benchmark.fingerprint}, operating points, fold {fold}", config
