"""Which samples go together: shuffled views, or groups of views of one person. Indices only, no workers."""

import math

import torch
from torch import Tensor

from ..faces.views import FaceViews
from .config import TrainConfig


def count_batches(faces: FaceViews, config: TrainConfig) -> int:
    """Batches of an epoch.

    Raises:
        ValueError: if there are too few groups of views for one batch.
    """
    if config.use_cross_view:
        groups = int((torch.bincount(faces.person) // config.n_views).sum())
        if groups * config.n_views < config.batch_size:
            raise ValueError(f"{groups} groups of n_views={config.n_views} views do not fill a batch of "
                             f"{config.batch_size}; lower batch_size or n_views")  # fmt: skip
        return groups * config.n_views // config.batch_size
    return math.ceil(len(faces) / config.batch_size)


def draw_batches(faces: FaceViews, config: TrainConfig, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Index tensors of one epoch's batches; with cross-view attention the views of a person lie together."""
    if not config.use_cross_view:
        return torch.randperm(len(faces), generator=generator).to(faces.device).split(config.batch_size)
    batches = view_groups(faces.person, config.n_views, generator).flatten().split(config.batch_size)
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
    place = torch.arange(len(order), device=person.device) - (counts.cumsum(0) - counts)[owner]
    sizes = (counts + n_views - 1) // n_views  # groups of each person
    group = (sizes.cumsum(0) - sizes)[owner] + place // n_views
    groups = torch.zeros(int(sizes.sum()), n_views, dtype=torch.long, device=person.device)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    groups[group, place % n_views], mask[group, place % n_views] = order, True
    return torch.where(mask, groups, groups[:, :1]), mask
