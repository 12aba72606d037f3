"""A base model of near-frontal views, how it is adapted, and how a model is scored.

The base is trained on |yaw| < 45 degrees and adapted to |yaw| >= 45 degrees; `studies.controls` compares ways to do so.
What has settings beside its training (a ridge's strength, say) has them chosen on the validation people, by TAR.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from viewdiff_nb.faces import FaceViews, Split, load_face_views, split_by_person
from viewdiff_nb.files import HEADS
from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.studies.candidates import BASELINES, CLOSED_FORMS, Setting, as_enrolled
from viewdiff_nb.studies.significance import FARS, resampled_people, resampled_rates
from viewdiff_nb.studies.store import Store, train_pass
from viewdiff_nb.training import TrainConfig, predict
from viewdiff_nb.training.checkpoint import build_model, save_checkpoint

BOUNDARY = 45.0  # degrees of |yaw|: the base's domain below, the adapted one from there on

# scored at the end; the recipe (loss, mix-up) was chosen on validation people, see docs/recipe.md
COMMON = TrainConfig(val_people=200, test_people=300, batch_size=128, dropout=0.2, lr=5e-4, mixup=True, val_every=1000)


@dataclass(frozen=True)
class Profile:
    """How much work a study does, by default all of it, and the config that its trainings have in common."""

    name: str = "full"
    train_people: int | None = None  # None: all
    base_epochs: int = 5
    adapt_epochs: int = 7
    small_epochs: int = 16  # of the small transformer, all yaws
    baseline_epochs: int = 12  # all yaws, too
    real_epochs: int = 8  # on the folds of a real benchmark; of 16 its training folds chose a quarter most often
    real_seeds: int = 3
    common: TrainConfig = COMMON


FULL_PROFILE = Profile()
FAST_PROFILE = Profile(
    "fast",
    train_people=300,
    base_epochs=2,
    adapt_epochs=2,
    small_epochs=2,
    baseline_epochs=2,
    real_epochs=1,
    real_seeds=1,
    common=replace(COMMON, d_model=256, num_layers=2, dim_feedforward=512),
)

FINE_TUNING = {"min_yaw": BOUNDARY, "lr": 2e-4, "lora_lr": 1e-2}  # chosen among three each on validation people
LORA = FINE_TUNING | {"use_lora_attention": True, "freeze_base": True}
LORA_8 = LORA | {"rank": 8, "lora_alpha": 8.0}
PROJECTION = {"use_projection_layer": True, "voxel_resolution": 8}  # as good as 16 on validation people, and faster
ADAPTATIONS: dict[str, dict] = {
    "full fine-tuning": FINE_TUNING,
    "LoRA r=4": LORA | {"rank": 4, "lora_alpha": 4.0},
    "LoRA r=8": LORA_8,
    "LoRA r=16": LORA | {"rank": 16, "lora_alpha": 16.0},
    "LoRA r=8 + 3-D projection": LORA_8 | PROJECTION,
    "LoRA r=8 + 3-D projection 16³": LORA_8 | PROJECTION | {"voxel_resolution": 16},
    "LoRA r=8 + prior": LORA_8 | {"use_prior_preservation": True},
}
SMALL_OPTIONS = {"d_model": 256, "num_layers": 2, "dim_feedforward": 512, "lr": 1e-3, "weight_decay": 1.0}
SMALL = "small transformer, all yaws"  # sizes and weight decay were chosen on validation people, seed 0
MODELS: dict[str, tuple[str, dict]] = {
    "base": ("base_epochs", {"max_yaw": BOUNDARY}),
    SMALL: ("small_epochs", SMALL_OPTIONS),
    **{name: ("baseline_epochs", {}) for name in (*BASELINES, *CLOSED_FORMS)},
}
"""How each is trained: its epochs' field in `Profile`, and changes to the profile's common config."""


def load_split(profile: Profile = FULL_PROFILE, folder: Path = HEADS) -> Split:
    """The shipped people, split; a smaller profile trains on fewer people, and tests on the same."""
    common = profile.common
    split = split_by_person(load_face_views(folder), common.val_people, common.test_people, common.split_seed)
    if profile.train_people is None:
        return split
    return replace(split, train=split.train.select(torch.arange(profile.train_people)))


def config_of(profile: Profile, name: str, seed: int) -> TrainConfig:
    """How one of `MODELS` is trained."""
    epochs, options = MODELS[name]
    return replace(profile.common, seed=seed, epochs=getattr(profile, epochs), **options)


def run_job(store: Store, split: Split, profile: Profile, name: str, seed: int) -> dict:
    """The result of one of `MODELS`, which is trained if it is not stored."""
    config = config_of(profile, name, seed)
    if name in CLOSED_FORMS:
        return store.get(name, config, lambda: _best_candidate(split, name))
    return trained(store, split, name, config, BASELINES.get(name), keep_weights=name == "base")


def _best_candidate(split: Split, name: str) -> dict:
    """The result of the setting with the highest TAR on validation people, and which it is."""
    candidates = CLOSED_FORMS[name](split.train.in_memory())

    def tar(setting: Setting) -> float:
        model, faces = candidates[setting], as_enrolled(candidates[setting], split.val)
        found = recognition_by_yaw(predict(model, faces), faces.front, faces.person, faces.abs_yaw)["all"]
        return -1.0 if math.isnan(found["tar"]) else found["tar"]  # too few people to tell: the first setting

    best = max(candidates, key=tar)
    return score_model(candidates[best], split, 0.0) | {"setting": best}


def base_model(store: Store, split: Split, profile: Profile, seed: int) -> tuple[Path, dict]:
    """Checkpoint and result of the base of a seed, trained if there is none yet."""
    result = run_job(store, split, profile, "base", seed)
    return store.checkpoint("base", config_of(profile, "base", seed)), result


def trained(
    store: Store,
    split: Split,
    name: str,
    config: TrainConfig,
    build: Callable[[FaceViews], nn.Module] | None = None,
    keep_weights: bool = False,
    score: Callable[[nn.Module, Split, float], dict] | None = None,
) -> dict:
    """Scores of a training, which is done if it is not stored under its name and config.

    Args:
        build: makes the model, if it is not the one that config describes; without parameters it is only scored.
        keep_weights: leave a checkpoint in the store, too.
        score: of model, split and seconds of training; by default `score_model`.
    """
    score = score or score_model

    def make() -> dict:
        model = None
        if build:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = build(split.train)
            if not list(model.parameters()):
                return score(model, split, 0.0)
        (run,) = train_pass([config], split, model)
        if keep_weights:
            save_checkpoint(store.checkpoint(name, config), {"model": run.model.state_dict()})
        return score(run.model, split, run.train_seconds)

    return store.get(name, config, make, keep_weights)


def score_model(model: nn.Module, split: Split, seconds: float) -> dict:
    """Those of `score` for val and test people, `parameter_counts` and train_seconds."""
    scores: dict = {}
    for part, faces in (("val", split.val), ("test", split.test)):
        scores |= score(predict(model, faces), as_enrolled(model, faces), part)
    return scores | parameter_counts(model) | {"train_seconds": seconds}


def score(predicted: Tensor, faces: FaceViews, part: str, fars: Sequence[float] = FARS) -> dict:
    """{part: rates by yaw bin, part_people: the same in resamples of the people}, as the tables want it."""
    scored = predicted, faces.front, faces.person, faces.abs_yaw
    resampled = resampled_rates(*scored, resampled_people(len(faces.names)), fars)
    lists = {
        where: {rate: [round(value, 5) for value in values.tolist()] for rate, values in of_bin.items()}
        for where, of_bin in resampled.items()
    }
    return {part: recognition_by_yaw(*scored, tuple(fars)), f"{part}_people": lists}


def configuration_counts() -> dict[str, dict[str, int]]:
    """`parameter_counts` of every configuration of `ADAPTATIONS`, untrained."""
    counts = {}
    for name, options in ADAPTATIONS.items():
        built = options | {"freeze_base": None, "use_prior_preservation": False}  # which need a base to load
        model = build_model(replace(COMMON, **built), COMMON.d_model)
        if options.get("freeze_base"):
            model.freeze_base()
        counts[name] = parameter_counts(model)
    return counts


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: all, trainable, and in LoRA layers."""
    roles: dict[str, str] = getattr(model, "parameter_roles", dict)()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "lora": sum(p.numel() for n, p in model.named_parameters() if roles.get(n) == "lora"),
    }
