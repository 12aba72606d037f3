"""The main study: a base model of near-frontal views is adapted to side views, in several ways.

For every seed a base is trained on |yaw| < 45 degrees, then adapted to |yaw| >= 45 degrees. Every trained
model is scored once on the test people, and every result is kept under a key of all that made it, so a
second run only does what is missing.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .. import __version__
from ..faces.views import FaceViews, Split, load_face_views, split_by_person
from ..metrics import recognition_by_yaw
from ..modules.baselines import DREAM, MLP, MeanFace, PoseRidge, RawEmbedding
from ..paths import HEADS, RUNS
from ..training.checkpoint import save_checkpoint
from ..training.config import TrainConfig
from ..training.losses import LOSSES
from ..training.trainer import predict, train

BOUNDARY = 45.0  # degrees of |yaw|: the base's domain below, the adapted one from there on


@dataclass(frozen=True)
class Profile:
    """How much work a study does."""

    name: str
    seeds: int
    train_people: int | None  # None: all
    base_epochs: int
    adapt_epochs: int
    all_epochs: int  # for baselines trained on all views


FULL = Profile("full", seeds=5, train_people=None, base_epochs=8, adapt_epochs=6, all_epochs=8)
FAST = Profile("fast", seeds=1, train_people=300, base_epochs=2, adapt_epochs=2, all_epochs=2)

COMMON = TrainConfig(batch_size=128, dropout=0.2, lr=5e-4, val_every=1000)  # scored at the end
FINE_TUNING = {"min_yaw": BOUNDARY, "lr": 2e-4, "lora_lr": 1e-2}  # chosen among three each on validation people
LORA = FINE_TUNING | {"use_lora_attention": True, "freeze_base": True}
ADAPTATIONS: dict[str, dict] = {
    "full fine-tuning": FINE_TUNING,
    "LoRA r=4": LORA | {"rank": 4, "lora_alpha": 4.0},
    "LoRA r=8": LORA | {"rank": 8, "lora_alpha": 8.0},
    "LoRA r=16": LORA | {"rank": 16, "lora_alpha": 16.0},
    "LoRA r=8 + 3-D projection": LORA | {"rank": 8, "lora_alpha": 8.0, "use_projection_layer": True},
    "LoRA r=8 + prior": LORA | {"rank": 8, "lora_alpha": 8.0, "use_prior_preservation": True},
}


def load_split(profile: Profile = FULL, folder: Path = HEADS) -> Split:
    """The shipped people, split; a smaller profile trains on fewer people, and tests on the same."""
    split = split_by_person(load_face_views(folder), COMMON.val_people, COMMON.test_people, COMMON.split_seed)
    if profile.train_people is None:
        return split
    return replace(split, train=split.train.select(torch.arange(profile.train_people)))


class Store:
    """Finished results, one JSON file per key: config, data and version.

    Training times are those of the machine, and of its load, on which a result was made.
    """

    def __init__(self, split: Split, folder: Path = RUNS) -> None:
        self.folder = folder / "study"
        self.data = fingerprint(split)

    def path(self, key: dict) -> Path:
        text = json.dumps(key | {"data": self.data, "version": __version__}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def get(self, key: dict, make: Callable[[Path], dict]) -> dict:
        """The stored result of key, or make(path), stored; make may put further files beside path."""
        path = self.path(key)
        if path.is_file():
            return json.loads(path.read_text())
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"key": key} | make(path), indent=1))
        os.replace(part, path)
        return json.loads(path.read_text())

    def get_with_weights(self, key: dict, make: Callable[[Path], dict]) -> tuple[Path, dict]:
        """As `get`, for a make that also writes a checkpoint, path with suffix .pth; made again if that is gone."""
        checkpoint = self.path(key).with_suffix(".pth")
        if not checkpoint.is_file():
            self.path(key).unlink(missing_ok=True)
        return checkpoint, self.get(key, make)


def fingerprint(split: Split) -> str:
    """A hash of all tensors of a split."""
    digest = hashlib.sha256()
    for faces in (split.train, split.val, split.test):
        for tensor in (faces.front, faces.src, faces.keypoints_3d, faces.angles, faces.person):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_model(store: Store, split: Split, profile: Profile, seed: int, **changes) -> tuple[Path, dict]:
    """Checkpoint and result of the base of a seed, trained if there is none yet."""
    config = replace(COMMON, max_yaw=BOUNDARY, epochs=profile.base_epochs, seed=seed, **changes)

    def make(path: Path) -> dict:
        run = train(config, split.train, split.val, progress=False)
        save_checkpoint(path.with_suffix(".pth"), {"model": run.model.state_dict()})
        return score_model(run.model, split, run.train_seconds)

    return store.get_with_weights({"name": "base", "config": config.to_dict()}, make)


def adaptation(store: Store, split: Split, profile: Profile, options: dict, seed: int, **both) -> dict:
    """Result of adapting the base of a seed.

    Args:
        options: of the adaptation, as in `ADAPTATIONS`.
        both: options of the base as well as of its adaptation.
    """
    base, _ = base_model(store, split, profile, seed, **both)
    options = {"epochs": profile.adapt_epochs} | options | both
    config = replace(COMMON, seed=seed, base_model_path=base.name, **options)

    def make(path: Path) -> dict:
        run = train(replace(config, base_model_path=str(base)), split.train, split.val, progress=False)
        return score_model(run.model, split, run.train_seconds)

    return store.get({"name": "adaptation", "config": config.to_dict()}, make)


BASELINES: dict[str, Callable[[FaceViews], nn.Module]] = {
    "raw side view": lambda train: RawEmbedding(),
    "mean face": lambda train: MeanFace(train.front),
    "pose ridge": lambda train: PoseRidge(train.src, train.angles, train.target),
    "DREAM": lambda train: DREAM(train.feature_dim),
    "MLP": lambda train: MLP(train.feature_dim),
}


def baseline(store: Store, split: Split, profile: Profile, name: str, seed: int) -> dict:
    """Result of one of `BASELINES`, trained (where it is trained at all) on all side views, base domain too."""
    config = replace(COMMON, epochs=profile.all_epochs, seed=seed)

    def make(path: Path) -> dict:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = BASELINES[name](split.train)
        if not list(model.parameters()):
            return score_model(model, split, 0.0)
        run = train(config, split.train, split.val, model, progress=False)
        return score_model(run.model, split, run.train_seconds)

    return store.get({"name": name, "config": config.to_dict()}, make)


def score_model(model: nn.Module, split: Split, seconds: float) -> dict:
    """{val, test: rates by yaw bin, parameters, trainable, lora, train_seconds}."""
    rates = {}
    for part in ("val", "test"):
        faces = getattr(split, part).to(next(iter(model.parameters()), split.train.src).device)
        rates[part] = recognition_by_yaw(predict(model, faces), faces.front, faces.person, faces.abs_yaw)
    return rates | parameter_counts(model) | {"train_seconds": seconds}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: all, trainable, and in LoRA layers."""
    roles = model.parameter_roles() if hasattr(model, "parameter_roles") else {}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "lora": sum(p.numel() for n, p in model.named_parameters() if roles.get(n) == "lora"),
    }


