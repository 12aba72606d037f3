"""What helps a model that never saw a real face:  python benchmarks/zero_shot.py [--cfp SET] [--seeds 3] [--fast]

The small transformer, trained on synthetic people in several ways, every one for as many samples:

- fewer people, or fewer views of each: the trade between people, views and megabytes;
- several fronts: the target is the mean of the front and of the views within 15 degrees, not one picture;
- keypoints that half of the views do not tell, as the shipped weights are trained;
- losses that ask for the front itself, not only for the right person;
- prior preservation toward the raw embedding: the base that is preserved is an untrained model, which adds nothing,
  on near-frontal views or on all of them, with lambda .1, 1, 10;
- an ensemble: the mean prediction of all seeds' networks.

Scored on the synthetic test people as they are (rank-1, TAR), and on a benchmark of real faces that
`python -m viewdiff_nb.faces.cfp` made, raw below 45 degrees of |yaw| and a quarter of the step beyond. No real face is
trained on, and nothing is chosen by them. Writes figures/zero_shot_*.csv; what was done is kept in runs/.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from pretrain import WAYS, rows_of, without_keypoints
from study_arguments import study_arguments
from torch import Tensor, nn

from viewdiff_nb.drop_in import DropIn, own_threshold
from viewdiff_nb.faces import FaceViews, Split
from viewdiff_nb.modules.adjusted import unit_prediction
from viewdiff_nb.modules.baselines import Frontaliser, RawEmbedding
from viewdiff_nb.studies.adaptation import FAST_PROFILE, FULL_PROFILE, SMALL_OPTIONS, Profile, load_split, score_model
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.real_benchmark import Benchmark, load_benchmark, stand_in
from viewdiff_nb.studies.real_faces import score_fold
from viewdiff_nb.studies.real_models import Family, base_model
from viewdiff_nb.studies.real_rates import fold_rates
from viewdiff_nb.studies.real_tables import differences_table, rates_table
from viewdiff_nb.studies.store import Store, run_jobs, train_pass
from viewdiff_nb.studies.tables import recognition_table
from viewdiff_nb.training.checkpoint import build_model, save_checkpoint
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import OwnRandomness

NEAR = 15.0  # degrees of |yaw| of a view that counts as a front, too


@dataclass(frozen=True)
class Row:
    """What a training changes: a share of the people, of each one's views, the set, the config."""

    people: float = 1.0
    views: float = 1.0
    change: Callable[[FaceViews], FaceViews] = lambda faces: faces
    options: tuple[tuple[str, Any], ...] = ()


def several_fronts(faces: FaceViews) -> FaceViews:
    near = faces.where(faces.abs_yaw < NEAR)
    total = F.normalize(faces.front, dim=1).index_add(0, near.person, F.normalize(near.src[:], dim=1))
    return replace(faces, front=F.normalize(total, dim=1))


def toward_raw(weight: float, most: float) -> tuple[tuple[str, Any], ...]:
    return (("use_prior_preservation", True), ("lambda_prior", weight), ("prior_max_yaw", most))


PLAIN = "all people, 16 views, one front"
ROWS: dict[str, Row] = {
    PLAIN: Row(),
    "half of the people": Row(people=0.5),
    "a quarter of the people": Row(people=0.25),
    "8 views of each": Row(views=0.5),
    "4 views of each": Row(views=0.25),
    "several fronts": Row(change=several_fronts),
    "half without keypoints": Row(change=without_keypoints),
    "loss identity+cosine": Row(options=(("loss", "identity+cosine"),)),
    "loss mse, the guide's": Row(options=(("loss", "mse"),)),
    "prior toward raw below 45°, lambda 1": Row(options=toward_raw(1.0, 45.0)),
    "prior toward raw below 45°, lambda 10": Row(options=toward_raw(10.0, 45.0)),
    "prior toward raw, lambda .1": Row(options=toward_raw(0.1, 180.0)),
    "prior toward raw, lambda 1": Row(options=toward_raw(1.0, 180.0)),
}
ENSEMBLE = "the mean of all seeds' networks"


