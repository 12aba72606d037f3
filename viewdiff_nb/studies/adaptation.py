"""The main study: a base model of near-frontal views is adapted to side views, in several ways.

For every seed a base is trained on |yaw| < 45 degrees, then adapted to |yaw| >= 45 degrees. Beside it stand models
that see all yaws: simple baselines, the plain transformer, the same adapted by LoRA and the 3-D projection, and a
small transformer. Every trained model is scored once on the test people, and every result is kept under a key of all
that made it, so a second run only does what is missing.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, multiprocessing, nn

from viewdiff_nb.faces.splits import Split, split_by_person
from viewdiff_nb.faces.views import FaceViews, load_face_views
from viewdiff_nb.files import HEADS
from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.modules.baselines import DREAM, MLP, MeanFace, PoseRidge, RawEmbedding
from viewdiff_nb.studies.significance import FARS, resampled_people, resampled_rates
from viewdiff_nb.studies.store import FinishedStore, NotFinishedError, Store
from viewdiff_nb.training.checkpoint import build_model, save_checkpoint
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import with_cuda_graph
from viewdiff_nb.training.evaluation import predict
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.result import TrainingAdvice

BOUNDARY = 45.0  # degrees of |yaw|: the base's domain below, the adapted one from there on


@dataclass(frozen=True)
class Profile:
    """How much work a study does."""

    name: str
    seeds: int
    train_people: int | None  # None: all
    base_epochs: int
    adapt_epochs: int
    wide_base_epochs: int  # for the base that sees all yaws
    wide_epochs: int  # for its adaptation to all yaws
    small_epochs: int  # of the small transformer, all yaws
    baseline_epochs: int  # all yaws, too
    recipe_epochs: int  # of each of recipe_study.py


FULL_PROFILE = Profile(
    "full",
    5,
    None,
    base_epochs=5,
    adapt_epochs=7,
    wide_base_epochs=4,
    wide_epochs=7,
    small_epochs=16,
    baseline_epochs=12,
    recipe_epochs=8,
)
FAST_PROFILE = Profile(
    "fast",
    1,
    300,
    base_epochs=2,
    adapt_epochs=2,
    wide_base_epochs=1,
    wide_epochs=2,
    small_epochs=2,
    baseline_epochs=2,
    recipe_epochs=2,
)

# scored at the end; the recipe (loss, mix-up) was chosen on validation people, see recipe_study.py
COMMON = TrainConfig(val_people=200, test_people=300, batch_size=128, dropout=0.2, lr=5e-4, mixup=True, val_every=1000)
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
MODEL_OPTIONS = ("use_lora_attention", "rank", "lora_alpha", "use_projection_layer", "voxel_resolution")
WIDE_BASE, WIDE = "transformer, all yaws", "LoRA r=8 + 3-D, all yaws"
SMALL = "small transformer, all yaws"  # sizes and weight decay were chosen on validation people, seed 0
SMALL_OPTIONS = {"d_model": 256, "num_layers": 2, "dim_feedforward": 512, "lr": 1e-3, "weight_decay": 1.0}
ALL_YAWS = (WIDE_BASE, WIDE, SMALL)
WIDE_OPTIONS = ADAPTATIONS["LoRA r=8 + 3-D projection"] | {"min_yaw": 0.0}


def load_split(profile: Profile = FULL_PROFILE, folder: Path = HEADS) -> Split:
    """The shipped people, split; a smaller profile trains on fewer people, and tests on the same."""
    split = split_by_person(load_face_views(folder), COMMON.val_people, COMMON.test_people, COMMON.split_seed)
    if profile.train_people is None:
        return split
    return replace(split, train=split.train.select(torch.arange(profile.train_people)))


def base_model(
    store: Store, split: Split, profile: Profile, seed: int, wide: bool = False, recipe: dict | None = None
) -> tuple[Path, dict]:
    """Checkpoint and result of the base of a seed, trained if there is none yet.

    Args:
        wide: let it see all yaws.
        recipe: changes to `COMMON`.
    """
    domain = {"epochs": profile.wide_base_epochs} if wide else {"epochs": profile.base_epochs, "max_yaw": BOUNDARY}
    config = replace(COMMON, seed=seed, **domain | (recipe or {}))

    def make(path: Path) -> dict:
        run = train(with_cuda_graph(config), split.train, split.val, progress=False)
        save_checkpoint(path.with_suffix(".pth"), {"model": run.model.state_dict()})
        return score_model(run.model, split, run.train_seconds)

    return store.get_with_weights({"name": "base", "config": config.to_dict()}, make)


def adaptation(
    store: Store,
    split: Split,
    profile: Profile,
    options: dict,
    seed: int,
    wide: bool = False,
    recipe: dict | None = None,
) -> dict:
    """Result of adapting the base of a seed.

    Args:
        options: of the adaptation, as in `ADAPTATIONS`.
        wide: adapt the base that sees all yaws.
        recipe: changes to `COMMON`, for the base and its adaptation alike.
    """
    base, _ = base_model(store, split, profile, seed, wide, recipe)
    options = {"epochs": profile.wide_epochs if wide else profile.adapt_epochs} | options | (recipe or {})
    config = replace(COMMON, seed=seed, base_model_path=base.name, **options)

    def make(path: Path) -> dict:
        here = with_cuda_graph(replace(config, base_model_path=str(base)))
        run = train(here, split.train, split.val, progress=False)
        return score_model(run.model, split, run.train_seconds)

    return store.get({"name": "adaptation", "config": config.to_dict()}, make)


FIXED = ("raw side view", "mean face", "pose ridge")  # nothing random in them
BASELINES: dict[str, Callable[[FaceViews], nn.Module]] = {
    "raw side view": lambda train: RawEmbedding(),
    "mean face": lambda train: MeanFace(train.front),
    "pose ridge": lambda train: PoseRidge(train.src, train.angles, train.target),
    "DREAM": lambda train: DREAM(train.feature_dim),
    "MLP": lambda train: MLP(train.feature_dim),
}


def baseline(store: Store, split: Split, profile: Profile, name: str, seed: int) -> dict:
    """Result of one of `BASELINES`, trained (where it is trained at all) on all yaws with the models' own recipe."""
    config = replace(COMMON, epochs=profile.baseline_epochs, seed=seed)

    def make(path: Path) -> dict:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = BASELINES[name](split.train)
        if not list(model.parameters()):
            return score_model(model, split, 0.0)
        run = train(with_cuda_graph(config), split.train, split.val, model, progress=False)
        return score_model(run.model, split, run.train_seconds)

    return store.get({"name": name, "config": config.to_dict()}, make)


