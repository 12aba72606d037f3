"""What a model does to a recogniser that is in use: its gallery stays raw, its threshold may stay or be calibrated.

Rates are counted by person, so that intervals come from people drawn again, of several folds together.
"""

from collections.abc import Iterable, Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb import calibration, metrics
from viewdiff_nb.drop_in import DropIn, choose_ways, own_threshold
from viewdiff_nb.faces import YAW_BINS, FaceViews
from viewdiff_nb.faces.crops import PROFILE
from viewdiff_nb.studies.candidates import CENTRINGS, adjusted, adjustments
from viewdiff_nb.studies.significance import Estimate, estimate, resampled_people

RULES = ("the recogniser's threshold", "threshold by pose", "normalised by pose")
GROUPS = {f"{low}-{high}": [i] for i, (low, high) in enumerate(YAW_BINS)} | {"all": list(range(len(YAW_BINS)))}
SIDES = {"below 45": [0, 1], "from 45": [2, 3, 4]}
COUNTS = ("accepted", "own", "false accepts", "impostors", "abstained", "cosine")
Counts = dict[tuple[str, str], Tensor]
"""(model, rule): (G, P, 6), `COUNTS` of each bin of `YAW_BINS` and person tested."""


def drop_in(model: nn.Module, train: FaceViews, val: FaceViews, far: float = metrics.FAR) -> DropIn:
    """A model with its step and centring chosen by yaw on validation people; centring is fitted to train."""
    ways = {(0.0, centring): adjusted(None, train, step=0.0, centring=centring) for centring in CENTRINGS}
    given = val.src[:], val.angles, val.keypoints_3d[:], val.front, val.person, val.pose_error
    return choose_ways(ways | adjustments(model, train), *given, far=far)


@torch.no_grad()
def predicted(model: nn.Module, faces: FaceViews) -> Tensor:
    return F.normalize(model.eval()(faces.src[:], **faces.conditions(), return_residual=False), dim=1)


def count(models: Mapping[str, nn.Module], val: FaceViews, test: FaceViews, far: float = metrics.FAR) -> Counts:
    """What each model and rule accepts of test's views; thresholds are set on val, whom no model was trained on."""
    own = own_threshold(F.normalize(val.src[:], dim=1), val.front, val.person, val.angles, far)
    bins = metrics.yaw_bin(test.abs_yaw)
    is_own = F.one_hot(test.person, len(test.front)).bool()
    fronts = F.normalize(test.front, dim=1)
    found: Counts = {}
    for name, model in models.items():
        seen = predicted(model, val)
        by_pose = calibration.calibrate(seen, val.front, val.person, val.abs_yaw, far)
        cosines = predicted(model, test) @ fronts.T  # (M, P)
        comparable = by_pose.normalised(seen @ F.normalize(val.front, dim=1).T, val.abs_yaw)
        impostors = comparable[~F.one_hot(val.person, len(val.front)).bool()].sort().values
        one = impostors[len(impostors) - 1 - int(far * len(impostors))].item()  # above it lies a share far, or less
        abstained = ~by_pose.states_far[bins]
        accepted = {
            RULES[0]: cosines >= own,
            RULES[1]: (cosines >= by_pose.thresholds[bins, None]) & ~abstained[:, None],
            RULES[2]: (by_pose.normalised(cosines, test.abs_yaw) > one) & ~abstained[:, None],
        }
        for rule, yes in accepted.items():
            silent = abstained.double() * (rule != RULES[0])
            of_view = torch.stack(
                (
                    (yes & is_own).sum(1).double(),
                    torch.ones(len(bins)).double(),
                    (yes & ~is_own).sum(1).double(),
                    torch.full((len(bins),), len(fronts) - 1.0).double(),
                    silent,
                    cosines[is_own].double(),
                ),
                1,
            )
            cell = bins * len(fronts) + test.person
            total = torch.zeros(len(YAW_BINS) * len(fronts), len(COUNTS)).double().index_add_(0, cell, of_view)
            found[name, rule] = total.view(len(YAW_BINS), len(fronts), -1)
    return found


def joined(parts: Iterable[Counts]) -> Counts:
    """The counts of different people, as of several folds, together."""
    parts = list(parts)
    return {key: torch.cat([part[key] for part in parts], 1) for key in parts[0]}


def share(counts: Tensor, bins: list[int], of: str, among: str) -> Estimate:
    """100 times a ratio of two `COUNTS` in some bins, with its interval over people drawn again."""
    top, bottom = (counts[bins, :, COUNTS.index(name)].sum(0) for name in (of, among))  # (P,)
    drawn = resampled_people(len(top)).double()  # (B, P)
    value = 100 * (top.sum() / bottom.sum()).item()
    return estimate([value], [(100 * (drawn @ top) / (drawn @ bottom)).tolist()], len(top))


def points_table(counts: Counts, groups: Mapping[str, list[int]] = GROUPS) -> pd.DataFrame:
    """A row per model, rule and |yaw| with views: TAR and FAR in percent, share abstained, cosine with the front."""
    rows = {}
    for (model, rule), found in counts.items():
        for yaw, bins in groups.items():
            if not found[bins, :, 1].sum():
                continue
            rows[model, rule, yaw] = {
                "TAR %": f"{share(found, bins, 'accepted', 'own'):.1f}",
                "FAR %": f"{share(found, bins, 'false accepts', 'impostors'):.2f}",
                "abstained %": f"{share(found, bins, 'abstained', 'own').mean:.0f}",
                "cosine with the own front": f"{share(found, bins, 'cosine', 'own').mean / 100:.2f}",
            }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(table.index, names=["model", "rule", "|yaw|"])
    return table


def template_table(models: Mapping[str, nn.Module], test: FaceViews, size: int = 4) -> pd.DataFrame:
    """Side views searched among raw fronts, alone and in templates of `size` of one person; percent over templates."""
    sides = test.where(test.abs_yaw >= PROFILE)
    number = torch.zeros_like(sides.person)
    for person in sides.person.unique():
        rows = (sides.person == person).nonzero()[:, 0]
        shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(int(person)))
        number[rows[shuffled]] = torch.arange(len(rows)) // size
    _, template = (sides.person * (int(number.max()) + 1) + number).unique(return_inverse=True)
    owner = torch.zeros(int(template.max()) + 1, dtype=torch.long).scatter_(0, template, sides.person)
    rows = {}
    for name, model in models.items():
        seen = predicted(model, sides)
        one_each = torch.arange(len(seen))
        for words, how, of, people in (
            ("one view", "mean", one_each, sides.person),
            ("mean", "mean", template, owner),
            ("weighted by pose", "weighted", template, owner),
            ("most similar", "max", template, owner),
        ):
            similarity = calibration.template_similarities(seen, of, test.front, sides.abs_yaw, how)
            same = F.one_hot(people, len(test.front)).bool()
            counts = metrics.pair_counts(similarity.flatten(), same.flatten())
            hit = (similarity >= similarity[same][:, None]).sum(1) == 1
            rows[name, words] = {
                "templates": str(len(people)),
                "rank-1 %": f"{100 * hit.double().mean():.1f}",
                "AUC %": f"{100 * metrics.roc_auc(*counts).item():.2f}",
                "TAR@1e-3 %": f"{100 * metrics.tar_at_far(*counts, far=1e-3).item():.1f}",
            }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(table.index, names=["model", f"template of {size}"])
    return table
