"""Forgetting against adaptation: what each weight of the prior keeps of a base, and what it costs beyond.

The base of the main study, trained on |yaw| < 45 degrees with seed 0, is adapted to |yaw| >= 45 degrees by LoRA and
by full fine-tuning, for several weights lambda of the prior and several seeds of the adaptation. LoRA with all weights
of a seed is trained in one pass. All runs of a seed see the same views and the same prior samples in the same order;
with lambda 0 the prior samples are there and weigh nothing.

Both sides of 45 degrees are scored alone, so TAR has a threshold of the side's own. With one threshold for all views,
as in the tables of the main study, near-frontal TAR falls when side views move the threshold, though nothing is
forgotten.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import seaborn as sns
from torch import nn

from viewdiff_nb.faces.splits import Split
from viewdiff_nb.metrics import FAR, recognition_by_yaw
from viewdiff_nb.studies.adaptation import (
    BOUNDARY,
    COMMON,
    FINE_TUNING,
    LORA_8,
    Profile,
    base_model,
    default_workers,
    score,
)
from viewdiff_nb.studies.significance import correction, judged, over_seeds
from viewdiff_nb.studies.store import Store
from viewdiff_nb.studies.tables import Results, difference
from viewdiff_nb.training.checkpoint import prepare_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import with_cuda_graph
from viewdiff_nb.training.evaluation import predict
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.one_pass import train_together
from viewdiff_nb.training.result import TrainingAdvice

METHODS = {"LoRA r=8": LORA_8, "full fine-tuning": FINE_TUNING}
LAMBDAS = (0.0, 0.1, 1.0, 10.0)
KEPT, GAINED = "0-45", "45-90"  # degrees of |yaw|: what the base was trained on, and what it is adapted to
RATES = {"rank1": "rank-1", "tar": "TAR at FAR 1e-3"}
COLOURS = sns.color_palette("colorblind")


def name_of(method: str, weight: float) -> str:
    """Of an adaptation, in results."""
    return f"{method}, lambda {weight:g}"


def run_forgetting(
    split: Split,
    profile: Profile,
    lambdas: Sequence[float] = LAMBDAS,
    seeds: Iterable[int] = range(3),
    epochs: int = 1,
    workers: int | None = None,
    progress: Callable | None = None,
) -> Results:
    """Results of ("base", 0) and of (`name_of` method and lambda, seed); what is stored is not trained again.

    Args:
        lambdas, seeds: of the adaptations.
        epochs: of each.
        workers: trainings side by side, by default `default_workers`.
        progress: wraps an iterator of trainings, given total; e.g. tqdm.

    Returns:
        for each {val, test}: rates by side, `KEPT` and `GAINED`; test_people: `RATES` in resamples of the people;
        train_seconds, but for the base.

    Raises:
        FloatingPointError, TrainingDiverged: if an adaptation diverged.
    """
    import joblib

    store = Store(split)
    base, _ = base_model(store, split, profile, seed=0)
    common = replace(COMMON, use_prior_preservation=True, epochs=epochs, base_model_path=str(base))
    configs = {
        (name_of(method, weight), seed): replace(common, **options, lambda_prior=float(weight), seed=seed)
        for seed in seeds
        for method, options in METHODS.items()
        for weight in lambdas
    }
    missing = [config for config in configs.values() if store.find(_key(config)) is None]
    jobs = [
        group
        for seed in dict.fromkeys(c.seed for c in missing)
        if (group := [c for c in missing if c.seed == seed and c.use_lora_attention])
    ]
    jobs += [[config] for config in missing if not config.use_lora_attention]
    if jobs:
        side_by_side = min(default_workers() if workers is None else workers, len(jobs))
        run = joblib.Parallel(side_by_side, return_as="generator_unordered", batch_size=1)
        done = run(joblib.delayed(_train_and_keep)(store, split, job) for job in jobs)
        for _ in progress(done, total=len(jobs)) if progress else done:
            pass
    untrained = replace(common, use_prior_preservation=False)
    scores = store.get(
        _key(untrained) | {"name": "forgetting, base"},
        lambda _: _score(prepare_model(untrained, split.test.feature_dim)[0], split),
    )
    return {("base", 0): scores} | {job: store.find(_key(config)) for job, config in configs.items()}


def _key(config: TrainConfig) -> dict:
    named = replace(config, base_model_path=Path(config.base_model_path).name)  # wherever the base lies
    return {"name": "forgetting", "config": named.to_dict()}


def _train_and_keep(store: Store, split: Split, configs: list[TrainConfig]) -> None:
    """Train configs, several in one pass; score and store each."""
    # a prior that is too weak is here on purpose
    with warnings.catch_warnings(action="ignore", category=TrainingAdvice):
        if configs[0].use_lora_attention:
            runs = train_together([with_cuda_graph(config) for config in configs], split.train, split.val)
        else:
            runs = [train(with_cuda_graph(config), split.train, split.val, progress=False) for config in configs]
    for config, run in zip(configs, runs, strict=True):
        if run.stopped == "diverged":
            raise FloatingPointError(f"lambda {config.lambda_prior:g}, seed {config.seed}: the loss is not finite")
        scores = _score(run.model, split) | {"train_seconds": run.train_seconds}
        store.get(_key(config), lambda _, scores=scores: scores)


def _score(model: nn.Module, split: Split) -> dict:
    """Rates of each side of 45 degrees alone, as `run_forgetting` returns them."""
    scores: dict[str, dict] = {"val": {}, "test": {}, "test_people": {}}
    for part in ("val", "test"):
        faces = getattr(split, part)
        predicted = predict(model, faces)
        for where, side in ((KEPT, faces.abs_yaw < BOUNDARY), (GAINED, faces.abs_yaw >= BOUNDARY)):
            found, own = predicted[side], faces.where(side)
            if part == "val":
                scores["val"][where] = recognition_by_yaw(found, own.front, own.person, own.abs_yaw)["all"]
                continue
            of_side = score(found, own, "test", (FAR,))
            scores["test"][where] = of_side["test"]["all"]
            scores["test_people"][where] = {rate: of_side["test_people"]["all"][rate] for rate in RATES}
    return scores


def _methods(results: Results) -> dict[str, list[float]]:
    """The lambdas of each method of results, in rising order."""
    found: dict[str, set[float]] = {}
    for name, _ in results:
        if name != "base":
            method, _, weight = name.rpartition(", lambda ")
            found.setdefault(method, set()).add(float(weight))
    return {method: sorted(weights) for method, weights in found.items()}


def changes(results: Results) -> pd.DataFrame:
    """What adaptation has done to the base, on test people.

    Returns:
        a row per method, lambda (column weight), rate of `RATES` and side of 45 degrees (column where: `KEPT` or
        `GAINED`); mean and half of rate(adapted) - rate(base), paired by people, its 95 % interval over people and
        seeds.
    """
    rows = []
    for method, weights in _methods(results).items():
        for weight in weights:
            for rate in RATES:
                for where in (KEPT, GAINED):
                    apart = difference(results, name_of(method, weight), "base", rate, where)
                    rows.append(
                        {
                            "method": method,
                            "weight": weight,
                            "rate": rate,
                            "where": where,
                            "mean": apart.mean,
                            "half": apart.half,
                        }
                    )
    return pd.DataFrame(rows)


def changes_table(results: Results) -> pd.DataFrame:
    """`changes` as text: a row per method and lambda, a column per rate and side, e.g. '-0.011 ± 0.005'."""
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    sides = {KEPT: "|yaw| < 45°", GAINED: "|yaw| ≥ 45°"}
    for row in changes(results).itertuples():
        cell = f"{row.mean:+.3f} ± {row.half:.3f}"
        rows.setdefault((row.method, f"{row.weight:g}"), {})[sides[row.where], RATES[row.rate]] = cell
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["adapted by", "lambda"])
    columns = [(side, rate) for side in sides.values() for rate in RATES.values()]
    return table[columns].set_axis(pd.MultiIndex.from_tuples(columns), axis=1)


def _compared(results: Results, pairs: Sequence[tuple[str, str]], rate: str) -> dict[tuple[str, str], str]:
    """{(name, other): their difference on both sides of 45 degrees}, in words; p-values corrected for all of them."""
    words = judged(
        {(pair, where): difference(results, *pair, rate, where) for pair in pairs for where in (KEPT, GAINED)}
    )
    return {pair: f"{words[pair, KEPT]} below 45°, {words[pair, GAINED]} beyond" for pair in pairs}


def findings(results: Results, rate: str = "tar") -> str:
    """What is forgotten without a prior, and what each lambda changes against lambda 0, as a Markdown list.

    Test people; differences are paired by seed and by people.
    """
    pairs = []
    for method, (zero, *weights) in _methods(results).items():
        none = name_of(method, zero)
        pairs += [(none, "base"), *((name_of(method, weight), none) for weight in weights)]
    lines = [
        f"- {name} against {'the base' if other == 'base' else other.rpartition(', ')[2]}: {words}."
        for (name, other), words in _compared(results, pairs, rate).items()
    ]
    return "\n".join([*lines, f"- ({correction(2 * len(pairs))})"])


def recommendation(results: Results, rate: str = "tar") -> str:
    """Which lambda to take for each method, as a Markdown list.

    Chosen on validation people by the mean of both sides of 45 degrees; what it earns is stated on test people.
    """

    def on_validation(name: str) -> float:
        found = [result["val"] for (other, _), result in results.items() if other == name]
        return over_seeds((rates[KEPT][rate] + rates[GAINED][rate]) / 2 for rates in found).mean

    chosen = {
        method: max((name_of(method, weight) for weight in weights), key=on_validation)
        for method, weights in _methods(results).items()
    }
    zeros = {method: name_of(method, weights[0]) for method, weights in _methods(results).items()}
    pairs = [(name, zeros[method]) for method, name in chosen.items() if name != zeros[method]]
    words = {
        name: f"; on test people, against {other}: {found}"
        for (name, other), found in _compared(results, pairs, rate).items()
    }
    lines = [f"- **{name}** is best on validation people{words.get(name, '')}." for name in chosen.values()]
    seeds = len({seed for name, seed in results if name != "base"})
    note = "one seed: take this for a smoke test" if seeds == 1 else f"{seeds} seeds"
    lines.append(f"- {RATES[rate]}; {note}; {correction(2 * len(pairs))}.")
    return "\n".join(lines)
