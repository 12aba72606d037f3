"""What the field knows about training, tried on validation people: which of it recognises people better.

    python benchmarks/recipe_study.py [--fast] [--seeds 3] [--out figures]

Losses, margins, mix-up, view pairs as positives, mirrored people, a gate by yaw, test-time flip: each trained on
views of all yaws, never scored on test people. What survived is in `adaptation.COMMON`.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from mirror import has_mirrored_halves, mirrored, swap_halves
from study_arguments import study_arguments
from torch import Tensor, nn
from tqdm.auto import tqdm

from viewdiff_nb.faces import FaceViews, Split
from viewdiff_nb.files import HEADS
from viewdiff_nb.modules.attention import encode_pose
from viewdiff_nb.modules.baselines import DREAM, MLP
from viewdiff_nb.plots import save_table
from viewdiff_nb.studies.adaptation import (
    FAST_PROFILE,
    FULL_PROFILE,
    WIDE_OPTIONS,
    Profile,
    base_model,
    load_split,
    score,
)
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.store import Store, code_fingerprint, run_jobs, train_pass
from viewdiff_nb.studies.tables import Results, difference, rate_estimate
from viewdiff_nb.training import TrainConfig, predict
from viewdiff_nb.training.checkpoint import prepare_model

RECIPE = "two-way, mix-up"  # the kit's
PLAIN = {"mixup": False}
LOSSES_TRIED = ("mse", "cosine", "identity", "identity+cosine", "identity+margin", "two-way")
RECIPES: dict[str, dict] = {
    **{loss: PLAIN | {"loss": loss} for loss in LOSSES_TRIED},
    "identity, mix-up": {"loss": "identity"},
    RECIPE: {},
    f"{RECIPE}, view pairs": {"loss": "two-way+pairs", "paired_views": True},
    f"{RECIPE}, mirrored people": {},
    f"{RECIPE}, gate by yaw": {},
    f"{RECIPE}, weight decay 1": {"weight_decay": 1.0},
    f"{RECIPE}, dropout 0.35": {"dropout": 0.35},
}
MODELS: dict[str, dict] = {
    "MLP": {},
    "MLP, hidden 2048": {},
    "DREAM": {},
    "LoRA": WIDE_OPTIONS | {"use_projection_layer": False},
    "LoRA + projection 8³": WIDE_OPTIONS,
    "LoRA + projection 16³": WIDE_OPTIONS | {"voxel_resolution": 16},
    "LoRA + projection 8³, view pairs": WIDE_OPTIONS | {"loss": "two-way+pairs", "paired_views": True},
}
FLIP = ", test-time flip"
CODE = code_fingerprint(Path(__file__).parent, (Path(__file__).name, "mirror.py"))  # results are stored under it, too
SHOWN = ("all", "0-30", "45-60", "60-75", "75-90")


class YawGated(nn.Module):
    """A model whose residual is scaled by a learned function of the head pose, in (0, 1): src + g(pose) r."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.gate = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 1))

    def forward(self, src: Tensor, angles: Tensor, return_residual: bool = True, **conditions: Tensor) -> Tensor:
        residual = self.model(src, angles=angles, **conditions) * self.gate(encode_pose(angles)).sigmoid()
        return residual if return_residual else src + residual


def with_mirrored(faces: FaceViews) -> FaceViews:
    """The people, and beside them their mirror images as people of their own."""
    other = mirrored(faces)
    joined = {
        name: torch.cat((getattr(faces, name), getattr(other, name)))
        for name in ("front", "src", "keypoints_3d", "angles")
    }
    names = (*faces.names, *(f"{name}, mirrored" for name in faces.names))
    return replace(faces, names=names, person=torch.cat((faces.person, faces.person + len(faces.names))), **joined)


