"""Every model with the same budget, beside the controls that could refute what is said of it.

All rows see as many samples: models from scratch `scratch_epochs` of all views; adapted ones a base that saw views with
|yaw| < 45 degrees, then views beyond (half of all each), together as many. All have the same trials: learning rate,
weight decay and dropout from one grid, chosen by TAR on validation people with seed 0. What was chosen is trained anew
with other seeds, each from a base of its own, and scored once on the test people.
"""

import functools
import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from viewdiff_nb.faces import FaceViews, Split
from viewdiff_nb.files import CONTROL_RESULTS
from viewdiff_nb.studies import adaptation
from viewdiff_nb.studies.control_rows import ROWS, SMALL, Row
from viewdiff_nb.studies.robustness import HALF, fused, geometry, robustness, side_rates
from viewdiff_nb.studies.store import Store, train_pass
from viewdiff_nb.training import TrainConfig, TrainingDiverged, TrainResult, predict
from viewdiff_nb.training.checkpoint import load_model, save_checkpoint

RATES, DECAYS, DROPOUTS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.01, 1.0), (0.1, 0.3)
TRIALS = tuple(
    {"lr": rate, "lora_lr": rate, "weight_decay": decay, "dropout": dropout}
    for rate, decay, dropout in product(RATES, DECAYS, DROPOUTS)
)


PROFILE = replace(adaptation.FULL_PROFILE, base_epochs=6)
SMALL_PROFILE = replace(PROFILE, common=replace(PROFILE.common, **SMALL))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Effort:
    """How much is done: by default all of it. Without trials, settings are those of the shipped results."""

    profile: adaptation.Profile = PROFILE
    trials: tuple[dict[str, float], ...] = TRIALS
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # seed 0 was tuned with
    scratch_epochs: int = 8
    adapt_epochs: int = 10
    view_epochs: int = 4
    guide_epochs: int = 100


FULL = Effort()
EFFORTS = {
    "full": FULL,
    "shipped": replace(FULL, trials=()),
    "small": replace(FULL, trials=(), profile=SMALL_PROFILE),
    "fast": Effort(adaptation.FAST_PROFILE, (TRIALS[8], TRIALS[16]), (1,), 2, 2, 1, 2),
}
"""shipped: the settings that were chosen on a GPU; small: so, too, and with two layers, 256 wide, for CPUs."""
ROBUST = ("MLP, 1024 wide", "small transformer", "full fine-tuning", "LoRA r=8", "projection", "LoRA r=8 + projection")


@functools.cache
def setting(effort: str) -> tuple[Effort, Split, Store]:
    """Of a worker; read once."""
    chosen = EFFORTS[effort]
    split = adaptation.load_split(chosen.profile)
    return chosen, split, Store(split)


def config_of(effort: str, name: str, seed: int, options: dict[str, Any]) -> TrainConfig:
    """How a row is trained; options: of a trial, and further changes."""
    chosen, split, store = setting(effort)
    row, common = ROWS[name], chosen.profile.common
    epochs = {"views": chosen.view_epochs, "guide": chosen.guide_epochs, "adapted": chosen.adapt_epochs}
    base: Path | None = None
    if row.group == "views":
        base = single_view(effort, seed)
    elif row.group in ("adapted", "guide"):
        base, _ = adaptation.base_model(store, split, chosen.profile, seed)
    changes = {
        "seed": seed,
        "epochs": epochs.get(row.group, chosen.scratch_epochs),
        "base_model_path": base and str(base),
        "min_yaw": adaptation.BOUNDARY if row.group in ("adapted", "guide") else 0.0,
    }
    return replace(common, **(changes | row.options | options))


def train_row(row: Row, config: TrainConfig, split: Split) -> TrainResult:
    """A row's model, built from a config and trained; what a row builds itself has its base in it already."""
    model = None
    if row.build:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = row.build(config, split.train)
        config = replace(config, base_model_path=None, freeze_base=None, use_prior_preservation=False)
    (run,) = train_pass([config], split, model)
    return run


def _trained(effort: str, name: str, config: TrainConfig, split: Split | None = None) -> tuple[nn.Module, float]:
    """A row's model and the seconds of its training."""
    run = train_row(ROWS[name], config, split or setting(effort)[1])
    return run.model, run.train_seconds


def _scored_faces(model: nn.Module, name: str, faces: FaceViews) -> tuple[Tensor, FaceViews]:
    """Predictions and the views that they are of; of several views together, the first one of each group."""
    predicted = predict(model, faces, 2 * HALF)
    if ROWS[name].group != "views":
        return predicted, faces
    return fused(predicted, faces, int(ROWS[name].options["n_views"]))


