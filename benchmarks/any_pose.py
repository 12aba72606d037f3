"""Does the projection's target pose earn anything?   python benchmarks/any_pose.py [OUT] [--effort full] [--seeds 4]

LoRA and the projection adapt a near-frontal base to all views. "frontal only" is trained as everywhere; "any pose" is
also asked for other views of the same person, at their poses, told by the layer's target turn. Two controls are asked
the same: "any pose, not told" is never told the pose, and "any pose, told in numbers" has a plain layer in the
projection's place, as large, with the pose among its inputs. Learning rates are chosen on validation people, seed 0.
OUT, by default data/results/controls, gets any_pose.csv: recognition of fronts, and of other views: whose view at that
pose is this, searched among everybody's view nearest to it, by the raw view, by its frontal prediction, by the turned;
and any_pose_differences.csv, paired by seed and person. Two minutes on four GPUs, days on two CPU cores.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.files import CONTROL_RESULTS
from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.modules.attention import encode_pose
from viewdiff_nb.modules.controls import PlainProjection
from viewdiff_nb.modules.projection import LightweightFaceProjectionLayer
from viewdiff_nb.studies import controls
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.significance import Estimate, holm, over_seeds
from viewdiff_nb.studies.store import run_jobs
from viewdiff_nb.training import choose_device, predict
from viewdiff_nb.training.batches import FaceBatch, take
from viewdiff_nb.training.checkpoint import prepare_model
from viewdiff_nb.training.losses import TEMPERATURE, build_optimizer, mean_loss, set_rates, two_way, warmup_cosine

FRONTAL, TURNED, UNTOLD, NUMBERS = HOW = ("frontal only", "any pose", "any pose, not told", "any pose, told in numbers")
COMPARISONS = (
    *((how, FRONTAL) for how in HOW[1:]),
    (TURNED, UNTOLD),
    (NUMBERS, UNTOLD),
    (TURNED, NUMBERS),
)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WEIGHT = 0.5  # of the other poses' loss


class PlainProjectionToAnyPose(PlainProjection):
    """A plain layer, as large as a projection, that reads the target pose as six more numbers."""

    def __init__(self, layer: LightweightFaceProjectionLayer) -> None:
        count, width = sum(p.numel() for p in layer.parameters()), layer.feature_dim
        hidden = (count - width) // (2 * width + 43)
        super().__init__(width + 6, hidden)
        self.expand = nn.Linear(hidden, width)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, features, keypoints_3d, target_pose=None, source_pose=None) -> Tensor:
        target = torch.zeros_like(features[:, :3]) if target_pose is None else target_pose
        return super().forward(torch.cat((features, encode_pose(target)), 1), keypoints_3d, source_pose=source_pose)


def other_views(faces: FaceViews, rows: Tensor, generator: torch.Generator) -> Tensor:
    """For each view another one of the same person, at random."""
    order = faces.person.argsort(stable=True)
    counts = torch.bincount(faces.person)
    first = counts.cumsum(0) - counts
    place = order.argsort() - first[faces.person]  # of each view among its person's
    owner, count = faces.person[rows], counts[faces.person[rows]]
    step = 1 + (torch.rand(len(rows), generator=generator).to(rows.device) * (count - 1)).long()
    return order[first[owner] + (place[rows] + step) % count]


def turned_loss(predicted: Tensor, wanted: Tensor, person: Tensor) -> Tensor:
    """Which of the batch's wanted embeddings is this prediction's, and back; the same person's others do not count."""
    cosines = F.normalize(predicted, dim=1) @ F.normalize(wanted, dim=1).T / TEMPERATURE
    partners = (person[:, None] == person) & ~torch.eye(len(person), dtype=torch.bool, device=person.device)
    cosines = cosines.masked_fill(partners, -float("inf"))
    right = torch.arange(len(person), device=person.device)
    return F.cross_entropy(cosines, right) + F.cross_entropy(cosines.T, right)


def train(effort: str, how: str, rate: float, seed: int) -> nn.Module:
    _, split, _ = controls.setting(effort)
    options = {"lr": rate, "lora_lr": rate, "min_yaw": 0.0, "mixup": False}
    config = controls.config_of(effort, "LoRA r=8 + projection", seed, options)
    device = choose_device("auto")
    torch.manual_seed(seed)
    model, _ = prepare_model(config, split.train.feature_dim)
    if how == NUMBERS:
        model.projection = PlainProjectionToAnyPose(model.projection)  # type: ignore[assignment, arg-type]
    model.to(device).train()
    faces, optimizer = split.train.to(device), build_optimizer(model, config)
    generator, random = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    batches = len(faces) // config.batch_size
    schedule = warmup_cosine(config.warmup, config.epochs * batches)
    torch.manual_seed(seed)  # dropout
    for step in range(config.epochs * batches):
        if step % batches == 0:
            order = torch.randperm(len(faces), generator=generator).to(device)
        rows = order[step % batches * config.batch_size :][: config.batch_size]
        batch = take(faces, rows)
        predicted = model(batch.src, **batch.conditions(), return_residual=False)
        loss = mean_loss(two_way, faces.front, predicted, batch.person)
        if how != FRONTAL:
            wanted = take(faces, other_views(faces, rows, random))
            loss = loss + WEIGHT * turned_loss(turned(model, batch, wanted.angles, how), wanted.src, batch.person)
        set_rates(optimizer, [rate * schedule(step)] * len(optimizer.param_groups))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
    return model.eval()


