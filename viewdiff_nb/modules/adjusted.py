"""What is fitted to training people in closed form, around a trained model or without one.

Centring by pose, whitening and canonical correlation are classics that a network must beat; `InSpace` and `Summed` let
it work with them, and `DropIn` keeps it in the recogniser's own space.
"""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb.modules.baselines import Frontaliser, enrolled

Centring = Literal["none", "even"]
TERMS = ("1", "cos(yaw)", "cos(2 yaw)")  # of `even_terms`


class Adjusted(Frontaliser):
    """Part of the way to a model's prediction, minus what all faces of that yaw have in common.

        predict(x) = u - m(yaw),   u = x + step (f(x) - x) of length 1,   enrol(y) = y - mean frontal embedding

    where f(x) is scaled to length 1, so that the step is a share of the way whatever the length of a prediction.

    m is the least-squares fit to the u of the training views by 1, cos(yaw), cos(2 yaw), which treats left and right
    alike ("even"). Without a model it is centring by pose alone.

    Args:
        model: f, trained; None for f(x) = x.
        src, angles, keypoints_3d: (N, ...) training views.
        front: (P, D) frontal embeddings of the training people.
        step: 0 .. 1, 1 goes the whole way.
        centring: none subtracts nothing.
        pose_error: (N, 3) of the training views, or None.
        residual: (N, D) f(x) - x of the training views, if it is known already.
    """

    weight: Tensor
    front_mean: Tensor

    def __init__(
        self,
        model: nn.Module | None,
        src: Tensor,
        angles: Tensor,
        keypoints_3d: Tensor,
        front: Tensor,
        step: float = 1.0,
        centring: Centring = "even",
        pose_error: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.step, self.centring = model, step, centring
        fronts = F.normalize(front, dim=-1)
        self.register_buffer("weight", torch.zeros(1, src.shape[1], device=src.device))
        self.register_buffer("front_mean", fronts.mean(0) * (centring != "none"))
        if centring != "none":
            unit = F.normalize(src, dim=-1)
            residual = self.residual(unit, angles, keypoints_3d, pose_error) if residual is None else residual
            moved = F.normalize(unit + self.step * residual, dim=-1).double()
            terms = self._terms(angles).double()
            gram = terms.T @ terms + 1e-6 * len(terms) * torch.eye(terms.shape[1], device=terms.device)
            self.weight = torch.linalg.solve(gram, terms.T @ moved).to(src.dtype)

    @torch.no_grad()
    def residual(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        """f(x) - x of embeddings of length 1."""
        if self.model is None or self.step == 0:
            return torch.zeros_like(unit)
        return unit_prediction(self.model, unit, angles, keypoints_3d, pose_error) - unit

    def _terms(self, angles: Tensor) -> Tensor:
        return torch.zeros_like(angles[:, :1]) if self.centring == "none" else even_terms(angles)

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        moved = unit + self.step * self.residual(unit, angles, keypoints_3d, pose_error)
        return F.normalize(moved, dim=-1) - self._terms(angles) @ self.weight

    def enrol(self, front: Tensor) -> Tensor:
        return front - self.front_mean


class WithinClassWhitening(Frontaliser):
    """Embeddings centred by `Adjusted`, then directions in which one person's pictures differ made short.

        x -> S^-1/2 x,   S = the covariance within people, shrunk as in `inverse_root`

    Hatch et al. 2006 (WCCN, Interspeech).

    Args:
        centred: fitted to the same training people, with step 0.
        src, angles, keypoints_3d, front: as there.
        person: (N,) row of front of each view.
        shrinkage: 0 .. 1; 1 leaves all directions as they are.
    """

    weight: Tensor

    def __init__(
        self,
        centred: Adjusted,
        src: Tensor,
        angles: Tensor,
        keypoints_3d: Tensor,
        front: Tensor,
        person: Tensor,
        shrinkage: float,
    ) -> None:
        super().__init__()
        self.centred = centred
        x = torch.cat((centred.predict(F.normalize(src, dim=-1), angles, keypoints_3d), enrolled(centred, front)))
        owner = torch.cat((person, torch.arange(len(front), device=person.device)))
        off = (x - _means(x, owner, len(front))[owner]).double()
        self._within = torch.linalg.eigh(off.T @ off / len(off))
        self.register_buffer("weight", inverse_root(self._within, shrinkage).to(src.dtype))

    def with_shrinkage(self, shrinkage: float) -> "WithinClassWhitening":
        """The same whitening with another shrinkage; what was computed once serves again."""
        other = copy.deepcopy(self)
        other.weight = inverse_root(self._within, shrinkage).to(self.weight.dtype)
        return other

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        return self.centred.predict(unit, angles, keypoints_3d) @ self.weight

    def enrol(self, front: Tensor) -> Tensor:
        return self.centred.enrol(front) @ self.weight


class CanonicalCorrelation(Frontaliser):
    """What fronts and side views of a person have in common, directions weighted by how much that is.

        front -> R^power U^T Sf^-1/2 x,   side view -> R^power V^T Ss^-1/2 x,   U R V^T = Sf^-1/2 C Ss^-1/2

    C is the covariance of people's mean front and mean side view, Sf and Ss those of single pictures, shrunk toward the
    identity. Regularised canonical correlations (Hotelling 1936; Vinod 1976); with power .5 a cosine of what Bach &
    Jordan 2005 (A probabilistic interpretation of canonical correlation analysis) infer of the person.

    Args:
        centred, src, angles, keypoints_3d, front, person: as for `WithinClassWhitening`.
        shrinkage: 0 .. 1.
        power: of the correlations.
        boundary: |yaw| in degrees from which a view is a side view.

    Raises:
        ValueError: if nobody has a view beyond boundary.
    """

    of_front: Tensor
    of_side: Tensor

    def __init__(
        self,
        centred: Adjusted,
        src: Tensor,
        angles: Tensor,
        keypoints_3d: Tensor,
        front: Tensor,
        person: Tensor,
        shrinkage: float,
        power: float = 1.0,
        boundary: float = 45.0,
    ) -> None:
        super().__init__()
        self.centred, self.boundary = centred, boundary
        x = centred.predict(F.normalize(src, dim=-1), angles, keypoints_3d)
        x, side = torch.cat((x, enrolled(centred, front))).double(), self._is_side(angles)
        owner = torch.cat((person, torch.arange(len(front), device=person.device)))
        side = torch.cat((side, torch.zeros_like(owner[: len(front)], dtype=torch.bool)))
        both = torch.bincount(owner[side], minlength=len(front)) > 0
        if not both.any():
            raise ValueError(f"canonical correlation needs people with views beyond {boundary:g} degrees of yaw")
        means, self._covariances = [], []
        for picked in (~side & both[owner], side):
            mean, covariance = _people_and_pictures(x[picked], owner[picked], both)
            means.append(mean)
            self._covariances.append(torch.linalg.eigh(covariance))
        self._common = means[0].T @ means[1]
        for name in ("of_front", "of_side"):
            self.register_buffer(name, torch.zeros_like(self._common, dtype=src.dtype))
        self._set(shrinkage, (power,))

    def _set(self, shrinkage: float, powers: Sequence[float]) -> "list[CanonicalCorrelation]":
        of_front, of_side = (inverse_root(covariance, shrinkage) for covariance in self._covariances)
        left, correlation, right = torch.linalg.svd(of_front @ self._common @ of_side)
        found = [self, *(copy.deepcopy(self) for _ in powers[1:])]
        for each, power in zip(found, powers, strict=True):
            weight = (correlation / correlation[0]) ** power
            each.of_front = (of_front @ left * weight).to(self.of_front.dtype)
            each.of_side = (of_side @ right.T * weight).to(self.of_side.dtype)
        return found

    def with_settings(self, shrinkage: float, powers: Sequence[float]) -> "list[CanonicalCorrelation]":
        """The same with another shrinkage, one for each power; what was computed once serves again."""
        return copy.deepcopy(self)._set(shrinkage, powers)

    def _is_side(self, angles: Tensor) -> Tensor:
        return angles[:, 1].abs() >= torch.pi / 180 * self.boundary

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        x = self.centred.predict(unit, angles, keypoints_3d)
        return torch.where(self._is_side(angles)[:, None], x @ self.of_side, x @ self.of_front)

    def enrol(self, front: Tensor) -> Tensor:
        return self.centred.enrol(front) @ self.of_front


def even_terms(angles: Tensor) -> Tensor:
    """(B, 3) 1, cos(yaw), cos(2 yaw) of angles (B, 3) in radians."""
    yaw = angles[:, 1:2]
    return torch.cat((torch.ones_like(yaw), yaw.cos(), (2 * yaw).cos()), -1)


def unit_prediction(
    model: nn.Module, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None
) -> Tensor:
    """(B, D) what a model predicts for embeddings of length 1, scaled to length 1."""
    told = {} if pose_error is None else {"pose_error": pose_error}
    return F.normalize(model.eval()(unit, angles, keypoints_3d, return_residual=False, **told), dim=-1)


def inverse_root(covariance: tuple[Tensor, Tensor], shrinkage: float) -> Tensor:
    """S^-1/2 of S = (1 - shrinkage) C D / tr(C) + shrinkage I (Ledoit & Wolf 2004's target).

    Args:
        covariance: values and vectors of C, of `torch.linalg.eigh`.

    >>> inverse_root(torch.linalg.eigh(torch.tensor([[3.0, 0.0], [0.0, 1.0]])), 0.5)   # S = [[1.25, 0], [0, .75]]
    tensor([[0.8944, 0.0000],
            [0.0000, 1.1547]])
    """
    values, vectors = covariance
    shrunk = (1 - shrinkage) * values / values.sum() * len(values) + shrinkage
    return vectors * shrunk.clamp_min(1e-9).rsqrt() @ vectors.T


def _means(x: Tensor, owner: Tensor, people: int) -> Tensor:
    """(people, D) mean row of each person; 0 for one without any."""
    total = torch.zeros(people, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, owner, x)
    return total / torch.bincount(owner, minlength=people).clamp_min(1)[:, None]


def _people_and_pictures(x: Tensor, owner: Tensor, people: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the people that are asked for (Q, D), and the covariance (D, D) of one picture of any of them."""
    means = _means(x, owner, len(people))
    off, found = x - means[owner], means[people]
    return found, found.T @ found / len(found) + off.T @ off / len(off)


class InSpace(Frontaliser):
    """A model of embeddings that another maps beforehand, followed a part of the way.

        z = space(x) / |space(x)|,   predict(x) = z + step (f(z) - z) of length 1,   enrol(y) = space's, of length 1

    where f(z) is scaled to length 1.

    Args:
        space: a `Frontaliser`, fitted to the training people.
        model: f, trained on what space makes of them.
        step: 0 .. 1.
    """

    def __init__(self, space: Frontaliser, model: nn.Module, step: float = 1.0) -> None:
        super().__init__()
        self.space, self.model, self.step = space, model, step

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        z = F.normalize(self.space.predict(unit, angles, keypoints_3d, pose_error), dim=-1)
        return F.normalize(
            torch.lerp(z, unit_prediction(self.model, z, angles, keypoints_3d, pose_error), self.step), dim=-1
        )

    def enrol(self, front: Tensor) -> Tensor:
        return F.normalize(self.space.enrol(front), dim=-1)


class Summed(Frontaliser):
    """Models whose similarities are added: embeddings of length 1 beside each other, (B, K D), times weights^1/2.

    Args:
        members: the K models.
        weights: of each; they add up to 1.
    """

    def __init__(self, members: Sequence[Frontaliser], weights: Sequence[float]) -> None:
        super().__init__()
        self.members, self.weights = list(members), tuple(weights)
        self.parts = nn.ModuleList(members)  # so that their weights move and are saved with it
        if len(members) != len(weights) or abs(sum(self.weights) - 1) > 1e-6 or min(self.weights) < 0:
            raise ValueError(f"{len(members)} members need as many weights that add up to 1, got {tuple(weights)}")

    def _beside(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([w**0.5 * F.normalize(p, dim=-1) for w, p in zip(self.weights, parts, strict=True)], -1)

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        return self._beside([each.predict(unit, angles, keypoints_3d, pose_error) for each in self.members])

    def enrol(self, front: Tensor) -> Tensor:
        return self._beside([each.enrol(front) for each in self.members])
