"""Which samples go together, how they reach the device, and mixtures of them.

A batch is a tensor of indices: of shuffled views, or of groups of views of one person. A set that fits the device lies
there as a whole and is indexed; another one is read by a DataLoader.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from viewdiff_nb.faces.geometry import normalise_keypoints
from viewdiff_nb.faces.views import NORMS, NORMS_WANTED, FaceViews, model_conditions, running_number
from viewdiff_nb.training.config import TrainConfig

MEMORY_SHARE = 0.5  # of a GPU's free memory that a face set may take; the model needs the rest
REACH = 0.01  # partners for mix-up are at most this share of the set away when its views are ordered by yaw


class FaceBatch(NamedTuple):
    """B side views: src (B, D), angles (B, 3), keypoints_3d (B, 5, 3), person (B,), pose_error, as in `FaceViews`."""

    src: Tensor
    angles: Tensor
    keypoints_3d: Tensor
    person: Tensor
    pose_error: Tensor | None = None

    def conditions(self) -> dict[str, Tensor]:
        """The model's inputs beside src."""
        return model_conditions(self.angles, self.keypoints_3d, self.pose_error)


def move_if_it_fits(faces: FaceViews, device: torch.device, share: float = MEMORY_SHARE) -> FaceViews:
    """The set on the device if it takes at most that share of its free memory, else as it is.

    On the CPU nothing moves: what is memory-mapped stays on disk.
    """
    if device.type == "cuda" and faces.nbytes > share * torch.cuda.mem_get_info(device)[0]:
        return faces
    return faces.to(device)


def views_to_train(faces: FaceViews, config: TrainConfig) -> FaceViews:
    """The side views within the config's yaw range; max_yaw=180 leaves none out, not even those at 180 degrees.

    Raises:
        ValueError: if there is none, if all are of one person, who can be told from nobody, or if embeddings are too
            short or too long to calculate with.
    """
    below = math.inf if config.max_yaw >= 180 else config.max_yaw
    kept = faces.where((faces.abs_yaw >= config.min_yaw) & (faces.abs_yaw < below))
    if not len(kept):
        raise ValueError(f"no training view has {config.min_yaw} <= |yaw| < {config.max_yaw} degrees")
    if (people := len(kept.person.unique())) < 2:
        raise ValueError(
            f"training needs views of at least 2 people, got {people}; add some, or widen min_yaw, max_yaw"
        )
    checked = {"front": kept.front} | ({"src": kept.src} if isinstance(kept.src, Tensor) else {})
    for name, embeddings in checked.items():  # those on disk were checked when they were loaded
        norms = embeddings.norm(dim=1)
        if (odd := (norms < NORMS[0]) | (norms > NORMS[1])).any():
            raise ValueError(f"{name}: an embedding has length {norms[odd][0].item():.3g}; {NORMS_WANTED}")
    return kept


def take(faces: FaceViews, index: Tensor | np.ndarray) -> FaceBatch:
    """The side views in index, (B,)."""
    index = torch.as_tensor(index)
    error = None if faces.pose_error is None else faces.pose_error[index]
    return FaceBatch(faces.src[index], faces.angles[index], faces.keypoints_3d[index], faces.person[index], error)


def feed(
    faces: FaceViews, index_batches: Iterable[Tensor], device: torch.device, num_workers: int = 0
) -> Iterator[FaceBatch]:
    """The batches with these indices, on the device; the same values wherever faces lies.

    Args:
        index_batches: (B,) rows of faces each.
        num_workers: processes that read ahead; only for a set that is not on the device.
    """
    if not faces.on_disk and faces.device.type == device.type:
        for index in index_batches:
            yield take(faces, index)
        return
    loader: DataLoader[FaceBatch] = DataLoader(
        [index.cpu().numpy() for index in index_batches],  # type: ignore[arg-type] # arrays: tensors cost file handles
        batch_size=None,
        collate_fn=partial(take, faces),  # in the worker
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of its own: dropout's stays where it is
    )
    for batch in loader:
        moved = [None if values is None else values.to(device, non_blocking=True) for values in batch]
        yield FaceBatch(*moved)  # type: ignore[arg-type] # only pose_error may be None