def run_study(
    profile: Profile, split: Split, progress: Callable = iter, seeds: Iterable[int] | None = None
) -> dict[tuple[str, int], dict]:
    """All results of the study by (name, seed); what was done before is reused.

    Args:
        progress: wraps the list of (name, seed), e.g. tqdm.
        seeds: by default those of the profile.
    """
    store = Store(split)
    fixed = ("raw side view", "mean face", "pose ridge")  # nothing random in them
    seeds = range(profile.seeds) if seeds is None else seeds
    jobs = [(name, seed) for seed in seeds for name in (*BASELINES, "base", *ADAPTATIONS)
            if seed == 0 or name not in fixed]  # fmt: skip
    results = {}
    for name, seed in progress(jobs):
        if name in BASELINES:
            results[name, seed] = baseline(store, split, profile, name, seed)
        elif name == "base":
            results[name, seed] = base_model(store, split, profile, seed)[1]
        else:
            results[name, seed] = adaptation(store, split, profile, ADAPTATIONS[name], seed)
    return results


def loss_study(profile: Profile, split: Split, progress: Callable = iter) -> dict[str, dict]:
    """Results of LoRA r=8, base and adaptation alike trained with each loss, for seed 0."""
    store = Store(split)
    lora = ADAPTATIONS["LoRA r=8"]
    return {loss: adaptation(store, split, profile, lora, 0, loss=loss) for loss in progress(list(LOSSES))}
