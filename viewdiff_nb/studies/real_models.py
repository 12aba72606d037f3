"""What is compared on real faces: baselines, the kit's models, and every setting that the protocol chooses among.

Every row has 18 trials: a network three lengths of its training, three steps toward its prediction, centred or not; the
ridge three strengths, the same steps, centred or not; the whitening nine strengths, centred or not. Centring alone has
two, a network that is not trained six.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from viewdiff_nb.faces import FaceViews, Split
from viewdiff_nb.modules.baselines import Adjusted, PoseRidge, RawEmbedding, WithinClassWhitening
from viewdiff_nb.studies.adaptation import BASELINES, SMALL, SMALL_OPTIONS, Profile, config_of, trained
from viewdiff_nb.studies.store import Store, train_pass
from viewdiff_nb.training.checkpoint import build_model, load_base_weights
from viewdiff_nb.training.config import TrainConfig

STEPS = (0.25, 0.5, 1.0)
CENTRINGS = ("none", "even")
STRENGTHS = (3e2, 1e3, 3e3)  # of the ridge
SHRINKAGES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)  # of the whitening
EPOCHS = (0.25, 0.5, 1.0)  # of those of the profile


Setting = tuple[float | str, ...]
Wanted = Collection[Setting] | None
WHOLE: Setting = (1.0, 1.0, "none")  # all epochs, and the model as it is
Candidates = Callable[[FaceViews, int, Wanted], dict[Setting, nn.Module]]


@dataclass(frozen=True)
class Family:
    """Rows of the table that share their trainings.

    candidates: of training people, a seed, and the settings that are wanted (None for all): {setting: fitted model}.
    rows: {name: the setting to take, or None to choose one}.
    random: whether the seed matters.
    """

    candidates: Candidates
    rows: dict[str, Setting | None]
    random: bool = False


def adjusted(model: nn.Module | None, faces: FaceViews, **options: Any) -> Adjusted:
    """`Adjusted`, fitted to faces."""
    given = faces.src[:], faces.angles, faces.keypoints_3d[:], faces.front
    return Adjusted(model, *given, pose_error=faces.pose_error, **options)


def adjustments(model: nn.Module, faces: FaceViews) -> dict[Setting, nn.Module]:
    """A model with every step and centring."""
    whole = adjusted(model, faces, centring="none")
    unit = F.normalize(faces.src[:], dim=1)
    residual = whole.residual(unit, faces.angles, faces.keypoints_3d[:], faces.pose_error)
    return {
        (step, centring): adjusted(model, faces, step=step, centring=centring, residual=residual)
        for step in STEPS
        for centring in CENTRINGS
    }


def raw_candidates(faces: FaceViews, seed: int, wanted: Wanted = None) -> dict[Setting, nn.Module]:
    return {("raw",): RawEmbedding()}


def centred_candidates(faces: FaceViews, seed: int, wanted: Wanted = None) -> dict[Setting, nn.Module]:
    return {(centring,): adjusted(None, faces, step=0.0, centring=centring) for centring in CENTRINGS}


def ridge_candidates(faces: FaceViews, seed: int, wanted: Wanted = None) -> dict[Setting, nn.Module]:
    given = faces.src[:], faces.angles, faces.target
    ridges = {strength: PoseRidge(*given, strength, residual=True) for strength in STRENGTHS}
    return {
        (strength, *how): model for strength in ridges for how, model in adjustments(ridges[strength], faces).items()
    }


def whitening_candidates(faces: FaceViews, seed: int, wanted: Wanted = None) -> dict[Setting, nn.Module]:
    found: dict[Setting, nn.Module] = {}
    given = faces.src[:], faces.angles, faces.keypoints_3d[:], faces.front, faces.person
    for centring in CENTRINGS:
        centred = adjusted(None, faces, step=0.0, centring=centring)
        found |= {(s, centring): WithinClassWhitening(centred, *given, shrinkage=s) for s in SHRINKAGES}
    return found


def trained_candidates(
    config: TrainConfig,
    build: Callable[[FaceViews], nn.Module] | None,
    faces: FaceViews,
    seed: int,
    wanted: Wanted = None,
) -> dict[Setting, nn.Module]:
    """A model trained on faces for each share of config's epochs, with every adjustment.

    config.base_model_path may hold {seed}.
    """
    most, two = torch.arange(len(faces.names)).split([len(faces.names) - 2, 2])  # for the loop's own validation
    split = Split(faces.select(most), faces.select(two), faces.select(two))
    found: dict[Setting, nn.Module] = {}
    for share in EPOCHS:
        if wanted is not None and not any(setting[0] == share for setting in wanted):
            continue
        model = None
        if build:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = build(faces)
        epochs = max(1, round(share * config.epochs))
        (run,) = train_pass(
            [replace(config, seed=seed, epochs=epochs, base_model_path=_base_path(config, seed))], split, model
        )
        found |= {(share, *how): moved for how, moved in adjustments(run.model.cpu(), faces).items()}
    return found


def base_candidates(
    config: TrainConfig, faces: FaceViews, seed: int, wanted: Wanted = None
) -> dict[Setting, nn.Module]:
    """The base of config without any training, with every adjustment."""
    model = build_model(config, faces.feature_dim)
    model.load_state_dict(load_base_weights(str(_base_path(config, seed))))
    return {(1.0, *how): moved for how, moved in adjustments(model.eval(), faces).items()}


def _base_path(config: TrainConfig, seed: int) -> str | None:
    return config.base_model_path and config.base_model_path.format(seed=seed)


def synthetic_base(profile: Profile, split: Split, seed: int, store: Store | None = None) -> Path:
    """Weights of the small transformer trained on the synthetic people of split, all yaws."""
    store = store or Store(split)
    config = config_of(store, profile, SMALL, seed)
    trained(store, split, "synthetic base", config, keep_weights=True, score=lambda *_: {})
    return store.checkpoint("synthetic base", config)


def families(profile: Profile, base_path: str) -> dict[str, Family]:
    """What is compared.

    Args:
        base_path: of `synthetic_base`, with {seed} in it.
    """
    epochs = profile.real_epochs
    plain = replace(profile.common, epochs=epochs)
    small = replace(plain, **SMALL_OPTIONS)  # type: ignore[arg-type]
    on_base = replace(small, base_model_path=base_path)
    tuned = replace(on_base, lr=2e-4)
    lora = replace(on_base, use_lora_attention=True, freeze_base=True, rank=8, lora_alpha=8.0, lora_lr=1e-2)
    networks = {
        "MLP": partial(trained_candidates, plain, BASELINES["MLP"]),
        "DREAM": partial(trained_candidates, plain, BASELINES["DREAM"]),
        "small transformer": partial(trained_candidates, small, None),
        "small transformer, synthetic people only": partial(base_candidates, on_base),
        "the same, fine-tuned": partial(trained_candidates, tuned, None),
        "the same, LoRA r=8": partial(trained_candidates, lora, None),
    }
    found = {
        "raw": Family(raw_candidates, {"raw": ("raw",)}),
        "centred by pose": Family(centred_candidates, {"centred by pose": None}),
        "ridge": Family(ridge_candidates, {"ridge, shrunk to identity": None}),
        "whitening": Family(whitening_candidates, {"within-class whitening": None}),
    }
    for name, candidates in networks.items():
        found[name] = Family(candidates, {name: WHOLE, f"{name}, step chosen": None}, random=True)
    return found