def score_model(model: nn.Module, split: Split, seconds: float) -> dict:
    """Those of `score` for val and test people, `parameter_counts` and train_seconds."""
    scores = score(predict(model, split.val), split.val, "val") | score(predict(model, split.test), split.test, "test")
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
        model = build_model(replace(COMMON, **{k: v for k, v in options.items() if k in MODEL_OPTIONS}), COMMON.d_model)
        if options.get("freeze_base"):
            model.freeze_base()
        counts[name] = parameter_counts(model)
    return counts


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: all, trainable, and in LoRA layers."""
    roles = model.parameter_roles() if hasattr(model, "parameter_roles") else {}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "lora": sum(p.numel() for n, p in model.named_parameters() if roles.get(n) == "lora"),
    }


def _train_and_score(config: TrainConfig, split: Split, path: Path) -> dict:
    run = train(with_cuda_graph(config), split.train, split.val, progress=False)
    return score_model(run.model, split, run.train_seconds)


def run_job(store: Store, split: Split, profile: Profile, name: str, seed: int) -> dict:
    """The result of one model of the study, trained if there is none yet."""
    if name == SMALL:
        config = replace(COMMON, seed=seed, epochs=profile.small_epochs, **SMALL_OPTIONS)
        return store.get({"name": name, "config": config.to_dict()}, partial(_train_and_score, config, split))
    if name in BASELINES:
        return baseline(store, split, profile, name, seed)
    if name in ("base", WIDE_BASE):
        return base_model(store, split, profile, seed, wide=name == WIDE_BASE)[1]
    if name == WIDE:
        return adaptation(store, split, profile, WIDE_OPTIONS, seed, wide=True)
    return adaptation(store, split, profile, ADAPTATIONS[name], seed)


def run_study(
    profile: Profile,
    split: Split,
    progress: Callable = iter,
    seeds: Iterable[int] | None = None,
    names: Iterable[str] = (*BASELINES, "base", *STUDIED, *ALL_YAWS),
    workers: int | None = None,
) -> dict[tuple[str, int], dict]:
    """All results of the study by (name, seed); what was done before is reused.

    Args:
        progress: wraps lists of (name, seed), e.g. tqdm.
        seeds: by default those of the profile.
        names: which models.
        workers: processes that train side by side, by default `default_workers`. Steps of this model are small: two
            processes with a core each get more done than one with two cores.
    """
    store, finished = Store(split), FinishedStore(split)
    seeds = range(profile.seeds) if seeds is None else seeds
    workers = default_workers() if workers is None else workers
    jobs = [(name, seed) for seed in seeds for name in names if seed == 0 or name not in FIXED]
    results: dict[tuple[str, int], dict] = {}
    bases = [job for job in jobs if job[0] in ("base", WIDE_BASE)]
    for stage in (bases, [job for job in jobs if job not in bases]):  # the others start from the bases
        missing = [job for job in stage if not _is_done(finished, split, profile, *job)] if workers > 1 else []
        with _pool(split, min(workers, len(missing))) as pool:
            running = {job: pool.submit(_work, profile, *job) for job in missing}
            for job in progress(stage):
                if job in running:
                    running[job].result()
                with warnings.catch_warnings(action="ignore", category=TrainingAdvice):
                    results[job] = run_job(store, split, profile, *job)
    return results


def default_workers() -> int:
    """One process per core, eight at most; a single one if there is a GPU."""
    return 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8)


def _is_done(finished: FinishedStore, split: Split, profile: Profile, name: str, seed: int) -> bool:
    try:
        run_job(finished, split, profile, name, seed)
    except NotFinishedError:
        return False
    return True


def _pool(split: Split, workers: int):
    if workers < 1:
        return nullcontext()
    threads = max(1, (os.cpu_count() or 1) // workers)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (split, threads))


def _start_worker(split: Split, threads: int) -> None:
    global _of_worker
    torch.set_num_threads(threads)
    _of_worker = Store(split), split
    warnings.simplefilter("ignore", TrainingAdvice)  # a study compares settings, bad ones too


def _work(profile: Profile, name: str, seed: int) -> None:
    run_job(*_of_worker, profile, name, seed)
