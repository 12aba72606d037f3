"""Baselines without training, and what a step and centring make of a trained model, with every setting to choose among.

Every one has 18 settings: the ridge three strengths, three steps, centred by pose or not; the whitening nine strengths,
centred or not; a network three lengths of its training, the same steps, centred or not. Centring alone has two, and a
network that is trained once six.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import nn

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.modules.baselines import (
    DREAM,
    MLP,
    Adjusted,
    MeanFace,
    PoseRidge,
    RawEmbedding,
    WithinClassWhitening,
    enrolled,
)

STEPS = (0.25, 0.5, 1.0)
CENTRINGS = ("none", "even")
STRENGTHS = (30.0, 300.0, 3000.0)  # of the ridge
SHRINKAGES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)  # of the whitening
Setting = tuple[float | str, ...]


def adjusted(model: nn.Module | None, faces: FaceViews, **options: Any) -> Adjusted:
    """`Adjusted`, fitted to faces."""
    given = faces.src[:], faces.angles, faces.keypoints_3d[:], faces.front
    return Adjusted(model, *given, pose_error=faces.pose_error, **options)


def adjustments(model: nn.Module, faces: FaceViews) -> dict[Setting, nn.Module]:
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


def whitening_candidates(faces: FaceViews) -> dict[Setting, nn.Module]:
    found: dict[Setting, nn.Module] = {}
    given = faces.src[:], faces.angles, faces.keypoints_3d[:], faces.front, faces.person
    for centring in CENTRINGS:
        centred = adjusted(None, faces, step=0.0, centring=centring)
        found |= {(s, centring): WithinClassWhitening(centred, *given, shrinkage=s) for s in SHRINKAGES}
    return found


CLOSED_FORMS: dict[str, Callable[[FaceViews], dict[Setting, nn.Module]]] = {
    "centred by pose": centred_candidates,
    "ridge, shrunk to identity": ridge_candidates,
    "within-class whitening": whitening_candidates,
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
