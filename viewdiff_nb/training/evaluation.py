"""Predictions of a model for a face set, and what they are worth on validation people."""

import torch
from torch import Tensor, nn

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.metrics import COUNTS, FAR, can_tell, recognition_by_yaw
from viewdiff_nb.modules.lora import evaluation_mode
from viewdiff_nb.modules.transformer import fuse_views
from viewdiff_nb.training.batches import feed, move_if_it_fits, padded_groups, view_groups
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.losses import Loss
from viewdiff_nb.training.result import TrainingDiverged


def predict(model: nn.Module, faces: FaceViews, batch_size: int = 1024) -> Tensor:
    """Predicted frontal embeddings (M, D) of all side views, in evaluation mode, on the device of faces.

    With cross-view attention, a person's views are seen in random groups of n_views; the last one may be smaller.
    """
    home = faces.device
    device = next(iter((*model.parameters(), *model.buffers())), faces.src).device
    faces = move_if_it_fits(faces, device)
    out = torch.empty(faces.src.shape, device=device)
    with evaluation_mode(model):
        if (n_views := views_fused(model)) == 1:
            rows = torch.arange(len(faces), device=faces.device).split(batch_size)
            for index, batch in zip(rows, feed(faces, rows, device), strict=True):
                out[index] = model(batch.src, **batch.conditions(), return_residual=False).float()
        else:
            groups, mask = padded_groups(faces.person, n_views, torch.Generator().manual_seed(0))
            size = max(1, batch_size // n_views) * n_views
            rows, masks = groups.flatten().split(size), mask.flatten().to(device).split(size)
            for index, is_view, batch in zip(rows, masks, feed(faces, rows, device), strict=True):
                predicted = model(batch.src, **batch.conditions(), return_residual=False, view_mask=is_view)
                out[index.to(device)[is_view]] = predicted[is_view].float()
    return out.to(home)


def views_fused(model: nn.Module | TrainConfig) -> int:
    """How many views of a person make one prediction that is scored: several with cross-view attention."""
    if isinstance(model, TrainConfig):
        return model.n_views if model.use_cross_view else 1
    return 1 if getattr(model, "cross_view", None) is None else int(getattr(model, "n_views", 1))


def probes_to_score(model: nn.Module | TrainConfig, faces: FaceViews) -> int:
    """How many predictions `evaluate` scores of a model, or of the one that a config describes."""
    return int((torch.bincount(faces.person) // views_fused(model)).sum())


def check_people(config: TrainConfig, train_faces: FaceViews, val_faces: FaceViews, model: nn.Module | None) -> None:
    """
    Raises:
        ValueError: if people are in both sets, or too few validate for what is monitored.
    """
    if overlap := set(train_faces.names) & set(val_faces.names):
        raise ValueError(f"{len(overlap)} people are in both training and validation, e.g. {min(overlap)!r}")
    people, probes = len(val_faces.names), probes_to_score(config if model is None else model, val_faces)
    found = f"{people} validation people with {probes} predictions"
    if people < 2 or not probes:
        raise ValueError(f"validation needs 2 people or more, with views enough to be scored; got {found}")
    impostors = probes * (people - 1)
    if config.monitor == "val_tar" and not can_tell(impostors):
        raise ValueError(
            f"{found} make {impostors} impostor pairs, too few for a false accept rate of {FAR:g}; raise val_people, "
            "or monitor something else"
        )


@torch.no_grad()
def evaluate(model: nn.Module, faces: FaceViews, loss: Loss, batch_size: int = 1024) -> dict[str, float]:
    """val_loss and, each as val_..., all rates of `recognition_by_yaw`, over all side views of faces.

    With cross-view attention over the fused predictions of whole groups, which is what it is trained for.

    Raises:
        TrainingDiverged: if a prediction is not finite.
    """
    predicted, person, yaw = predict(model, faces), faces.person, faces.abs_yaw
    if not predicted.isfinite().all():
        raise TrainingDiverged("the validation people's predictions are not finite")
    if (n_views := views_fused(model)) > 1:
        groups = view_groups(person, n_views, torch.Generator().manual_seed(0))  # the groups of predict
        predicted = fuse_views(predicted[groups.flatten()], n_views)
        person, yaw = person[groups[:, 0]], yaw[groups].mean(1)
    parts = zip(predicted.split(batch_size), person.split(batch_size), strict=True)
    values = torch.cat([loss(part, faces.front, owners) for part, owners in parts])
    rates = recognition_by_yaw(predicted, faces.front, person, yaw)["all"]
    return {"val_loss": values.mean().item()} | {f"val_{n}": rate for n, rate in rates.items() if n not in COUNTS}
