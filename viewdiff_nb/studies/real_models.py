"""What is compared on real faces: baselines and the kit's models, trained on the folds or on synthetic people."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from viewdiff_nb.faces import FaceViews, Split
from viewdiff_nb.modules.adjusted import InSpace, Summed
from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.studies.adaptation import SMALL, SMALL_OPTIONS, Profile, config_of, trained
from viewdiff_nb.studies.candidates import (
    BASELINES,
    CLOSED_FORMS,
    STEPS,
    WEIGHTS,
    Setting,
    adjustments,
    common_candidates,
    held_out_best,
    in_space,
    whitening_candidates,
)
from viewdiff_nb.studies.store import Store, train_pass
from viewdiff_nb.training.checkpoint import build_model, load_base_weights
from viewdiff_nb.training.config import TrainConfig

EPOCHS = (0.25, 0.5, 1.0)  # of those of the profile
Wanted = Collection[Setting] | None
WHOLE: Setting = (1.0, 1.0, "none")  # all epochs, and the model as it is
Candidates = Callable[[FaceViews, int, Wanted], Mapping[Setting, nn.Module]]


@dataclass(frozen=True)
class Family:
    """Rows of the table that share their trainings.

    candidates: of training people, a seed, and the settings that are wanted (None for all): {setting: fitted model}.
    rows: {name: the setting to take, or which settings to choose among}.
    random: whether the seed matters.
    bases: for each seed the weights that its networks start from, if any.
    """

    candidates: Candidates
    rows: Mapping[str, Setting | Callable[[Setting], bool]]
    random: bool = False
    bases: Sequence[Path] = ()


def any_setting(setting: Setting) -> bool:
    return True


def alone(setting: Setting) -> bool:
    """Settings of `whitened_candidates` that sum nothing."""
    return setting[2] == 0


def summed(setting: Setting) -> bool:
    return not alone(setting)


def raw_candidates(faces: FaceViews, seed: int, wanted: Wanted = None) -> dict[Setting, nn.Module]:
    return {("raw",): RawEmbedding()}


def closed_candidates(
    closed_form: Callable[[FaceViews], Mapping[Setting, nn.Module]], faces: FaceViews, seed: int, wanted: Wanted = None
) -> dict[Setting, nn.Module]:
    return dict(closed_form(faces))


Build = Callable[[FaceViews], nn.Module] | None


def two_held_back(faces: FaceViews) -> Split:
    """All people to train on, but two, who are there for the loop's own validation."""
    most, two = torch.arange(len(faces.names)).split([len(faces.names) - 2, 2])
    return Split(faces.select(most), faces.select(two), faces.select(two))


def trainings(
    config: TrainConfig, build: Build, bases: Sequence[Path], faces: FaceViews, seed: int, wanted: Wanted
) -> Iterator[tuple[float, nn.Module]]:
    """A model trained on faces, from a base if there is one, for each wanted share of config's epochs."""
    base, split = str(bases[seed]) if bases else None, two_held_back(faces)
    for share in EPOCHS:
        if wanted is not None and not any(setting[0] == share for setting in wanted):
            continue
        model = None
        if build:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = build(faces)
        epochs = max(1, round(share * config.epochs))
        (run,) = train_pass([replace(config, seed=seed, epochs=epochs, base_model_path=base)], split, model)
        yield share, run.model.cpu()


def trained_candidates(
    config: TrainConfig, build: Build, bases: Sequence[Path], faces: FaceViews, seed: int, wanted: Wanted = None
) -> dict[Setting, nn.Module]:
    """`trainings`, with every adjustment."""
    found: dict[Setting, nn.Module] = {}
    for share, model in trainings(config, build, bases, faces, seed, wanted):
        found |= {(share, *how): moved for how, moved in adjustments(model, faces).items()}
    return found


