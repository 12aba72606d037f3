"""What becomes of a trained model's rates when its inputs are wrong, and where its projection puts the face."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from viewdiff_nb.faces import FaceViews, Split
from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.modules.projection import LightweightFaceProjectionLayer
from viewdiff_nb.modules.transformer import fuse_views
from viewdiff_nb.training import predict
from viewdiff_nb.training.batches import view_groups

HALF = 1024  # a batch of the projection's controls holds two halves of this size, so that one's people are another's
SIDES = ("all", "0-45", "45-90", "75-90")


def side_rates(predicted: Tensor, faces: FaceViews) -> dict[str, dict[str, float]]:
    """All rates of `recognition_by_yaw` on `SIDES`."""
    rates = recognition_by_yaw(predicted, faces.front, faces.person, faces.abs_yaw)
    return {side: rates[side] for side in SIDES}


def fused(predicted: Tensor, faces: FaceViews, n_views: int) -> tuple[Tensor, FaceViews]:
    """Means of the predictions of random groups of views of a person, always the same groups."""
    groups = view_groups(faces.person, n_views, torch.Generator().manual_seed(0))
    return fuse_views(predicted[groups.flatten()], n_views), faces.where(groups[:, 0])


def robustness(model: nn.Module, split: Split) -> dict[str, dict[str, float]]:
    """Rank-1 and TAR of test people with errors of pose (degrees) and of keypoints (of their mean distance from their
    centre), normal ones; and rank-1 in galleries of other sizes, training people among them."""
    faces, found = split.test, {}
    random = torch.Generator().manual_seed(0)
    of_pose, of_points = (torch.randn(rows[:].shape, generator=random) for rows in (faces.angles, faces.keypoints_3d))
    size = (faces.keypoints_3d[:] - faces.keypoints_3d[:].mean(1, keepdim=True)).norm(dim=-1).mean(1)[:, None, None]
    changed = {f"pose {d}°": replace(faces, angles=faces.angles + of_pose * d * torch.pi / 180) for d in (0, 5, 10, 20)}
    changed |= {
        f"keypoints {e:.0%}": replace(faces, keypoints_3d=faces.keypoints_3d[:] + of_points * e * size)
        for e in (0.02, 0.05, 0.1, 0.2)
    }
    for name, views in changed.items():
        found[name] = _two_rates(predict(model, views, 2 * HALF), faces.front, views)
    predicted = predict(model, faces)
    for size_of in (75, 150):
        few = faces.person < size_of
        found[f"gallery {size_of}"] = _two_rates(predicted[few], faces.front[:size_of], faces.where(few))
    others = torch.cat((split.val.front, split.train.front))
    for more in (0, 200, len(others)):
        gallery = torch.cat((faces.front, others[:more]))
        found[f"gallery {len(gallery)}"] = _two_rates(predicted, gallery, faces)
    return found


def _two_rates(predicted: Tensor, gallery: Tensor, faces: FaceViews) -> dict[str, float]:
    rates = recognition_by_yaw(predicted, gallery, faces.person, faces.abs_yaw)["all"]
    return {"rank1": rates["rank1"], "tar": rates["tar"]}


@torch.no_grad()
def geometry(model: nn.Module, faces: FaceViews) -> dict[str, float]:
    """Where a projection's density is: stopped (share of the light), near (of what stops it the share near a keypoint,
    where a Gaussian is above one half) and volume (share of the grid that is near); nothing of a model without one.
    """
    if not isinstance(getattr(model, "projection", None), LightweightFaceProjectionLayer):
        return {}
    views = faces.where(torch.arange(0, len(faces), max(1, len(faces) // 256))).to(next(model.parameters()).device)
    found = model.eval().face_volume(views.src, views.angles, views.keypoints_3d)  # type: ignore[operator]
    near = (found.occupancy.amax(1, keepdim=True) > 0.5).float()
    stopped = found.weights.sum((1, 2, 3, 4))
    rays = found.weights.shape[-1] ** 2
    return {
        "stopped": (stopped / rays).mean().item(),
        "near": ((found.weights * near).sum() / found.weights.sum()).item(),
        "volume": near.mean().item(),
    }
