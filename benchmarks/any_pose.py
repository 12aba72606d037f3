"""Does the projection's target pose earn anything?   python benchmarks/any_pose.py [OUT] [--effort full] [--seeds 4]

LoRA and the projection adapt a near-frontal base to all views. "frontal only" is trained as everywhere; "any pose" is
also asked for other views of the same person, at their poses, told by the layer's target turn; "any pose, not told" is
asked the same and never told the pose, which is the control. Learning rates are chosen on validation people, seed 0.
OUT, by default data/results/controls, gets any_pose.csv: recognition of fronts, and of other views: whose view at that
pose is this, searched among everybody's view nearest to it, by the raw view, by its frontal prediction, by the turned.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.files import CONTROL_RESULTS
from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.studies import controls
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.significance import over_seeds
from viewdiff_nb.studies.store import run_jobs
from viewdiff_nb.training import choose_device, predict
from viewdiff_nb.training.batches import FaceBatch, take
from viewdiff_nb.training.checkpoint import prepare_model
from viewdiff_nb.training.losses import TEMPERATURE, build_optimizer, mean_loss, set_rates, two_way, warmup_cosine

HOW = ("frontal only", "any pose", "any pose, not told")
RATES = (1e-3, 3e-3, 1e-2)
WEIGHT = 0.5  # of the other poses' loss


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
    model, _ = prepare_model(config, split.train.feature_dim)
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
        if how != "frontal only":
            wanted = take(faces, other_views(faces, rows, random))
            loss = loss + WEIGHT * turned_loss(turned(model, batch, wanted.angles, how), wanted.src, batch.person)
        set_rates(optimizer, [rate * schedule(step)] * len(optimizer.param_groups))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
    return model.eval()


def turned(model: nn.Module, batch: FaceBatch, target: Tensor, how: str) -> Tensor:
    told = target if how == "any pose" else None
    return model(batch.src, **batch.conditions(), return_residual=False, target_pose=told)


@torch.no_grad()
def turning(model: nn.Module, faces: FaceViews, how: str, batch_size: int = 600) -> dict[str, float]:
    """Rank-1 and cosine of raw view, frontal and turned prediction with another view of the person."""
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
    return {name: torch.cat(values).mean().item() for name, values in found.items()}


def work(effort: str, how: str, rate: float, seed: int) -> tuple[str, float, int, dict, dict]:
    """Rates of validation and of test people."""
    torch.set_num_threads(1)
    model = train(effort, how, rate, seed)
    split, measured = controls.setting(effort)[1], []
    for faces in (split.val, split.test):
        rates = recognition_by_yaw(predict(model, faces), faces.front, faces.person, faces.abs_yaw)["all"]
        of_fronts = {"front rank-1": rates["rank1"], "front TAR": rates["tar"]}
        measured.append(of_fronts | turning(model, faces, how))
    return how, rate, seed, measured[0], measured[1]


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
    rates: Sequence[float] = arguments.rates
    seeds: Sequence[int] = controls.EFFORTS[effort].seeds[: arguments.seeds]
    run = partial(run_jobs, partial(work, effort), workers=arguments.workers)
    tried = run([(how, rate, 0) for how in HOW for rate in rates]) if len(rates) > 1 else []
    best = {how: max((t for t in tried if t[0] == how), key=lambda t: t[3]["front TAR"])[1] for how in HOW if tried}
    best = best or dict.fromkeys(HOW, rates[0])
    found = run([(how, best[how], seed) for how in HOW for seed in seeds])
    rows = []
    for how in HOW:
        of_how = {seed: test for h, _, seed, _, test in found if h == how}
        plain = {seed: test for h, _, seed, _, test in found if h == HOW[0]}
        for measure in of_how[seeds[0]]:
            e = over_seeds(of_how[s][measure] for s in seeds)
            apart = over_seeds(of_how[s][measure] - plain[s][measure] for s in seeds)
            about = {"trained for": how, "rate": best[how], "measure": measure, "mean": e.mean, "half": e.half}
            rows.append(about | {"above frontal only": apart.mean, "its half": apart.half, "seeds": len(seeds)})
    arguments.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(arguments.out / "any_pose.csv", index=False, float_format="%.5f")
    print(pd.DataFrame(rows).to_string(), machine(), sep="\n")


if __name__ == "__main__":
    main()