def recipe_study(
    profile: Profile,
    split: Split,
    seeds: Iterable[int],
    progress: Callable = iter,
    names: Iterable[str] = (*RECIPES, *MODELS),
    workers: int | None = None,
    store: Store | None = None,
) -> Results:
    """Results on validation people by (name of `RECIPES` or `MODELS`, seed); for some also with `FLIP` behind it."""
    store, seeds = store or Store(split), list(seeds)
    work = partial(tried, store, split, profile)
    jobs = [(name, seed) for seed in seeds for name in names]
    wide = [(seed, True) for seed in seeds if any(MODELS.get(name) for name, _ in jobs)]
    run_jobs(partial(base_model, store, split, profile), wide, workers)
    run_jobs(work, jobs, workers, progress)
    results = {}
    for name, seed in jobs:
        results[name, seed] = found = work(name, seed)
        if "flip" in found:
            results[name + FLIP, seed] = found["flip"]
    return results


def tried(store: Store, split: Split, profile: Profile, name: str, seed: int) -> dict:
    """The result of one of `RECIPES` or `MODELS`, trained if it is not stored."""
    options = RECIPES.get(name, MODELS.get(name))
    epochs = profile.baseline_epochs if name in MODELS and not options else profile.recipe_epochs
    base = None
    if options.get("use_lora_attention"):
        base = str(base_model(store, split, profile, seed, wide=True)[0])
    config = replace(profile.common, seed=seed, epochs=epochs, base_model_path=base, **options)
    return store.get(f"recipe {name}, code {CODE}", config, lambda: _try(name, config, split))


def _try(name: str, config: TrainConfig, split: Split) -> dict:
    """Train one recipe; score it on validation people only."""
    model = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if name.startswith("MLP"):
            model = MLP(split.train.feature_dim, hidden=2048 if "2048" in name else 1024)
        elif name == "DREAM":
            model = DREAM(split.train.feature_dim)
        elif name.endswith("gate by yaw"):
            model = YawGated(prepare_model(config, split.train.feature_dim)[0])
    people = split
    if name.endswith("mirrored people"):
        # as many steps as the others
        people = replace(split, train=with_mirrored(split.train))
        config = replace(config, epochs=max(1, config.epochs // 2))
    (run,) = train_pass([config], people, model)
    predicted = predict(run.model, split.val)
    result = score(predicted, split.val, "val") | {"train_seconds": run.train_seconds}
    if name == RECIPE or config.base_model_path:
        result["flip"] = score(predicted + swap_halves(predict(run.model, mirrored(split.val))), split.val, "val")
    return result


def recipe_table(results: Results) -> pd.DataFrame:
    """Rank-1 and TAR on validation people by yaw, and the paired difference to the kit's recipe over all views."""
    rows = {}
    for name in dict.fromkeys(name for name, _ in results):
        rows[name] = {
            f"{words} {where}": str(rate_estimate(results, name, rate, where, "val"))
            for rate, words in (("rank1", "rank-1"), ("tar", "TAR"))
            for where in SHOWN
        }
        for rate, words in (("rank1", "rank-1"), ("tar", "TAR")):
            apart = difference(results, name, RECIPE, rate, part="val")
            rows[name][f"{words} against the recipe"] = f"{apart.mean:+.3f} ± {apart.half:.3f}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("trained with")


def write_table(results: Results, folder: Path, note: str) -> None:
    """The table as CSV and PNG, and printed."""
    table, title = recipe_table(results), "What the field knows, tried on validation people"
    plt.close(save_table(table, "recipe_val", folder, title, note))
    print(f"{title}\n{note}\n{table.to_string()}", flush=True)


def main() -> None:
    arguments = study_arguments(__doc__, seeds=3)
    if not has_mirrored_halves(HEADS):
        raise SystemExit(f"{HEADS}: mirrored people need embeddings of a crop and its mirror image, side by side")
    profile = FAST_PROFILE if arguments.fast else FULL_PROFILE
    note = f"{profile.name} run, {arguments.seeds} seeds, mean ± 95 % interval over seeds and people; {machine()}"
    seeds = range(arguments.seeds)
    results = recipe_study(profile, load_split(profile), seeds, lambda jobs: tqdm(jobs, desc="recipes"))
    write_table(results, arguments.out, note)


if __name__ == "__main__":
    main()
