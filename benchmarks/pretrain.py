"""Train the weights that the kit ships, and measure them:  python benchmarks/pretrain.py [--cfp SET]

Writes viewdiff_nb/weights/mobilefacenet.safetensors: the small transformer, trained on the synthetic people that train
elsewhere, too (1,300 of data/heads; nobody of the validation and test people). Half of the views tell no keypoints, but
a mean face at their pose, so that it can be asked without. Its steps are not chosen: 0 below 45 degrees of |yaw|, a
quarter beyond, since people drawn by a program would allow more than real ones do (docs/real_faces.md).

Then figures/pretrained.csv: on the synthetic test people, and with --cfp on a benchmark that
`python -m viewdiff_nb.faces.cfp` made, what is accepted at the recogniser's own threshold, and rank-1; by |yaw|.
--measure only measures what is there.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb import metrics
from viewdiff_nb.drop_in import DropIn, own_threshold
from viewdiff_nb.faces import YAW_BINS, FaceViews
from viewdiff_nb.faces.geometry import mean_keypoints
from viewdiff_nb.files import FIGURES, HEADS
from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.pretrained import PRETRAINED, load_pretrained, save_drop_in
from viewdiff_nb.studies.adaptation import FULL_PROFILE, SMALL_OPTIONS, load_split
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.operating_points import predicted
from viewdiff_nb.studies.real_benchmark import load_benchmark, seen_by
from viewdiff_nb.studies.significance import Estimate, estimate, resampled_people
from viewdiff_nb.training import train

NAME = "mobilefacenet"
WAYS = ((0.0, "none"), (0.0, "none"), (0.25, "none"), (0.25, "none"), (0.25, "none"))  # of `YAW_BINS`
COLUMNS = ("TAR %", "FAR %", "rank-1 %", "cosine with the own front")


def without_keypoints(faces: FaceViews, share: float = 0.5, seed: int = 0) -> FaceViews:
    """The set with a share of its views telling no keypoints."""
    unknown = torch.rand(len(faces), generator=torch.Generator().manual_seed(seed)) < share
    points = torch.where(unknown[:, None, None], mean_keypoints(faces.angles), faces.keypoints_3d[:])
    return replace(faces, keypoints_3d=points)


def rows_of(model: nn.Module, faces: FaceViews, threshold: float) -> dict[str, dict[str, str]]:
    """`COLUMNS` by |yaw| of views searched among raw fronts, ± 95 % over people drawn again."""
    found = predicted(model, faces)
    cosines = found @ F.normalize(faces.front, dim=1).T
    own = cosines.gather(1, faces.person[:, None])
    accepted = cosines >= threshold
    right = accepted.gather(1, faces.person[:, None])[:, 0]
    of_view = torch.stack(
        (
            100 * right.double(),
            100 * (accepted.sum(1) - right.long()).double() / (len(faces.front) - 1),
            100 * ((cosines >= own).sum(1) == 1).double(),
            own[:, 0].double(),
        ),
        1,
    )
    rows = {}
    for name, _, inside in metrics.yaw_groups(metrics.yaw_bin(faces.abs_yaw)):
        means = [by_people(of_view[inside, i], faces.person[inside], len(faces.front)) for i in range(len(COLUMNS))]
        digits = (1, 3, 1, 3)
        rows[name] = {column: f"{mean:.{n}f}" for column, mean, n in zip(COLUMNS, means, digits, strict=True)}
    return rows


def by_people(values: Tensor, person: Tensor, people: int) -> Estimate:
    """The mean of views' values, with its interval over people."""
    total, count = (
        torch.zeros(people, dtype=torch.double).index_add_(0, person, x) for x in (values, torch.ones_like(values))
    )
    drawn = resampled_people(people).double()
    return estimate([(total.sum() / count.sum()).item()], [((drawn @ total) / (drawn @ count)).tolist()], people)


def train_it() -> None:
    split = load_split(FULL_PROFILE)
    config = replace(FULL_PROFILE.common, epochs=FULL_PROFILE.small_epochs, **SMALL_OPTIONS)
    run = train(config, without_keypoints(split.train), split.val)
    model = DropIn(run.model.cpu().eval(), WAYS)
    save_drop_in(PRETRAINED[NAME], model, config, seen_by(HEADS))
    print(f"{run.steps} steps, {run.train_seconds:.0f} s on {machine()}: {PRETRAINED[NAME]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfp", type=Path, help="a benchmark of real faces to measure on, too")
    parser.add_argument("--measure", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    if not arguments.measure:
        train_it()
    shipped = load_pretrained(NAME)
    split = load_split(FULL_PROFILE)
    sets = {"synthetic, 300 people": (split.test, split.val)}
    if arguments.cfp:
        benchmark = load_benchmark(arguments.cfp)
        if benchmark.seen_by != seen_by(HEADS):
            parser.error(f"{arguments.cfp} was seen by {benchmark.seen_by}, the model knows {seen_by(HEADS)}")
        sets[f"{benchmark.name}, {len(benchmark.faces.names)} people"] = benchmark.faces, benchmark.faces
    rows = {}
    for where, (faces, near) in sets.items():
        threshold = own_threshold(F.normalize(near.src[:], dim=1), near.front, near.person, near.angles)
        unknown = replace(faces, keypoints_3d=mean_keypoints(faces.angles))
        for name, model, seen in (
            ("raw", RawEmbedding(), faces),
            ("shipped", shipped, faces),
            ("shipped, keypoints unknown", shipped, unknown),
            ("its network's whole answer", shipped.model, faces),
        ):
            for yaw, row in rows_of(model, seen, threshold).items():
                rows[where, name, yaw] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    note = (
        f"thresholds: the recogniser's own, at FAR 1e-3 of raw views below {YAW_BINS[0][1]}° (synthetic: of validation "
        f"people); ± 95 % over people; one model; {machine()}"
    )
    table.index = pd.MultiIndex.from_tuples(table.index, names=[f"people ({note})", "model", "|yaw|"])
    table.to_csv(arguments.out / "pretrained.csv")
    print(f"{note}\n{table.to_string()}")


if __name__ == "__main__":
    main()
