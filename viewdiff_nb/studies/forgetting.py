"""Forgetting against adaptation: what each weight of the prior keeps of a base, and what it costs beyond.

The base of the main study with seed 0 is adapted to |yaw| >= 45 degrees by LoRA and by full fine-tuning, for several
weights lambda of the prior. All runs of a seed see the same views and the same prior samples in the same order; with
lambda 0 the prior samples are there and weigh nothing.

Both sides of 45 degrees are scored alone, so TAR has a threshold of the side's own. With one threshold for all views,
near-frontal TAR falls when side views move the threshold, though nothing is forgotten.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import pandas as pd
from torch import nn

from viewdiff_nb.faces import Split
from viewdiff_nb.metrics import FAR, recognition_by_yaw
from viewdiff_nb.studies.adaptation import BOUNDARY, FINE_TUNING, LORA_8, Profile, base_model, score
from viewdiff_nb.studies.significance import correction, judged, over_seeds
from viewdiff_nb.studies.store import Store, passes, run_jobs, train_pass
from viewdiff_nb.studies.tables import Results, difference
from viewdiff_nb.training import TrainConfig, predict
from viewdiff_nb.training.checkpoint import prepare_model

METHODS: dict[str, dict] = {"LoRA r=8": LORA_8, "full fine-tuning": FINE_TUNING}
LAMBDAS = (0.0, 0.1, 1.0, 10.0)
KEPT, GAINED = "0-45", "45-90"  # degrees of |yaw|: what the base was trained on, and what it is adapted to
SIDES = {KEPT: "|yaw| < 45°", GAINED: "|yaw| ≥ 45°"}
RATES = {"rank1": "rank-1", "tar": "TAR at FAR 1e-3"}


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
    progress: Callable = iter,
    store: Store | None = None,
) -> Results:
    """Results of ("base", 0) and of (`name_of` method and lambda, seed); what is stored is not trained again.

    Args:
        workers: passes side by side, see `store.run_jobs`.
        progress: wraps the list of passes, e.g. tqdm.
        store: by default that of split.

    Returns:
        for each {val, test}: rates by side, `KEPT` and `GAINED`; test_people: `RATES` in resamples of the people;
        train_seconds, but for the base.

    Raises:
        FloatingPointError, TrainingDiverged: if an adaptation diverged.
    """
    store = store or Store(split)
    base, _ = base_model(store, split, profile, seed=0)
    unadapted = replace(profile.common, epochs=epochs, base_model_path=str(base))
    common = replace(unadapted, use_prior_preservation=True)
    configs = {
        (name_of(method, weight), seed): replace(common, **METHODS[method], lambda_prior=float(weight), seed=seed)
        for seed, method, weight in product(seeds, METHODS, lambdas)
    }
    missing = [config for config in configs.values() if store.find("forgetting", config) is None]
    of_seed = [[c for c in missing if c.seed == seed] for seed in dict.fromkeys(c.seed for c in missing)]
    jobs = [(job,) for group in of_seed for job in passes(group, len(lambdas))]
    run_jobs(partial(_train_and_keep, store, split), jobs, workers, progress)
    untrained = partial(prepare_model, unadapted, split.test.feature_dim)
    results = {("base", 0): store.get("forgetting, base", unadapted, lambda: _score(untrained()[0], split))}
    return results | {job: found for job, config in configs.items() if (found := store.find("forgetting", config))}


def _train_and_keep(store: Store, split: Split, configs: list[TrainConfig]) -> None:
    for config, run in zip(configs, train_pass(configs, split), strict=True):
        scores = _score(run.model, split) | {"train_seconds": run.train_seconds}
        store.get("forgetting", config, partial(dict, scores))


def _score(model: nn.Module, split: Split) -> dict:
    """Rates of each side of 45 degrees alone, as `run_forgetting` returns them."""
    scores: dict[str, dict] = {"val": {}, "test": {}, "test_people": {}}
    for part, faces in (("val", split.val), ("test", split.test)):
        predicted = predict(model, faces)
        for where, side in ((KEPT, faces.abs_yaw < BOUNDARY), (GAINED, faces.abs_yaw >= BOUNDARY)):
            own = faces.where(side)
            if part == "val":
                rates = recognition_by_yaw(predicted[side], own.front, own.person, own.abs_yaw)
                scores["val"][where] = rates["all"]
                continue
            of_side = score(predicted[side], own, "test", (FAR,))
            scores["test"][where] = of_side["test"]["all"]
            resampled = of_side["test_people"]["all"]
            scores["test_people"][where] = {rate: resampled[rate] for rate in RATES}
    return scores


def _methods(results: Results) -> dict[str, list[float]]:
    """The lambdas of each method of results, in rising order."""
    found: dict[str, list[float]] = {}
    for name in {name: None for name, _ in results if name != "base"}:
        method, _, weight = name.rpartition(", lambda ")
        found.setdefault(method, []).append(float(weight))
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
        for weight, rate, where in product(weights, RATES, SIDES):
            apart = difference(results, name_of(method, weight), "base", rate, where)
            rows.append((method, weight, rate, where, apart.mean, apart.half))
    return pd.DataFrame(rows, columns=["method", "weight", "rate", "where", "mean", "half"])


def changes_table(results: Results) -> pd.DataFrame:
    """`changes` as text: a row per method and lambda, a column per rate and side, e.g. '-0.011 ± 0.005'."""
    columns = pd.MultiIndex.from_product((SIDES.values(), RATES.values()))
    rows: dict[tuple[str, str], dict] = {}
    for method, weight, rate, where, mean, half in changes(results).itertuples(index=False):
        rows.setdefault((method, f"{weight:g}"), {})[SIDES[where], RATES[rate]] = f"{mean:+.3f} ± {half:.3f}"
    return pd.DataFrame(rows.values(), rows, columns).rename_axis(["adapted by", "lambda"])


def _compared(results: Results, pairs: Sequence[tuple[str, str]], rate: str) -> dict[tuple[str, str], str]:
    """{(name, other): their difference on both sides of 45 degrees}, in words; p-values corrected for all of them."""
    words = judged({(pair, where): difference(results, *pair, rate, where) for pair in pairs for where in SIDES})
    return {pair: f"{words[pair, KEPT]} below 45°, {words[pair, GAINED]} beyond" for pair in pairs}


def findings(results: Results, rate: str = "tar") -> str:
    """On test people: what is forgotten without a prior, and what each lambda changes against 0, as a Markdown list."""
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

    best, pairs = [], []
    for method, weights in _methods(results).items():
        zero, *others = [name_of(method, weight) for weight in weights]
        best.append(max((zero, *others), key=on_validation))
        if best[-1] != zero:
            pairs.append((best[-1], zero))
    compared = _compared(results, pairs, rate)
    words = {name: f"; on test people, against {other}: {found}" for (name, other), found in compared.items()}
    lines = [f"- **{name}** is best on validation people{words.get(name, '')}." for name in best]
    seeds = len({seed for name, seed in results if name != "base"})
    note = "one seed: take this for a smoke test" if seeds == 1 else f"{seeds} seeds"
    return "\n".join([*lines, f"- {RATES[rate]}; {note}; {correction(2 * len(pairs))}."])
