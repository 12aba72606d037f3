"""Baselines without training, and what a step and centring make of a trained model, with every setting to choose among.

Every one has 18 settings: the ridge three strengths, three steps, centred by pose or not; the whitening nine
shrinkages, centred or not; canonical correlation nine shrinkages and two powers; both together three, two, and three
weights; a network three lengths of its training, the same steps, centred or not. Centring alone has two, and a network
that is trained once six.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from viewdiff_nb import metrics
from viewdiff_nb.faces import FaceViews
from viewdiff_nb.faces.crops import PROFILE
from viewdiff_nb.modules.adjusted import Adjusted, CanonicalCorrelation, Summed, WithinClassWhitening
from viewdiff_nb.modules.baselines import DREAM, MLP, Frontaliser, MeanFace, PoseRidge, RawEmbedding, enrolled

STEPS = (0.25, 0.5, 1.0)
CENTRINGS = ("none", "even")
STRENGTHS = (30.0, 300.0, 3000.0)  # of the ridge
SHRINKAGES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)  # of the whitening
COMMON_SHRINKAGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)  # of canonical correlation
WEIGHTS = (0.3, 0.5, 0.7)  # of canonical correlation, beside another model
GROUPS = 3  # of people that are left out in turn
Setting = tuple[float | str, ...]


def adjusted(model: nn.Module | None, faces: FaceViews, **options: Any) -> Adjusted:
    """`Adjusted`, fitted to faces."""
    given = faces.src[:], faces.angles, faces.keypoints_3d[:], faces.front
    return Adjusted(model, *given, pose_error=faces.pose_error, **options)


def adjustments(model: nn.Module, faces: FaceViews) -> dict[Setting, Adjusted]:
    """A model with every step and centring."""
    whole = adjusted(model, faces, centring="none")
    unit = F.normalize(faces.src[:], dim=1)
    residual = whole.residual(unit, faces.angles, faces.keypoints_3d[:], faces.pose_error)
    return {
        (step, centring): adjusted(model, faces, step=step, centring=centring, residual=residual)
        for step in STEPS
        for centring in CENTRINGS
    }


def centred_candidates(faces: FaceViews) -> dict[Setting, nn.Module]:
    return {(centring,): adjusted(None, faces, step=0.0, centring=centring) for centring in CENTRINGS}


def ridge_candidates(faces: FaceViews) -> dict[Setting, nn.Module]:
    given = faces.src[:], faces.angles, faces.target
    ridges = {strength: PoseRidge(*given, strength, residual=True) for strength in STRENGTHS}
    return {
        (strength, *how): model for strength in ridges for how, model in adjustments(ridges[strength], faces).items()
    }


def whitening_candidates(
    faces: FaceViews, shrinkages: Sequence[float] = SHRINKAGES, centrings: Sequence[str] = CENTRINGS
) -> dict[Setting, Frontaliser]:
    found: dict[Setting, Frontaliser] = {}
    given = faces.src[:], faces.angles, faces.keypoints_3d[:], faces.front, faces.person
    for centring in centrings:
        centred = adjusted(None, faces, step=0.0, centring=centring)
        whitening = WithinClassWhitening(centred, *given, shrinkage=1.0)
        found |= {(s, centring): whitening.with_shrinkage(s) for s in shrinkages}
    return found


def common_candidates(
    faces: FaceViews, shrinkages: Sequence[float] = COMMON_SHRINKAGES, powers: Sequence[float] = (0.5, 1.0)
) -> dict[Setting, Frontaliser]:
    given = faces.src[:], faces.angles, faces.keypoints_3d[:], faces.front, faces.person
    centred = adjusted(None, faces, step=0.0, centring="even")
    common = CanonicalCorrelation(centred, *given, shrinkage=1.0)
    return {
        (s, power, "common"): model
        for s in shrinkages
        for power, model in zip(powers, common.with_settings(s, powers), strict=True)
    }


def whitened_and_common(faces: FaceViews) -> dict[Setting, Frontaliser]:
    whitened = whitening_candidates(faces, (0.6, 0.8, 0.9), ("even",))
    common = common_candidates(faces, (0.1, 0.3), (1.0,))
    return {
        (one[0], other[0], weight, "summed"): Summed((whitened[one], common[other]), (1 - weight, weight))
        for one in whitened
        for other in common
        for weight in WEIGHTS
    }


@torch.no_grad()
def held_out_best(candidates: Callable[[FaceViews], Mapping[Setting, nn.Module]], faces: FaceViews) -> Setting:
    """The setting with the best AUC of side views with all fronts, of people that are left out in `GROUPS`, in turn."""
    total: dict[Setting, float] = {}
    group = torch.arange(len(faces.names)) % GROUPS
    for left_out in range(GROUPS):
        tested = faces.select(group == left_out)
        tested = tested.where(tested.abs_yaw >= PROFILE)
        for setting, model in candidates(faces.select(group != left_out)).items():
            predicted = model.eval()(tested.src[:], **tested.conditions(), return_residual=False)
            scores = metrics.similarity_scores(predicted, enrolled(model, tested.front), tested.person)
            auc = metrics.roc_auc(scores.genuine_counts[0], scores.impostor_counts[0]).item()
            total[setting] = total.get(setting, 0.0) + auc
    return max(total, key=total.__getitem__)


@torch.no_grad()
def in_space(space: Frontaliser, faces: FaceViews) -> FaceViews:
    """A set as space maps its embeddings."""
    moved = space(F.normalize(faces.src[:], dim=1), **faces.conditions(), return_residual=False)
    return replace(faces, src=F.normalize(moved, dim=1), front=F.normalize(enrolled(space, faces.front), dim=1))


CLOSED_FORMS: dict[str, Callable[[FaceViews], Mapping[Setting, nn.Module]]] = {
    "centred by pose": centred_candidates,
    "ridge, shrunk to identity": ridge_candidates,
    "within-class whitening": whitening_candidates,
    "canonical correlation": common_candidates,
    "whitening + canonical correlation": whitened_and_common,
}


BASELINES: dict[str, Callable[[FaceViews], nn.Module]] = {
    "raw side view": lambda train: RawEmbedding(),
    "mean face": lambda train: MeanFace(train.front),
    "pose ridge": lambda train: PoseRidge(train.src[:], train.angles, train.target),
    "DREAM": lambda train: DREAM(train.feature_dim),
    "MLP": lambda train: MLP(train.feature_dim),
}


def as_enrolled(model: nn.Module, faces: FaceViews) -> FaceViews:
    """The set with its fronts as they are compared with a model's predictions, see `enrolled`."""
    return replace(faces, front=enrolled(model, faces.front))
