"""Thresholds by head pose at a stated false accept rate, scores comparable between poses, templates of several views.

A recogniser's one threshold means another false accept rate at every pose. Here each bin of |yaw| gets its own, counted
on people that the model was not trained on; where they are too few to state the rate, the answer is to abstain.

>>> views, fronts = torch.tensor([[1.0, 0.1], [0.2, 1.0], [0.7, 0.7]]), torch.eye(2)
>>> person, abs_yaw = torch.tensor([0, 1, 1]), torch.tensor([5.0, 10.0, 80.0])
>>> found = calibrate(views, fronts, person, abs_yaw, far=0.5)
>>> found.decide(torch.tensor([0.99, 0.1, 0.9]), torch.tensor([0.0, 0.0, 80.0])).tolist()  # one impostor beyond 75°
[1, 0, -1]
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from viewdiff_nb.faces.geometry import YAW_BINS
from viewdiff_nb.metrics import (
    FAR,
    Similarities,
    can_tell,
    lowest_threshold,
    similarity_scores,
    yaw_bin,
)

ACCEPT, REJECT, ABSTAIN = 1, 0, -1


@dataclass(frozen=True)
class Calibration:
    """What to accept, by bin of `YAW_BINS`.

    thresholds: (G,) cosines; infinite where nothing is accepted. states_far: (G,) whether there were enough impostors.
    mean, spread: (G,) of impostor similarities. far: the false accept rate wanted.
    """

    thresholds: Tensor
    states_far: Tensor
    mean: Tensor
    spread: Tensor
    far: float

    def decide(self, similarity: Tensor, abs_yaw: Tensor) -> Tensor:
        """(M,) `ACCEPT`, `REJECT` or `ABSTAIN` for a similarity and a |yaw| in degrees each."""
        bins = yaw_bin(abs_yaw)
        accepted = torch.where(similarity >= self.thresholds[bins], ACCEPT, REJECT)
        return torch.where(self.states_far[bins], accepted, ABSTAIN)

    def normalised(self, similarity: Tensor, abs_yaw: Tensor) -> Tensor:
        """Similarities (M,) or (M, P) in standard deviations above the impostors of their bin: one threshold for all.

        Normalisation by a group's impostors as in Z-norm (Auckenthaler et al. 2000), the group being the pose.
        """
        bins = yaw_bin(abs_yaw)
        shape = (-1,) + (1,) * (similarity.ndim - 1)
        return (similarity - self.mean[bins].view(shape)) / self.spread[bins].view(shape)


def calibrate(
    predicted: Tensor, gallery: Tensor, person: Tensor, abs_yaw: Tensor, far: float = FAR, least_tar: float = 0.0
) -> Calibration:
    """Thresholds of people that the model was not trained on.

    Args:
        predicted: (M, D) embeddings to be recognised, as the model gives them.
        gallery: (P, D) enrolled ones, person: (M,) rows of it.
        abs_yaw: (M,) degrees.
        far: 0 < far < 1, of each bin.
        least_tar: abstain, too, in bins where the threshold accepts less than this share of the right people.

    Raises:
        ValueError: for what `similarity_scores` refuses, or a far out of range.
    """
    bins, groups = yaw_bin(abs_yaw), len(YAW_BINS)
    scores = similarity_scores(predicted, gallery, person, bins, groups)
    lowest = lowest_threshold(scores.impostor_counts, far)  # (G,); of a bin without impostors NaN > far is False: 0
    above = torch.cat((scores.thresholds, scores.thresholds.new_full((1,), math.inf)))
    counted = scores.impostor_counts.sum(1)
    thresholds = torch.where(counted > 0, above[lowest], math.inf)
    accepted = (scores.genuine >= thresholds[bins]).double()
    views = torch.bincount(bins, minlength=groups)
    tar = torch.zeros(groups, dtype=torch.double, device=bins.device).index_add_(0, bins, accepted) / views
    states_far = torch.as_tensor(can_tell(counted, far)) & ~(tar < least_tar)
    total, squares = torch.zeros(2, groups, dtype=torch.double, device=bins.device)
    for rows, similarity in Similarities(predicted, gallery):
        own = F.one_hot(person[rows], len(gallery)).bool()
        others = similarity.double().masked_fill(own, 0.0)
        total.index_add_(0, bins[rows], others.sum(1))
        squares.index_add_(0, bins[rows], others.square().sum(1))
    mean = total / counted
    spread = (squares / counted - mean.square()).clamp_min(1e-12).sqrt()
    return Calibration(thresholds, states_far, mean.float(), spread.float(), far)


def template_similarities(
    views: Tensor, template: Tensor, gallery: Tensor, abs_yaw: Tensor | None = None, how: str = "mean"
) -> Tensor:
    """(T, P) cosines of templates, which hold several views of a person each, with a gallery.

    Args:
        views: (M, D), template: (M,) which of the T templates each belongs to.
        gallery: (P, D).
        abs_yaw: (M,) degrees, for "weighted": views count by cos(yaw), at least .1.
        how: the mean of embeddings of length 1, weighted or not, or the most similar view.

    >>> views, gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    >>> template = torch.zeros(2, dtype=torch.long)
    >>> [round(template_similarities(views, template, gallery, how=how).item(), 3) for how in ("mean", "max")]
    [0.707, 1.0]
    """
    unit, fronts = F.normalize(views, dim=1), F.normalize(gallery, dim=1)
    count = int(template.max()) + 1
    if how == "max":
        cosines = unit @ fronts.T
        found = torch.full((count, len(fronts)), -math.inf, dtype=unit.dtype, device=views.device)
        return found.scatter_reduce_(0, template[:, None].expand_as(cosines), cosines, "amax")
    if how == "weighted":
        if abs_yaw is None:
            raise ValueError("views weighted by pose need abs_yaw, their |yaw| in degrees")
        unit = unit * abs_yaw.deg2rad().cos().clamp_min(0.1)[:, None]
    elif how != "mean":
        raise ValueError(f"how must be mean, max or weighted, got {how!r}")
    pooled = torch.zeros(count, views.shape[1], dtype=unit.dtype, device=views.device).index_add_(0, template, unit)
    return F.normalize(pooled, dim=1) @ fronts.T
