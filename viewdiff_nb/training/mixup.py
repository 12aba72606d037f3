"""Mix-up of different people seen from about the same side: more identities than the training set has.

    x = w x_i + (1 - w) x_j,    loss = w loss(person i) + (1 - w) loss(person j),    w uniform in [0, 1]

Zhang et al. 2018, arXiv:1710.09412, eq. 1. Partners have almost the same yaw, because the mean of a left and a
right view is the view of nobody.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..faces.geometry import normalise_keypoints
from ..faces.views import FaceViews
from .batches import FaceBatch, draw_batches
from .config import TrainConfig

REACH = 0.01  # partners are at most this share of the set away when its views are ordered by yaw


class Mixup:
    """Draws partners for the views of a set and mixes their batches.

    A partner is one of the next views in the order of yaw; where that is a view of the same person, the nearest view
    of somebody else behind it takes its place.

    Args:
        faces: the training set.

    Raises:
        ValueError: if all views are of one person.
    """

    def __init__(self, faces: FaceViews) -> None:
        self.by_yaw = faces.angles[:, 1].argsort()
        self.person = faces.person
        self.somebody_else = _next_other(self.person[self.by_yaw])
        self.place = torch.empty_like(self.by_yaw)
        self.place[self.by_yaw] = torch.arange(len(faces), device=faces.device)
        self.reach = max(1, round(REACH * len(faces)))

    def pair(self, batches: Sequence[Tensor], generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Index tensors (B,) to index tensors (2 B,), the partners behind, and weights (B,) of the first half."""
        index = torch.cat(tuple(batches))
        count, total = len(index), len(self.by_yaw)
        step = torch.randint(1, self.reach + 1, (count,), generator=generator).to(index.device)
        weight = torch.rand(count, generator=generator).to(index.device)
        place = self.place[index] + step
        place = torch.where(place < total, place, place - 2 * step)
        same = self.person[self.by_yaw[place]] == self.person[index]
        partner = self.by_yaw[torch.where(same, self.somebody_else[place], place)]
        sizes = [len(batch) for batch in batches]
        pairs = [torch.cat(pair) for pair in zip(index.split(sizes), partner.split(sizes), strict=True)]
        return pairs, list(weight.split(sizes))


def _next_other(person: Tensor) -> Tensor:
    """(M,) to (M,): for each entry the next one that differs; for the last ones, the nearest one before that does.

    >>> _next_other(torch.tensor([7, 7, 4, 9, 9])).tolist()
    [2, 2, 3, 2, 2]
    """
    run = torch.cat((person.new_zeros(1), (person[1:] != person[:-1]).cumsum(0)))  # of equal neighbours
    starts = torch.cat((person.new_zeros(1), run.diff().nonzero()[:, 0] + 1))
    if len(starts) == 1:
        raise ValueError("mixup needs views of 2 people or more, and these are all of one; give --no-mixup")
    return torch.cat((starts[1:], starts[-1:] - 1))[run]


def draw_epoch(
    faces: FaceViews, config: TrainConfig, mixup: Mixup | None, generator: torch.Generator
) -> tuple[Sequence[Tensor], list[Tensor] | None]:
    """Indices of an epoch's batches, and with mix-up, where partners stand behind, the weights; see `Mixup.pair`."""
    rows = draw_batches(faces, config, generator)
    return mixup.pair(rows, generator) if mixup else (rows, None)


def mix(batch: FaceBatch, weight: Tensor) -> tuple[FaceBatch, Tensor]:
    """Mix the first half of a batch (2 B) with the second: the mixture (B), and the partners' persons (B,)."""
    first, second = (FaceBatch(*parts) for parts in zip(*(values.chunk(2) for values in batch), strict=True))
    src, angles, keypoints = (
        torch.lerp(other, own, weight.view(-1, *(1,) * (own.dim() - 1)))
        for own, other in (
            (first.src, second.src),
            (first.angles, second.angles),
            (normalise_keypoints(first.keypoints_3d), normalise_keypoints(second.keypoints_3d)),
        )
    )
    return FaceBatch(src, angles, keypoints, first.person), second.person
