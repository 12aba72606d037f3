"""Predictions of a model for a face set, and what they are worth on validation people."""

import torch
from torch import Tensor, nn

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.metrics import COUNTS, recognition_by_yaw
from viewdiff_nb.modules.lora import evaluation_mode
from viewdiff_nb.modules.transformer import fuse_views
from viewdiff_nb.training.batches import feed, move_if_it_fits, padded_groups, view_groups
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.losses import Loss


def predict(model: nn.Module, faces: FaceViews, batch_size: int = 1024) -> Tensor:
    """Predicted frontal embeddings (M, D) of all side views, in evaluation mode, on the device of faces.

    With cross-view attention, the views of a person are seen in random groups of n_views; the last group
    of a person may be smaller.
    """
    home = faces.device
    device = next(iter((*model.parameters(), *model.buffers())), faces.src).device
    faces = move_if_it_fits(faces, device)
    out = torch.empty(faces.src.shape, device=device)
    with evaluation_mode(model):
        if views_fused(model) == 1:
            rows = torch.arange(len(faces), device=faces.device).split(batch_size)
            for index, batch in zip(rows, feed(faces, rows, device), strict=True):
                out[index] = model(batch.src, **batch.conditions(), return_residual=False).float()
        else:
            groups, mask = padded_groups(faces.person, model.n_views, torch.Generator().manual_seed(0))
            size = max(1, batch_size // model.n_views) * model.n_views
            rows, masks = groups.flatten().split(size), mask.flatten().to(device).split(size)
            for index, there, batch in zip(rows, masks, feed(faces, rows, device), strict=True):
                predicted = model(batch.src, **batch.conditions(), return_residual=False, view_mask=there)
                out[index.to(device)[there]] = predicted[there].float()
    return out.to(home)


def views_fused(model: nn.Module | TrainConfig) -> int:
    """How many views of a person make one prediction that is scored: several with cross-view attention."""
    is_config = isinstance(model, TrainConfig)
    together = model.use_cross_view if is_config else getattr(model, "cross_view", None) is not None
    return model.n_views if together else 1


def probes_to_score(model: nn.Module | TrainConfig, faces: FaceViews) -> int:
    """How many predictions `evaluate` scores: every side view, or every whole group of them.

    Args:
        model: or the config that describes it.
    """
    return int((torch.bincount(faces.person) // views_fused(model)).sum())


@torch.no_grad()
def evaluate(model: nn.Module, faces: FaceViews, loss: Loss, batch_size: int = 1024) -> dict[str, float]:
    """val_loss and, each as val_..., all rates of `recognition_by_yaw`, over all side views of faces.

    With cross-view attention over the fused predictions of whole groups, which is what it is trained for.
    """
    predicted, person, yaw = predict(model, faces), faces.person, faces.abs_yaw
    if views_fused(model) > 1:
        groups = view_groups(person, model.n_views, torch.Generator().manual_seed(0))  # the groups of predict
        predicted = fuse_views(predicted[groups.flatten()], model.n_views)
        person, yaw = person[groups[:, 0]], yaw[groups].mean(1)
    parts = zip(predicted.split(batch_size), person.split(batch_size), strict=True)
    values = torch.cat([loss(part, faces.front, owners) for part, owners in parts])
    rates = recognition_by_yaw(predicted, faces.front, person, yaw)["all"]
    rates = {f"val_{name}": rate for name, rate in rates.items() if name not in COUNTS}
    return {"val_loss": values.mean().item()} | rates