def turned(model: nn.Module, batch: FaceBatch, target: Tensor, how: str) -> Tensor:
    told = target if how in (TURNED, NUMBERS) else None
    return model(batch.src, **batch.conditions(), return_residual=False, target_pose=told)


@torch.no_grad()
def turning(model: nn.Module, faces: FaceViews, how: str, batch_size: int = 600) -> dict[str, list[float]]:
    """Rank-1 and cosine of raw view, frontal and turned prediction with another view of the person: its mean of each
    person."""
    device = next(model.parameters()).device
    faces = faces.where(faces.person.argsort(stable=True)).to(device)
    rows = torch.arange(len(faces), device=device)
    others = other_views(faces, rows, torch.Generator().manual_seed(0))
    people = len(faces.names)
    found: dict[str, list[Tensor]] = {}
    for part in rows.split(batch_size):
        batch, target = take(faces, part), faces.angles[others[part]]
        apart = (target[:, None] - faces.angles).square().sum(2)  # (b, M) of the wanted pose from each view's
        apart[torch.arange(len(part)), others[part]] = -1.0  # the wanted view itself stands for its person
        apart[torch.arange(len(part)), part] = torch.inf  # and the probe for nobody
        nearest = torch.stack(
            [apart[:, faces.person == p].argmin(1) + int((faces.person < p).sum()) for p in range(people)], 1
        )
        gallery = F.normalize(faces.src[nearest], dim=2)  # (b, P, D): views lie sorted by person
        probes = {
            "raw": batch.src,
            "frontal": model(batch.src, **batch.conditions(), return_residual=False),
            "turned": turned(model, batch, target, how),
        }
        for name, probe in probes.items():
            cosine = torch.einsum("bd,bpd->bp", F.normalize(probe, dim=1), gallery)
            own = cosine.gather(1, batch.person[:, None])[:, 0]
            found.setdefault(f"{name} rank-1", []).append((cosine.argmax(1) == batch.person).float())
            found.setdefault(f"{name} cosine", []).append(own)
    return {name: by_person(torch.cat(values), faces.person, people) for name, values in found.items()}


def by_person(values: Tensor, person: Tensor, people: int) -> list[float]:
    sums = values.new_zeros(people).index_add_(0, person, values)
    return (sums / torch.bincount(person, minlength=people)).tolist()


def work(effort: str, how: str, rate: float, seed: int) -> tuple[str, float, int, float, dict[str, list[float]]]:
    """TAR of the fronts of validation people, and of test people each one's mean of all measures."""
    torch.set_num_threads(1)
    model, split = train(effort, how, rate, seed), controls.setting(effort)[1]
    val, faces = split.val, split.test
    tar = recognition_by_yaw(predict(model, val), val.front, val.person, val.abs_yaw)["all"]["tar"]
    cosine = F.normalize(predict(model, faces), dim=1) @ F.normalize(faces.front, dim=1).T
    hits = (cosine.argmax(1) == faces.person).float()
    of_fronts = {"front rank-1": by_person(hits, faces.person, len(faces.names))}
    print(f"{how}, rate {rate}, seed {seed}: TAR of validation people {tar:.4f}", flush=True)
    return how, rate, seed, tar, of_fronts | turning(model, faces, how)


def of_people(found: Sequence[Sequence[float]]) -> Estimate:
    """Of (S, P) values of seeds and people, or differences: its mean, with the errors of both."""
    values = torch.tensor(found, dtype=torch.float64)
    found, people = over_seeds(values.mean(1).tolist()), values.shape[1]
    error = values.mean(0).std().item() / people**0.5
    return replace(found, people_error=error, people=people, seeds_error=found.seeds_error if found.seeds > 1 else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=CONTROL_RESULTS)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--effort", default="full", choices=controls.EFFORTS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to choose among")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    effort: str = arguments.effort
    seeds: Sequence[int] = controls.EFFORTS[effort].seeds[: arguments.seeds]
    run = partial(run_jobs, partial(work, effort), workers=arguments.workers)
    tried = run([(how, rate, 0) for how in HOW for rate in arguments.rates])
    best = {how: max((tar, rate) for name, rate, _, tar, _ in tried if name == how)[1] for how in HOW}
    done = run([(how, best[how], seed) for how in HOW for seed in seeds])
    found = {(how, seed): of_test for how, _, seed, _, of_test in done}
    rows = []
    for how in HOW:
        for measure in found[how, seeds[0]]:
            e = of_people([found[how, seed][measure] for seed in seeds])
            about = {"trained for": how, "rate": best[how], "measure": measure}
            rows.append(about | {"mean": e.mean, "half": e.half, "seeds": e.seeds})
    apart = []
    for how, other in COMPARISONS:
        for measure in ("front rank-1", "turned rank-1", "turned cosine"):
            pairs = [zip(found[how, seed][measure], found[other, seed][measure], strict=True) for seed in seeds]
            e = of_people([[one - two for one, two in pair] for pair in pairs])
            about = {"model": how, "other": other, "measure": measure}
            apart.append(about | {"mean": e.mean, "half": e.half, "seeds": e.seeds, "p": e.p})
    for row, p in zip(apart, holm([row["p"] for row in apart]), strict=True):
        row |= {"p_holm": p, "of": len(apart)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, table in (("any_pose", rows), ("any_pose_differences", apart)):
        frame = pd.DataFrame(table)
        frame.to_csv(arguments.out / f"{name}.csv", index=False, float_format="%.5f")
        print(frame.to_string())
    print(machine())


if __name__ == "__main__":
    main()