def try_out(effort: str, name: str, trial: int) -> dict:
    """{settings, val: rates by side}; a training that diverges has a TAR of -1."""
    chosen, split, store = setting(effort)
    options = chosen.trials[trial]
    config = config_of(effort, name, 0, options)

    def make() -> dict:
        try:
            model, seconds = _trained(effort, name, config)
        except (TrainingDiverged, FloatingPointError):
            return {"settings": options, "val": {"all": {"tar": -1.0, "rank1": 0.0}}, "train_seconds": 0.0}
        val = side_rates(*_scored_faces(model, name, split.val))
        return {"settings": options, "val": val, "train_seconds": seconds}

    return store.get(f"controls, trial, {name}", config, make)


def choose(effort: str, name: str) -> dict[str, float]:
    """The settings with the highest TAR on validation people; none for the guide's recipe, which says all itself."""
    if ROWS[name].group == "guide":
        return {}
    if not EFFORTS[effort].trials:
        return shipped_settings()[name]
    trials = [try_out(effort, name, trial) for trial in range(len(EFFORTS[effort].trials))]
    return max(trials, key=lambda found: found["val"]["all"]["tar"])["settings"]


@functools.cache
def shipped_settings() -> dict[str, dict[str, float]]:
    models = pd.read_csv(CONTROL_RESULTS / "models.csv").set_index("model")["settings"]
    return {name: json.loads(settings) for name, settings in models.items()}


def single_view(effort: str, seed: int) -> Path:
    """The model that cross-view attention is put upon: LoRA and projection, adapted to all yaws."""
    _, _, store = setting(effort)
    name = "LoRA r=8 + projection"
    config = config_of(effort, name, seed, choose(effort, name) | {"min_yaw": 0.0})
    key = "controls, single view"

    def make() -> dict:
        model, seconds = _trained(effort, name, config)
        save_checkpoint(store.checkpoint(key, config), {"model": model.state_dict(), "config": config.to_dict()})
        return {"train_seconds": seconds}

    store.get(key, config, make, with_weights=True)
    return store.checkpoint(key, config)


def final(effort: str, name: str, seed: int) -> dict:
    """`adaptation.score` of what was chosen, trained with a seed, on validation and test people; and how it was made.

    Also `robustness` and `geometry` of the rows that have them. Names "average, V views" are means of the predictions
    of `single_view`.
    """
    _, split, store = setting(effort)
    if name.startswith("average"):
        return _average(effort, name, seed)
    settings = choose(effort, name)
    config = config_of(effort, name, seed, settings)

    def make() -> dict:
        model, seconds = _trained(effort, name, config)
        scores: dict = {"settings": settings, "train_seconds": seconds} | adaptation.parameter_counts(model)
        scores |= {"val": side_rates(*_scored_faces(model, name, split.val))}
        scores |= adaptation.score(*_scored_faces(model, name, split.test), "test")
        if name in ROBUST:
            scores["robust"] = robustness(model, split)
        if found := geometry(model, split.val):
            scores["geometry"] = found
        return scores

    return store.get(f"controls, {name}", config, make)


def _average(effort: str, name: str, seed: int) -> dict:
    _, split, store = setting(effort)
    path = single_view(effort, seed)
    config = replace(EFFORTS[effort].profile.common, base_model_path=str(path), seed=seed)

    def make() -> dict:
        model = load_model(path)
        scores = adaptation.score(*fused(predict(model, split.test), split.test, int(name.split()[1])), "test")
        return scores | adaptation.parameter_counts(model) | {"train_seconds": 0.0, "settings": {}}

    return store.get(f"controls, {name}", config, make)


def curve(effort: str, name: str, epochs: int, seed: int) -> dict:
    """{val: rates by side} of what was chosen, trained for other epochs."""
    _, split, store = setting(effort)
    config = config_of(effort, name, seed, choose(effort, name) | {"epochs": epochs})

    def make() -> dict:
        model, _ = _trained(effort, name, config)
        return {"val": side_rates(*_scored_faces(model, name, split.val))}

    return store.get(f"controls, curve, {name}", config, make)


def fewer(effort: str, name: str, people: int, views: int, seed: int) -> dict:
    """{test: rates by side} with fewer training people or views of each, as many samples and the same settings."""
    _, split, store = setting(effort)
    train = split.train.select(torch.arange(people))
    part = replace(split, train=train.sample_views(views, torch.Generator().manual_seed(seed)))
    config = config_of(effort, name, seed, choose(effort, name))
    share = len(part.train) / len(split.train)
    config = replace(config, epochs=round(config.epochs / share))

    def make() -> dict:
        model, _ = _trained(effort, name, config, part)
        return {"test": side_rates(predict(model, part.test), part.test)}

    return store.get(f"controls, {people} people, {views} views, {name}", config, make)
