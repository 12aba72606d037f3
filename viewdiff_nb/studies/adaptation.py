"""The main study: a base model of near-frontal views is adapted to side views, in several ways.

For every seed a base is trained on |yaw| < 45 degrees, then adapted to |yaw| >= 45 degrees. Beside it stand models
that see all yaws: simple baselines, the plain transformer, the same adapted by LoRA and the 3-D projection, and a
small transformer. What has settings beside its training (a ridge's strength, a step's length) has them chosen on the
validation people, by TAR. Every model is scored once on the test people.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from viewdiff_nb.faces import FaceViews, Split, load_face_views, split_by_person
from viewdiff_nb.files import HEADS
from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.studies.candidates import BASELINES, CLOSED_FORMS, Setting, adjustments, as_enrolled
from viewdiff_nb.studies.significance import FARS, resampled_people, resampled_rates
from viewdiff_nb.studies.store import Store, run_jobs, train_pass
from viewdiff_nb.training import TrainConfig, predict
from viewdiff_nb.training.checkpoint import build_model, load_base_weights, save_checkpoint

BOUNDARY = 45.0  # degrees of |yaw|: the base's domain below, the adapted one from there on

# scored at the end; the recipe (loss, mix-up) was chosen on validation people, see docs/recipe.md
COMMON = TrainConfig(val_people=200, test_people=300, batch_size=128, dropout=0.2, lr=5e-4, mixup=True, val_every=1000)


@dataclass(frozen=True)
class Profile:
    """How much work a study does, by default all of it, and the config that its trainings have in common."""

    name: str = "full"
    seeds: int = 5
    train_people: int | None = None  # None: all
    base_epochs: int = 5
    adapt_epochs: int = 7
    wide_base_epochs: int = 4  # for the base that sees all yaws
    wide_epochs: int = 7  # for its adaptation to all yaws
    small_epochs: int = 16  # of the small transformer, all yaws
    baseline_epochs: int = 12  # all yaws, too
    real_epochs: int = 8  # on the folds of a real benchmark; of 16 its training folds chose a quarter most often
    real_seeds: int = 3
    common: TrainConfig = COMMON


FULL_PROFILE = Profile()
FAST_PROFILE = Profile(
    "fast",
    seeds=1,
    train_people=300,
    base_epochs=2,
    adapt_epochs=2,
    wide_base_epochs=1,
    wide_epochs=2,
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
STUDIED = tuple(name for name in ADAPTATIONS if "16³" not in name)  # which is there for its speed
WIDE_OPTIONS = LORA_8 | PROJECTION | {"min_yaw": 0.0}
SMALL_OPTIONS = {"d_model": 256, "num_layers": 2, "dim_feedforward": 512, "lr": 1e-3, "weight_decay": 1.0}
WIDE_BASE, WIDE = "transformer, all yaws", "LoRA r=8 + 3-D, all yaws"
SMALL = "small transformer, all yaws"  # sizes and weight decay were chosen on validation people, seed 0
ALL_YAWS = (WIDE_BASE, WIDE, SMALL)
BASES = ("base", WIDE_BASE, SMALL, "MLP")  # others start from their weights
STEP_CHOSEN = {"MLP, step chosen": "MLP", f"{SMALL}, step chosen": SMALL}  # which part of whose prediction to take
FIXED = ("raw side view", "mean face", "pose ridge", *CLOSED_FORMS)  # nothing random in them


MODELS: dict[str, tuple[str, dict, str | None]] = {
    "base": ("base_epochs", {"max_yaw": BOUNDARY}, None),
    **{name: ("adapt_epochs", options, "base") for name, options in ADAPTATIONS.items()},
    WIDE_BASE: ("wide_base_epochs", {}, None),
    WIDE: ("wide_epochs", WIDE_OPTIONS, WIDE_BASE),
    SMALL: ("small_epochs", SMALL_OPTIONS, None),
    **{name: ("baseline_epochs", {}, None) for name in (*BASELINES, *CLOSED_FORMS)},
}
MODELS |= {name: (MODELS[other][0], MODELS[other][1], other) for name, other in STEP_CHOSEN.items()}
"""How each is trained: its epochs' field in `Profile`, changes to the profile's common config, what it starts from."""


def load_split(profile: Profile = FULL_PROFILE, folder: Path = HEADS) -> Split:
    """The shipped people, split; a smaller profile trains on fewer people, and tests on the same."""
    common = profile.common
    split = split_by_person(load_face_views(folder), common.val_people, common.test_people, common.split_seed)
    if profile.train_people is None:
        return split
    return replace(split, train=split.train.select(torch.arange(profile.train_people)))


def run_study(
    profile: Profile,
    split: Split,
    progress: Callable = iter,
    seeds: Iterable[int] | None = None,
    names: Iterable[str] = (*BASELINES, *CLOSED_FORMS, "base", *STUDIED, *ALL_YAWS, *STEP_CHOSEN),
    workers: int | None = None,
    store: Store | None = None,
) -> dict[tuple[str, int], dict]:
    """All results of the study by (name, seed); what was done before is reused.

    Args:
        progress: wraps lists of trainings, e.g. tqdm.
        seeds: by default those of the profile.
        names: which of `MODELS`.
        workers: trainings side by side, see `store.run_jobs`.
        store: by default that of split.
    """
    store = store or Store(split)
    seeds = range(profile.seeds) if seeds is None else seeds
    jobs = [(name, seed) for seed in seeds for name in names if seed == 0 or name not in FIXED]
    jobs.sort(key=lambda job: job[0] not in BASES)  # the others start from them
    for bases in (True, False):
        stage = [job for job in jobs if (job[0] in BASES) == bases]
        missing = [job for job in stage if not store.find(job[0], config_of(store, profile, *job), with_weights=bases)]
        run_jobs(partial(run_job, store, split, profile), missing, workers, progress)
    return {job: run_job(store, split, profile, *job) for job in jobs}


def config_of(store: Store, profile: Profile, name: str, seed: int) -> TrainConfig:
    """How one of `MODELS` is trained, from a base in store."""
    epochs, options, base = MODELS[name]
    path = base and str(store.checkpoint(base, config_of(store, profile, base, seed)))
    return replace(profile.common, seed=seed, epochs=getattr(profile, epochs), base_model_path=path, **options)


def run_job(store: Store, split: Split, profile: Profile, name: str, seed: int) -> dict:
    """The result of one of `MODELS`; it, and the base it starts from, are trained if they are not stored."""
    if base := MODELS[name][2]:
        run_job(store, split, profile, base, seed)
    config = config_of(store, profile, name, seed)
    if name in STEP_CHOSEN or name in CLOSED_FORMS:
        return store.get(name, config, lambda: _best_candidate(store, split, profile, name, config))
    return trained(store, split, name, config, BASELINES.get(name), keep_weights=name in BASES)


def _best_candidate(store: Store, split: Split, profile: Profile, name: str, config: TrainConfig) -> dict:
    """The result of the setting with the highest TAR on validation people, and which it is."""
    if name in CLOSED_FORMS:
        candidates = CLOSED_FORMS[name](split.train.in_memory())
    else:
        base = STEP_CHOSEN[name]
        build = BASELINES.get(base)
        model = build(split.train) if build else build_model(config, split.train.feature_dim)
        model.load_state_dict(load_base_weights(str(config.base_model_path)))
        candidates = adjustments(model.eval(), split.train.in_memory())

    def tar(setting: Setting) -> float:
        model, faces = candidates[setting], as_enrolled(candidates[setting], split.val)
        found = recognition_by_yaw(predict(model, faces), faces.front, faces.person, faces.abs_yaw)["all"]
        return -1.0 if math.isnan(found["tar"]) else found["tar"]  # too few people to tell: the first setting

    best = max(candidates, key=tar)
    return score_model(candidates[best], split, 0.0) | {"setting": best}


def base_model(store: Store, split: Split, profile: Profile, seed: int, wide: bool = False) -> tuple[Path, dict]:
    """Checkpoint and result of the base of a seed, trained if there is none yet; wide: the one that sees all yaws."""
    name = WIDE_BASE if wide else "base"
    result = run_job(store, split, profile, name, seed)
    return store.checkpoint(name, config_of(store, profile, name, seed)), result


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
