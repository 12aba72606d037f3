"""A model in front of a recogniser whose gallery and threshold stay as they are."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb import metrics
from viewdiff_nb.faces.geometry import YAW_BINS
from viewdiff_nb.modules.adjusted import TERMS, Adjusted, even_terms, unit_prediction
from viewdiff_nb.modules.baselines import Frontaliser

NEAR_FRONTAL = YAW_BINS[0][1]  # degrees: below it a recogniser's own threshold is set
Way = tuple[float | str, ...]  # a step and a centring, see `Adjusted`


class DropIn(Frontaliser):
    """Each bin of |yaw| goes its own way: a step toward a model's prediction, minus what a side view has of its pose.

        predict(x) = u - m(yaw) + mean frontal embedding,   u = x + step (f(x) - x) of length 1,   enrol(y) = y

    so that predictions stay among the recogniser's embeddings; step 0 without centring is the raw embedding.

    Args:
        model: f, whose predictions are scaled to length 1; None where every step is 0.
        ways: of each bin of `YAW_BINS`, as `Adjusted` has them.
        shift: (5, 3, D) of each bin what is subtracted, times 1, cos(yaw) and cos(2 yaw): m less the mean frontal
            embedding; None where no bin is centred.
    """

    shift: Tensor
    step: Tensor

    def __init__(self, model: nn.Module | None, ways: Sequence[Way], shift: Tensor | None = None) -> None:
        super().__init__()
        if len(ways) != len(YAW_BINS):
            raise ValueError(f"a drop-in has a way for each of {len(YAW_BINS)} bins of |yaw|, got {list(ways)}")
        steps, centrings = zip(*ways, strict=True)
        if shift is None and set(centrings) != {"none"}:
            raise ValueError(f"centring subtracts something, and no shift is given: {list(ways)}")
        if model is None and any(steps):
            raise ValueError(f"a step leads toward a model's prediction, and there is no model: {list(ways)}")
        self.model, self.ways = model, tuple(ways)
        self.register_buffer("step", torch.tensor(steps)[:, None])
        self.register_buffer("shift", torch.zeros(len(ways), len(TERMS), 1) if shift is None else shift)

    @classmethod
    def of(cls, adjusted: Mapping[Way, Adjusted], ways: Sequence[Way]) -> "DropIn":
        """Ways that were fitted, {(step, centring): what `Adjusted` makes of f}."""
        if len(ways) != len(YAW_BINS) or not set(ways) <= adjusted.keys():
            raise ValueError(
                f"ways must name one of {list(adjusted)} for each of {len(YAW_BINS)} bins, got {list(ways)}"
            )
        models = {id(adjusted[way].model): adjusted[way].model for way in ways if way[0]}
        if len(models) > 1:
            raise ValueError(f"the steps of a drop-in lead toward one model's predictions, got {len(models)} models")
        shift = []
        for way in ways:
            part = adjusted[way].weight.new_zeros(len(TERMS), adjusted[way].weight.shape[1])
            part += adjusted[way].weight  # of one row of zeros where nothing is centred
            part[0] -= adjusted[way].front_mean
            shift.append(part)
        return cls(next(iter(models.values()), None), ways, torch.stack(shift))

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        bins = metrics.yaw_bin(angles[:, 1].abs().rad2deg())
        moved = unit
        if self.model is not None:
            predicted = unit_prediction(self.model, unit, angles, keypoints_3d, pose_error)
            moved = F.normalize(torch.lerp(unit, predicted, self.step[bins]), dim=-1)
        of_bin = F.one_hot(bins, len(YAW_BINS)).to(unit.dtype)
        terms = (of_bin[:, :, None] * even_terms(angles)[:, None]).flatten(1)  # (B, 15), those of other bins 0
        return F.normalize(moved - terms @ self.shift.flatten(0, 1), dim=-1)


@torch.no_grad()
def choose_ways(
    adjusted: Mapping[Way, Adjusted],
    src: Tensor,
    angles: Tensor,
    keypoints_3d: Tensor,
    front: Tensor,
    person: Tensor,
    pose_error: Tensor | None = None,
    far: float = metrics.FAR,
) -> DropIn:
    """The `DropIn` that, on validation people, accepts most of the right people and never does worse than raw.

    The threshold is the recogniser's own: the lowest at which raw views below `NEAR_FRONTAL` degrees, compared with
    the fronts, have a false accept rate of far. In each bin a way is allowed if its false accept rate is no higher than
    far, or than the raw one if that is higher, and if neither its rate of right people nor its rank-1 rate is lower
    than raw.

    Args:
        adjusted: with the way (0.0, "none"), which is the raw embedding.
        src, angles, keypoints_3d, front, person, pose_error: of people that the model was not trained on.

    Raises:
        ValueError: without that way, or if these people are too few for far.
    """
    if (0.0, "none") not in adjusted:
        raise ValueError(f'adjusted must have the way (0.0, "none"), the raw embedding; it has {list(adjusted)}')
    unit = F.normalize(src, dim=-1)
    bins = metrics.yaw_bin(angles[:, 1].abs().rad2deg())
    threshold = own_threshold(unit, front, person, angles, far)
    rates = {}
    for way in adjusted:
        model = DropIn.of(adjusted, [way] * len(YAW_BINS)).to(src.device)
        rates[way] = rates_at(threshold, model.predict(unit, angles, keypoints_3d, pose_error), front, person, bins)
    ways, raw = [], rates[0.0, "none"]
    for i in range(len(YAW_BINS)):
        most = max(far, raw[i][1])
        # raw stays for a bin without views, whose rates are NaN
        fits: dict[Way, tuple[float, ...]] = {(0.0, "none"): (0.0, 0.0, 0.0)}
        for way, found in rates.items():
            if found[i][1] <= most and found[i][0] >= raw[i][0] and found[i][2] >= raw[i][2]:
                fits[way] = (found[i][0], found[i][2], -adjusted[way].step)
        ways.append(max(fits, key=fits.__getitem__))
    return DropIn.of(adjusted, ways)


def own_threshold(unit: Tensor, front: Tensor, person: Tensor, angles: Tensor, far: float = metrics.FAR) -> float:
    """The lowest cosine at which raw views below `NEAR_FRONTAL` degrees have a false accept rate of far with fronts.

    Raises:
        ValueError: if there are too few such views to state far.
    """
    near = angles[:, 1].abs().rad2deg() < NEAR_FRONTAL
    impostors = int(near.sum()) * (len(front) - 1)
    if not metrics.can_tell(impostors, far):
        few = f"{int(near.sum())} views below {NEAR_FRONTAL}° of {len(front)} people make {impostors} impostor pairs"
        raise ValueError(f"{few}; a false accept rate of {far:g} needs {round(1 / far):,} or more")
    scores = metrics.similarity_scores(unit[near], front, person[near])
    lowest = int(metrics.lowest_threshold(scores.impostor_counts[0], far))
    return float("inf") if lowest == len(scores.thresholds) else scores.thresholds[lowest].item()


def rates_at(
    threshold: float, predicted: Tensor, front: Tensor, person: Tensor, bins: Tensor
) -> list[tuple[float, float, float]]:
    """Of each bin: the shares of right people and of impostors that a threshold accepts, and the rank-1 rate.

    A bin without views has NaN.
    """
    own = torch.empty(len(person), 2, dtype=torch.double, device=person.device)  # accepted, of rank 1
    wrong = torch.empty(len(person), dtype=torch.double, device=person.device)
    for rows, cosines in metrics.Similarities(predicted, front):
        genuine = cosines.gather(1, person[rows, None])
        accepted = cosines >= threshold
        own[rows] = torch.cat((genuine >= threshold, (cosines >= genuine).sum(1, keepdim=True) == 1), 1).double()
        wrong[rows] = (accepted.sum(1) - accepted.gather(1, person[rows, None])[:, 0].long()).double() / (
            len(front) - 1
        )
    return [
        (own[bins == i, 0].mean().item(), wrong[bins == i].mean().item(), own[bins == i, 1].mean().item())
        for i in range(len(YAW_BINS))
    ]