def whitened_candidates(
    config: TrainConfig, bases: Sequence[Path], faces: FaceViews, seed: int, wanted: Wanted = None
) -> dict[Setting, nn.Module]:
    """Trained on whitened embeddings: (share of the epochs, step, weight of canonical correlation beside it).

    The strengths of both closed forms are chosen on people left out of faces.
    """
    whiten = partial(whitening_candidates, shrinkages=(0.6, 0.8, 0.9), centrings=("even",))
    correlate = partial(common_candidates, shrinkages=(0.1, 0.3, 0.5), powers=(1.0,))
    space = whiten(faces)[held_out_best(whiten, faces)]
    common = correlate(faces)[held_out_best(correlate, faces)]
    found: dict[Setting, nn.Module] = {}
    for share, model in trainings(config, None, bases, in_space(space, faces), seed, wanted):
        for step in STEPS:
            moved = InSpace(space, model, step)
            found |= {(share, step, w): Summed((moved, common), (1 - w, w)) for w in WEIGHTS[:2]}
            found[share, step, 0.0] = moved
    return found


def base_model(config: TrainConfig, base: Path, feature_dim: int) -> nn.Module:
    """The base of config without any training."""
    model = build_model(config, feature_dim)
    model.load_state_dict(load_base_weights(str(base)))
    return model.eval()


def base_candidates(
    config: TrainConfig, bases: Sequence[Path], faces: FaceViews, seed: int, wanted: Wanted = None
) -> Mapping[Setting, nn.Module]:
    """`base_model`, with every adjustment."""
    model = base_model(config, bases[seed], faces.feature_dim)
    return {(1.0, *how): moved for how, moved in adjustments(model, faces).items()}


def synthetic_base(profile: Profile, split: Split, seed: int, store: Store | None = None) -> Path:
    """Weights of the small transformer trained on the synthetic people of split, all yaws."""
    store = store or Store(split)
    config = config_of(profile, SMALL, seed)
    trained(store, split, "synthetic base", config, keep_weights=True, score=lambda *_: {})
    return store.checkpoint("synthetic base", config)


def families(profile: Profile, bases: Sequence[Path]) -> dict[str, Family]:
    """What is compared; the transformer is the kit's small one, pretrained on synthetic people of all yaws or not.

    Args:
        bases: of `synthetic_base` for each seed; empty to leave out what starts from them, because the faces were seen
            by another recogniser.
    """
    plain = replace(profile.common, epochs=profile.real_epochs)
    small = replace(plain, **SMALL_OPTIONS)  # type: ignore[arg-type]
    tuned = replace(small, lr=2e-4)
    # base_model_path is each seed's own; a config asks for one as soon as it freezes the base
    lora = replace(
        small, use_lora_attention=True, rank=8, lora_alpha=8.0, lora_lr=1e-2, freeze_base=True, base_model_path="bases"
    )
    found = {"raw": Family(raw_candidates, {"raw": ("raw",)})}
    for name, closed_form in CLOSED_FORMS.items():
        found[name] = Family(partial(closed_candidates, closed_form), {name: any_setting})
    networks: dict[str, tuple[Candidates, Sequence[Path]]] = {
        "MLP": (partial(trained_candidates, plain, BASELINES["MLP"], ()), ()),
        "DREAM": (partial(trained_candidates, plain, BASELINES["DREAM"], ()), ()),
        "transformer": (partial(trained_candidates, small, None, ()), ()),
        "pretrained transformer, not adapted": (partial(base_candidates, small, bases), bases),
        "pretrained, fine-tuned": (partial(trained_candidates, tuned, None, bases), bases),
        "pretrained, LoRA r=8": (partial(trained_candidates, lora, None, bases), bases),
    }
    for name, (candidates, starts) in networks.items():
        if name.startswith("pretrained") and not bases:
            continue
        rows: dict = {name: WHOLE, f"{name}, settings chosen": any_setting}
        if name == "pretrained transformer, not adapted":
            rows |= {
                f"{name}, a quarter of the step": (1.0, 0.25, "none"),
                f"{name}, a quarter of the step, centred": (1.0, 0.25, "even"),
            }
        found[name] = Family(candidates, rows, True, starts)
    whitened = partial(whitened_candidates, small, ())
    rows = {"whitened transformer": alone, "whitened transformer + canonical correlation": summed}
    found["whitened transformer"] = Family(whitened, rows, True)
    return found
