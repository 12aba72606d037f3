"""Which samples go together, and how they reach the device.

A batch is a tensor of indices: of shuffled views, or of groups of views of one person. A set that fits the
device lies there as a whole and is indexed, with no worker; another one is read by a DataLoader.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from viewdiff_nb.faces.geometry import normalise_keypoints
from viewdiff_nb.faces.views import NORMS, FaceViews, running_number
from viewdiff_nb.training.config import TrainConfig

MEMORY_SHARE = 0.5  # of a GPU's free memory that a face set may take; the model needs the rest


class FaceBatch(NamedTuple):
    """B side views: src (B, D), angles (B, 3), keypoints_3d (B, 5, 3), person (B,), as in `FaceViews`."""

    src: Tensor
    angles: Tensor
    keypoints_3d: Tensor
    person: Tensor

    def conditions(self) -> dict[str, Tensor]:
        """The model's inputs beside src: angles, keypoints_3d, pose."""
        return {"angles": self.angles, "keypoints_3d": self.keypoints_3d, "pose": self.angles}


def move_if_it_fits(faces: FaceViews, device: torch.device, share: float = MEMORY_SHARE) -> FaceViews:
    """The set on the device if it takes at most that share of the device's free memory, else as it is.

    On the CPU nothing moves: what is in memory stays there, what is memory-mapped stays on disk.
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
    if (seen := len(kept.person.unique())) < 2:
        raise ValueError(
            f"training tells people from each other and needs views of at least 2 people, got {seen}; "
            "add people, or widen min_yaw and max_yaw"
        )
    for name, embeddings in (("front", kept.front), ("src", kept.front[:0] if kept.on_disk else kept.src)):
        norms = embeddings.norm(dim=1)  # those on disk were looked at when they were loaded
        if (odd := (norms < NORMS[0]) | (norms > NORMS[1])).any():
            raise ValueError(
                f"{name}: an embedding has length {norms[odd][0].item():.3g}; float32 calculates with "
                f"{NORMS[0]:g} to {NORMS[1]:g}. Scale all embeddings alike"
            )
    return kept


def feed(
    faces: FaceViews, index_batches: Iterable[Tensor], device: torch.device, num_workers: int = 0
) -> Iterator[FaceBatch]:
    """The batches with these indices, on the device; the same values wherever faces lies.

    Args:
        faces: on the device, as `move_if_it_fits` leaves it if it fits; or else on the CPU or memory-mapped.
        index_batches: (B,) rows of faces each.
        num_workers: processes that read ahead; only for a set that is not on the device.
    """
    if not faces.on_disk and faces.device.type == device.type:
        for index in index_batches:
            yield take(faces, index)
        return
    indices = [index.cpu().numpy() for index in index_batches]  # a tensor would cost a worker a file handle
    loader = DataLoader(
        _Batches(faces),
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )  # of its own: dropout's stays where it is
    for batch in loader:
        yield FaceBatch(*(values.to(device, non_blocking=True) for values in batch))


class _Batches(Dataset):
    """A face set as a dataset whose items are batches: its keys are index arrays."""

    def __init__(self, faces: FaceViews) -> None:
        self.faces = faces

    def __getitem__(self, index) -> FaceBatch:
        return take(self.faces, torch.from_numpy(index))


def take(faces: FaceViews, index: Tensor) -> FaceBatch:
    """The side views in index, (B,)."""
    return FaceBatch(faces.src[index], faces.angles[index], faces.keypoints_3d[index], faces.person[index])


def count_batches(faces: FaceViews, config: TrainConfig) -> int:
    """Batches of an epoch.

    Raises:
        ValueError: if there are too few groups of views for one batch.
    """
    if (together := config.views_together) == 1:
        return math.ceil(len(faces) / config.batch_size)
    groups = int((torch.bincount(faces.person) // together).sum())
    if groups * together < config.batch_size:
        asked = f"n_views={together}" if config.use_cross_view else "paired_views: two"
        raise ValueError(
            f"{groups} groups of {asked} views of a person do not fill a batch of {config.batch_size}; "
            "lower batch_size" + " or n_views" * config.use_cross_view
        )
    return groups * together // config.batch_size


def draw_batches(faces: FaceViews, config: TrainConfig, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Index tensors of one epoch's batches; with cross-view attention or pairs the views of a person lie together."""
    if config.views_together == 1:
        return torch.randperm(len(faces), generator=generator).to(faces.device).split(config.batch_size)
    batches = view_groups(faces.person, config.views_together, generator).flatten().split(config.batch_size)
    return batches[: count_batches(faces, config)]


def view_groups(person: Tensor, n_views: int, generator: torch.Generator) -> Tensor:
    """Random groups of n_views different views of one person, no view twice, groups shuffled.

    Args:
        person: (M,) whose view each is.
        generator: a CPU generator.

    Returns:
        (G, n_views) rows of person; views that fill no group are left out.
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
    owner, counts = person[order], torch.bincount(person)
    place = running_number(owner)
    sizes = (counts + n_views - 1) // n_views  # groups of each person
    group = (sizes.cumsum(0) - sizes)[owner] + place // n_views
    groups = torch.zeros(int(sizes.sum()), n_views, dtype=torch.long, device=person.device)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    groups[group, place % n_views], mask[group, place % n_views] = order, True
    return torch.where(mask, groups, groups[:, :1]), mask


# ---- Mix-up of different people seen from about the same side: more identities than the training set has.
#     x = w x_i + (1 - w) x_j,    loss = w loss(person i) + (1 - w) loss(person j),    w uniform in [0, 1]
#
# Zhang et al. 2018, arXiv:1710.09412, eq. 1. Partners have almost the same yaw, because the mean of a left and a
# right view is the view of nobody.

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
