"""Which module earns what: each alone, together, and left out; and several views against their average.

python benchmarks/module_study.py [--fast] [--seeds 5] [--out figures]
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from study_arguments import study_arguments
from torch import nn
from tqdm.auto import tqdm

from viewdiff_nb.faces import FaceViews, Split
from viewdiff_nb.metrics import rank_rate, similarity_scores, tar_at_far
from viewdiff_nb.modules.transformer import fuse_views
from viewdiff_nb.plots import save_table
from viewdiff_nb.studies.adaptation import (
    ADAPTATIONS,
    BOUNDARY,
    FAST_PROFILE,
    FINE_TUNING,
    FULL_PROFILE,
    Profile,
    base_model,
    load_split,
    trained,
)
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.significance import correction, judged, over_seeds
from viewdiff_nb.studies.store import Store, code_fingerprint, run_jobs
from viewdiff_nb.studies.tables import Results
from viewdiff_nb.training.batches import view_groups

# The modules are compared with the plainer recipe: no mix-up, the loss one way.
RECIPE = {"loss": "identity", "mixup": False}
FULL_MODULES = replace(FULL_PROFILE, base_epochs=8, adapt_epochs=6)
LORA = ADAPTATIONS["LoRA r=8"]
PROJECTION = FINE_TUNING | {"use_projection_layer": True, "freeze_base": True}
BOTH = LORA | PROJECTION
PRIOR = {"use_prior_preservation": True}
MODULES: dict[str, dict] = {
    "LoRA": LORA,
    "LoRA without pose": LORA | {"pose_dim": 0},
    "LoRA on feed-forward": LORA | {"lora_targets": ("feed_forward",)},
    "LoRA on both": LORA | {"lora_targets": ("attention", "feed_forward")},
    "projection": PROJECTION,
    "LoRA + projection": BOTH,
    "LoRA + prior": LORA | PRIOR,
    "projection + prior": PROJECTION | PRIOR,
    "LoRA + projection + prior": BOTH | PRIOR,
}
WITHOUT = {"LoRA": "projection + prior", "projection": "LoRA + prior", "prior": "LoRA + projection"}  # all but one
VIEW_COUNTS = (2, 3, 5)
VIEW_BATCH = 120  # a multiple of all view counts
CROSS_VIEW = {"use_cross_view": True, "min_yaw": 0.0, "batch_size": VIEW_BATCH, "lr": 1e-3, "weight_decay": 0.3}
CODE = code_fingerprint(Path(__file__).parent, (Path(__file__).name,))  # scores made here are stored under it


def adapted(store: Store, split: Split, profile: Profile, name: str, seed: int) -> dict:
    """Result of the base of a seed, or of its adaptation by one of `MODULES`."""
    profile = replace(profile, common=replace(profile.common, **RECIPE))
    base, result = base_model(store, split, profile, seed)
    if name == "base":
        return result
    config = replace(profile.common, seed=seed, epochs=profile.adapt_epochs, base_model_path=str(base), **MODULES[name])
    return trained(store, split, "module study", config)


def all_results(
    work: Callable[[str, int], dict],
    names: Sequence[str],
    seeds: Iterable[int],
    workers: int | None,
    progress: Callable,
) -> Results:
    """work(name, seed) for all names and seeds; the first name goes first, since the others start from it."""
    jobs = [(name, seed) for seed in seeds for name in names]
    run_jobs(work, [job for job in jobs if job[0] == names[0]], workers)
    run_jobs(work, jobs, workers, progress)
    return {job: work(*job) for job in jobs}


def module_study(
    profile: Profile,
    split: Split,
    seeds: Iterable[int],
    progress: Callable = iter,
    workers: int | None = None,
    store: Store | None = None,
) -> Results:
    """Results by (name of `MODULES` or "base", seed)."""
    work = partial(adapted, store or Store(split), split, profile)
    return all_results(work, ("base", *MODULES), seeds, workers, progress)


def module_table(results: Results, part: str) -> pd.DataFrame:
    """Rank-1 and TAR of every combination, over all views, base domain and adapted domain."""
    heads = {"all": "", "0-45": " < 45°", "45-90": " ≥ 45°"}
    columns = {
        f"{words}{head}": (rate, where)
        for where, head in heads.items()
        for rate, words in (("rank1", "rank-1"), ("tar", "TAR"))
    }
    seeds = sorted({seed for _, seed in results})
    rows = {}
    for name in ("base", *MODULES):
        found = [results[name, seed] for seed in seeds]
        rates = {
            head: f"{over_seeds(r[part][where][rate] for r in found):.3f}" for head, (rate, where) in columns.items()
        }
        rows[name] = {"trainable": f"{found[0]['trainable'] / 1e6:.3f}M"} | rates
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("adapted by")


def earnings_table(results: Results, part: str) -> pd.DataFrame:
    """What each module adds to the base alone, and to the other two: paired differences over seeds."""
    seeds = sorted({seed for _, seed in results})
    comparisons = {
        ("LoRA", "alone"): ("LoRA", "base"),
        ("projection", "alone"): ("projection", "base"),
        ("pose in LoRA", "in LoRA"): ("LoRA", "LoRA without pose"),
    }
    for module, rest in WITHOUT.items():
        comparisons[module, "added to the other two"] = ("LoRA + projection + prior", rest)
    heads = {
        "rank-1 ≥ 45°": ("rank1", "45-90"),
        "TAR ≥ 45°": ("tar", "45-90"),
        "rank-1 < 45°": ("rank1", "0-45"),
        "TAR < 45°": ("tar", "0-45"),
    }
    found = {}
    for row, (with_it, without) in comparisons.items():
        for head, (rate, yaw) in heads.items():
            pairs = [(results[with_it, s][part][yaw][rate], results[without, s][part][yaw][rate]) for s in seeds]
            found[row, head] = over_seeds(a - b for a, b in pairs)
    cells = judged(found)
    rows = [{"module": row[0], "added": row[1]} | {head: cells[row, head] for head in heads} for row in comparisons]
    return pd.DataFrame(rows).set_index("module").rename_axis(f"module ({correction(len(found))})")


@torch.no_grad()
def multi_view_rates(model: nn.Module, faces: FaceViews, n_views: int) -> dict[str, float]:
    """Rank-1 and TAR@FAR=1e-3 of fused groups of n_views random views, seen together if the model can."""
    groups = view_groups(faces.person, n_views, torch.Generator().manual_seed(0))
    if not len(groups):
        raise ValueError(f"no person has {n_views} views to fuse")
    model.eval()
    parts = [
        model(faces.src[i], **faces.conditions(i), return_residual=False)
        for i in (g.flatten() for g in groups.split(200))
    ]
    scores = similarity_scores(fuse_views(torch.cat(parts), n_views), faces.front, faces.person[groups[:, 0]])
    tar = tar_at_far(scores.genuine_counts[0], scores.impostor_counts[0])
    return {"rank1": rank_rate(scores), "tar": tar.item()}


def score_views(model: nn.Module, split: Split, seconds: float) -> dict:
    """{val, test: {all, side: {n_views: rates}}}: fused views of all yaws, and of 45 degrees and more."""
    device = next(model.parameters()).device
    counts = (model.n_views,) if model.cross_view is not None else (1, *VIEW_COUNTS)
    result: dict = {"train_seconds": seconds}
    for part in ("val", "test"):
        faces = getattr(split, part).to(device)
        kinds = {"all": faces, "side": faces.where(faces.abs_yaw >= BOUNDARY)}
        result[part] = {
            kind: {str(v): multi_view_rates(model, views, v) for v in counts} for kind, views in kinds.items()
        }
    return result


def fused(store: Store, split: Split, profile: Profile, name: str, seed: int) -> dict:
    """Result of one training of `multi_view_study`."""
    common = replace(profile.common, **RECIPE, seed=seed)
    base, _ = base_model(store, split, replace(profile, common=common), seed)
    single = replace(
        common,
        **BOTH | {"min_yaw": 0.0, "batch_size": VIEW_BATCH},
        epochs=profile.adapt_epochs,
        base_model_path=str(base),
    )
    train_and_score = partial(trained, store, split, f"multi-view study, code {CODE}", score=score_views)
    result = train_and_score(single, keep_weights=True)
    if name == "average":
        return result
    checkpoint = store.checkpoint(f"multi-view study, code {CODE}", single)
    crossed = replace(
        common,
        **BOTH | CROSS_VIEW,
        n_views=int(name.split()[1]),
        epochs=max(1, profile.adapt_epochs // 2),
        base_model_path=str(checkpoint),
    )
    return train_and_score(crossed)


def multi_view_study(
    profile: Profile,
    split: Split,
    seeds: Iterable[int],
    progress: Callable = iter,
    workers: int | None = None,
    store: Store | None = None,
) -> Results:
    """Results by ("average" | "cross-view V", seed).

    "average" is a base with LoRA and projection, adapted to all yaws one view at a time. Cross-view
    attention is then trained alone, on top of it, to make the fused prediction of V views right.
    """
    work = partial(fused, store or Store(split), split, profile)
    return all_results(work, ("average", *(f"cross-view {views}" for views in VIEW_COUNTS)), seeds, workers, progress)


def multi_view_table(results: Results, part: str) -> pd.DataFrame:
    """Average of single-view predictions against cross-view attention, for each number of views."""
    seeds = sorted({seed for _, seed in results})
    rows = []
    for kind in ("all", "side"):
        for views in map(str, VIEW_COUNTS):
            for rate in ("rank1", "tar"):
                average = [results["average", s][part][kind][views][rate] for s in seeds]
                crossed = [results[f"cross-view {views}", s][part][kind][views][rate] for s in seeds]
                gain = over_seeds(c - a for c, a in zip(crossed, average, strict=True))
                rows.append(
                    {
                        "views": views,
                        "of": "any yaw" if kind == "all" else "|yaw| ≥ 45°",
                        "rate": rate,
                        "one view": f"{over_seeds(results['average', s][part][kind]['1'][rate] for s in seeds):.3f}",
                        "average": f"{over_seeds(average):.3f}",
                        "cross-view": f"{over_seeds(crossed):.3f}",
                        "gain": f"{gain:+.3f}",
                    }
                )
    return pd.DataFrame(rows).set_index("views")


def write_tables(modules: Results, views: Results, folder: Path, note: str) -> None:
    """All tables of both studies as CSV and PNG, and printed."""
    for part, words in (("val", "validation people"), ("test", "test people")):
        found = {
            f"modules_{part}": (module_table(modules, part), f"Adapted to |yaw| ≥ 45° by which modules; {words}"),
            f"modules_earn_{part}": (earnings_table(modules, part), f"What each module adds; {words}"),
            f"multi_view_{part}": (multi_view_table(views, part), f"Several views of a person to one frontal; {words}"),
        }
        for name, (table, title) in found.items():
            plt.close(save_table(table, name, folder, title, note))
            print(f"\n{title}\n{note}\n{table.to_string()}", flush=True)


def main() -> None:
    arguments = study_arguments(__doc__, seeds=5)
    profile, seeds = (FAST_PROFILE if arguments.fast else FULL_MODULES), range(arguments.seeds)
    split = load_split(profile)
    note = f"{profile.name} run, {arguments.seeds} seeds, mean ± 95 % interval over seeds; {machine()}"
    modules = module_study(profile, split, seeds, lambda jobs: tqdm(jobs, desc="modules"))
    views = multi_view_study(profile, split, seeds, lambda jobs: tqdm(jobs, desc="views"))
    write_tables(modules, views, arguments.out, note)


if __name__ == "__main__":
    main()