class Mean(Frontaliser):
    """The mean of several models' predictions of length 1."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        found = [unit_prediction(member, unit, angles, keypoints_3d, pose_error) for member in self.members]
        return F.normalize(torch.stack(found).mean(0), dim=-1)


def fewer(faces: FaceViews, row: Row) -> FaceViews:
    """A share of the people, with a share of the views of each: every second, or every fourth."""
    faces = faces.select(torch.arange(round(row.people * len(faces.names))))
    number = torch.arange(len(faces)) - torch.searchsorted(faces.person, faces.person)  # views of a person lie together
    return row.change(faces.where(number % round(1 / row.views) == 0))


def config_of(profile: Profile, row: Row, seed: int, base: Path | None) -> TrainConfig:
    """The same number of samples for every row."""
    epochs = round(profile.small_epochs / row.people / row.views)
    config = replace(profile.common, epochs=epochs, seed=seed, **SMALL_OPTIONS)
    if "use_prior_preservation" in dict(row.options):
        config = replace(config, base_model_path=str(base))
    return replace(config, **dict(row.options))


def train_row(store: Store, split: Split, profile: Profile, name: str, seed: int) -> Path:
    """Where the network of a row and seed is; it is trained if it is not there."""
    row, base = ROWS[name], store.folder / f"zero_shot_untrained_{split.train.feature_dim}_{seed}.pth"
    config = config_of(profile, row, seed, base)
    path = store.checkpoint(f"zero-shot, {name}", config)
    if not path.is_file():
        if config.base_model_path:
            with OwnRandomness(seed):
                untrained = build_model(config, split.train.feature_dim, base=True)
            save_checkpoint(base, {"model": untrained.state_dict()})
        (run,) = train_pass([config], replace(split, train=fewer(split.train, row)))
        save_checkpoint(path, {"model": run.model.state_dict()})
    return path


def on_real(model: nn.Module, benchmark: Benchmark) -> dict:
    """Rates of a model that no fold has changed."""
    family = Family(lambda faces, seed, wanted: {("fixed",): model}, {"fixed": ("fixed",)})
    return fold_rates(
        benchmark,
        [score_fold(family, benchmark, fold, 0)["fixed"] | {"machine": machine()} for fold in range(benchmark.folds)],
    )


def main() -> None:
    arguments = study_arguments(__doc__ or "", 3, lambda parser: parser.add_argument("--cfp", type=Path))
    profile = FAST_PROFILE if arguments.fast else FULL_PROFILE
    seeds = 1 if arguments.fast else arguments.seeds
    split = load_split(profile)
    benchmark = load_benchmark(arguments.cfp) if arguments.cfp else stand_in(split.test)
    store = Store(split)
    jobs = [(name, seed) for seed in range(seeds) for name in ROWS]
    run_jobs(partial(train_row, store, split, profile), jobs, progress=_counted)
    synthetic: dict = {("raw", 0): score_model(RawEmbedding(), split, 0.0)}
    real: dict = {("raw", 0): on_real(RawEmbedding(), benchmark)}
    faces = benchmark.faces
    threshold = own_threshold(F.normalize(faces.src, dim=1), faces.front, faces.person, faces.angles)
    points: dict = {"raw": rows_of(RawEmbedding(), faces, threshold)["45-90"]}
    plain = []
    for name, seed in jobs:
        path = train_row(store, split, profile, name, seed)
        model = base_model(config_of(profile, Row(), seed, None), path, split.train.feature_dim)
        synthetic[name, seed] = score_model(model, split, 0.0)
        real[name, seed] = on_real(DropIn(model, WAYS), benchmark)
        if seed == 0:
            points[name] = rows_of(DropIn(model, WAYS), faces, threshold)["45-90"]
        plain += [model] * (name == PLAIN)
    mean = Mean(plain)
    synthetic[ENSEMBLE, 0] = score_model(mean, split, 0.0)
    real[ENSEMBLE, 0] = on_real(DropIn(mean, WAYS), benchmark)
    note = f"{seeds} seed(s); ± 95 % over people and seeds; {machine()}"
    rank1, tar = (recognition_table(synthetic, rate) for rate in ("rank1", "tar"))
    table = pd.DataFrame({"rank-1": rank1["all"], "rank-1, 75-90": rank1["75-90"], "TAR at FAR 1e-3": tar["all"]})
    _keep(table, "zero_shot_synthetic", arguments.out, "Trained on synthetic people, tested on others of them", note)
    table = pd.DataFrame.from_dict(points, orient="index").rename_axis("model")
    title = f"{benchmark.name}: views from 45° at the recogniser's own threshold, a quarter of the step"
    _keep(table, "zero_shot_points", arguments.out, title, f"seed 0; ± 95 % over people; {machine()}")
    of = f"{benchmark.name}: raw below 45°, a quarter of the step beyond"
    _keep(rates_table(real), "zero_shot_rates", arguments.out, of, note)
    _keep(differences_table(real, ["raw"]), "zero_shot_against_raw", arguments.out, f"{of}, against raw", note)
    _keep(differences_table(real, [PLAIN]), "zero_shot_against_plain", arguments.out, f"{of}, against {PLAIN}", note)


def _keep(table: pd.DataFrame, name: str, out: Path, title: str, note: str) -> None:
    table.rename_axis(f"{title} ({note})").to_csv(out / f"{name}.csv")
    print(f"\n{title} ({note})\n{table.to_string()}", flush=True)


def _counted(jobs: list) -> list:
    print(f"{len(jobs)} trainings", flush=True)
    return jobs


if __name__ == "__main__":
    main()