def count_batches(faces: FaceViews, config: TrainConfig) -> int:
    """Batches of an epoch.

    Raises:
        ValueError: if there are too few groups of views for one batch.
    """
    if (together := config.views_together) == 1:
        return math.ceil(len(faces) / config.batch_size)
    groups = int((torch.bincount(faces.person) // together).sum())
    if groups * together < config.batch_size:
        lower, group = ("batch_size or n_views", "n_views=") if config.use_cross_view else ("batch_size", "")
        raise ValueError(
            f"{groups} groups of {group}{together} views of a person do not fill a batch of {config.batch_size}; "
            f"lower {lower}"
        )
    return groups * together // config.batch_size


def draw_batches(faces: FaceViews, config: TrainConfig, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Index tensors of one epoch's batches; with cross-view attention or pairs the views of a person lie together."""
    if config.views_together == 1:
        return torch.randperm(len(faces), generator=generator).to(faces.device).split(config.batch_size)
    batches = view_groups(faces.person, config.views_together, generator).flatten().split(config.batch_size)
    return batches[: count_batches(faces, config)]


def view_groups(person: Tensor, n_views: int, generator: torch.Generator) -> Tensor:
    """(G, n_views) rows of person (M,): random groups of different views of one person, no view twice, shuffled.

    Views that fill no group are left out. The generator is one of the CPU.
    """
    groups, mask = padded_groups(person, n_views, generator)
    groups = groups[mask.all(1)]
    return groups[torch.randperm(len(groups), generator=generator).to(person.device)]


def padded_groups(person: Tensor, n_views: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every view once, in random groups of up to n_views views of one person.

    Returns:
        (G, n_views) rows of person and a mask of the same shape: False where a row only fills up.
    """
    order = torch.randperm(len(person), generator=generator).to(person.device)
    order = order[person[order].argsort(stable=True)]  # by person, each one's views in random order
    owner = person[order]
    number = running_number(owner)  # of each view among its person's
    sizes = (torch.bincount(person) + n_views - 1) // n_views  # groups of each person
    group, column = (sizes.cumsum(0) - sizes)[owner] + number // n_views, number % n_views
    groups = torch.zeros(int(sizes.sum()), n_views, dtype=torch.long, device=person.device)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    groups[group, column], mask[group, column] = order, True
    return torch.where(mask, groups, groups[:, :1]), mask


class Mixup:
    """Mix-up of different people seen from about the same side: more identities than the training set has.

        x = w x_i + (1 - w) x_j,    loss = w loss(person i) + (1 - w) loss(person j),    w uniform in [0, 1]

    Zhang et al. 2018, arXiv:1710.09412, eq. 1. The mean of a left and a right view is nobody's view, so a partner is
    one of the next views in the order of yaw; where that is of the same person, the next view of somebody else.

    Raises:
        ValueError: if all views are of one person.
    """

    def __init__(self, faces: FaceViews) -> None:
        self.by_yaw = faces.angles[:, 1].argsort()
        self.person = faces.person
        self.somebody_else = _next_other(self.person[self.by_yaw])
        self.rank = self.by_yaw.argsort()  # of each view in the order of yaw
        self.reach = max(1, round(REACH * len(faces)))

    def pair(self, batches: Sequence[Tensor], generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Index tensors (B,) to index tensors (2 B,), the partners behind, and weights (B,) of the first half."""
        index = torch.cat(tuple(batches))
        step = torch.randint(1, self.reach + 1, (len(index),), generator=generator).to(index.device)
        weight = torch.rand(len(index), generator=generator).to(index.device)
        rank = self.rank[index] + step
        rank = torch.where(rank < len(self.by_yaw), rank, rank - 2 * step)
        same = self.person[self.by_yaw[rank]] == self.person[index]
        partner = self.by_yaw[torch.where(same, self.somebody_else[rank], rank)]
        sizes = [len(batch) for batch in batches]
        pairs = [torch.cat(pair) for pair in zip(index.split(sizes), partner.split(sizes), strict=True)]
        return pairs, list(weight.split(sizes))


def _next_other(person: Tensor) -> Tensor:
    """(M,) to (M,): for each entry the next one that differs; for the last ones, the nearest one before that does.

    >>> _next_other(torch.tensor([7, 7, 4, 9, 9])).tolist()
    [2, 2, 3, 2, 2]
    """
    _, run, lengths = person.unique_consecutive(return_inverse=True, return_counts=True)  # of equal neighbours
    starts = lengths.cumsum(0) - lengths
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
    halves = ((None, None) if values is None else values.chunk(2) for values in batch)
    first, second = (FaceBatch(*half) for half in zip(*halves, strict=True))
    points = normalise_keypoints(first.keypoints_3d), normalise_keypoints(second.keypoints_3d)
    src, angles, keypoints = (
        torch.lerp(other, own, weight.view(-1, *(1,) * (own.dim() - 1)))
        for own, other in ((first.src, second.src), (first.angles, second.angles), points)
    )
    return FaceBatch(src, angles, keypoints, first.person, first.pose_error), second.person
