"""What a model must beat, behind the interface of `EnhancedTransformerDecoderOnly3D`.

Some move the gallery as well: `enrolled` gives what is compared with a model's predictions.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb.faces.geometry import normalise_keypoints, to_face_frame
from viewdiff_nb.modules.attention import encode_pose


class Frontaliser(nn.Module):
    """Base class: subclasses predict the frontal embedding from unit side-view embeddings."""

    def forward(
        self,
        src: Tensor,
        angles: Tensor,
        keypoints_3d: Tensor,
        pose: Tensor | None = None,
        return_residual: bool = True,
        pose_error: Tensor | None = None,
    ) -> Tensor:
        """Shapes as in the model; returns the residual r or src + r, (B, D), scaled with the length of src."""
        length = src.norm(dim=-1, keepdim=True)
        told = (angles, keypoints_3d) if pose_error is None else (angles, keypoints_3d, pose_error)
        frontal = self.predict(src / length.clamp_min(1e-12), *told) * length
        return frontal - src if return_residual else frontal

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define predict")

    def enrol(self, front: Tensor) -> Tensor:
        """What a gallery keeps of frontal embeddings (P, D) of length 1."""
        return front


def enrolled(model: nn.Module, front: Tensor) -> Tensor:
    """(P, D) frontal embeddings as they are compared with the predictions of a model; most models leave them alone."""
    return model.enrol(F.normalize(front, dim=-1)) if isinstance(model, Frontaliser) else front


class RawEmbedding(Frontaliser):
    """No model: the side view stands for the frontal one."""

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        return unit


class MeanFace(Frontaliser):
    """Always the mean of the frontal embeddings (P, D) of the training people: high cosine, recognises nobody."""

    mean: Tensor

    def __init__(self, front: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", F.normalize(F.normalize(front, dim=-1).mean(0), dim=-1))

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        return self.mean.expand_as(unit)


class PoseRidge(Frontaliser):
    """Ridge regression on z = [x, x sin(yaw), x cos(yaw), pose code, 1], in closed form.

    W = argmin |Z W - Y|^2 + strength |W|^2 = (Z^T Z + strength I)^-1 Z^T Y,
    fitted to src (N, D), angles (N, 3) and target (N, D) of the training samples.

    residual: Y is what is missing from x to the target, and z W is added to x, so that a strong ridge leaves x as it
    is instead of answering 0.
    """

    weight: Tensor

    def __init__(
        self, src: Tensor, angles: Tensor, target: Tensor, strength: float = 30.0, residual: bool = False
    ) -> None:
        super().__init__()
        if strength <= 0:
            raise ValueError(f"strength must be positive, got {strength}")
        self.residual = residual
        x = F.normalize(src, dim=-1)
        z = self._design(x, angles).double()
        y = F.normalize(target, dim=-1).double() - (x.double() if residual else 0.0)
        gram = z.T @ z + strength * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        self.register_buffer("weight", torch.linalg.solve(gram, z.T @ y).to(src.dtype))

    @staticmethod
    def _design(unit: Tensor, angles: Tensor) -> Tensor:
        x, yaw = unit * unit.shape[-1] ** 0.5, angles[:, 1:2]
        return torch.cat((x, x * yaw.sin(), x * yaw.cos(), encode_pose(angles), torch.ones_like(yaw)), -1)

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        found = self._design(unit, angles) @ self.weight
        return unit + found if self.residual else found


Centring = Literal["none", "even"]


class Adjusted(Frontaliser):
    """Part of the way to a model's prediction, minus what all faces of that yaw have in common.

        predict(x) = u - m(yaw),   u = x + step (f(x) - x) of length 1,   enrol(y) = y - mean frontal embedding

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
        return self.model.eval()(
            unit, angles, keypoints_3d, **({} if pose_error is None else {"pose_error": pose_error})
        )

    def _terms(self, angles: Tensor) -> Tensor:
        yaw = angles[:, 1:2]
        if self.centring == "none":
            return torch.zeros_like(yaw)
        return torch.cat((torch.ones_like(yaw), yaw.cos(), (2 * yaw).cos()), -1)

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        moved = unit + self.step * self.residual(unit, angles, keypoints_3d, pose_error)
        return F.normalize(moved, dim=-1) - self._terms(angles) @ self.weight

    def enrol(self, front: Tensor) -> Tensor:
        return front - self.front_mean


class WithinClassWhitening(Frontaliser):
    """Embeddings centred by `Adjusted`, then directions in which one person's pictures differ made short.

        x -> S^-1/2 x,   S = (1 - shrinkage) W D / tr(W) + shrinkage I,   W the covariance within people

    Hatch et al. 2006 (WCCN, Interspeech), shrunk toward the identity (Ledoit & Wolf 2004's target).

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
        means = torch.zeros_like(front).index_add_(0, owner, x) / torch.bincount(owner)[:, None]
        off = (x - means[owner]).double()
        within = off.T @ off / len(off)
        eye = torch.eye(len(within), dtype=within.dtype, device=within.device)
        shrunk = (1 - shrinkage) * within / within.trace() * len(within) + shrinkage * eye
        values, vectors = torch.linalg.eigh(shrunk)
        self.register_buffer("weight", (vectors * values.clamp_min(1e-9).rsqrt() @ vectors.T).to(src.dtype))

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        return self.centred.predict(unit, angles, keypoints_3d) @ self.weight

    def enrol(self, front: Tensor) -> Tensor:
        return self.centred.enrol(front) @ self.weight


class MLP(Frontaliser):
    """Three layers on [x, pose code, keypoints]: what the same data and loss give without any module."""

    def __init__(self, feature_dim: int = 512, hidden: int = 1024, dropout: float = 0.2) -> None:
        super().__init__()
        inputs = feature_dim + 6 + 30  # x, sines and cosines of three angles, five keypoints in two frames
        first = (nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(dropout))
        second = (nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(dropout))
        last = nn.Linear(hidden, feature_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*first, *second, last)

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        seen = normalise_keypoints(keypoints_3d)
        points = torch.cat((seen, to_face_frame(seen, angles)), -1).flatten(1)
        return unit + self.layers(
            torch.cat((unit * unit.shape[-1] ** 0.5, encode_pose(angles, pose_error), points), -1)
        )


class DREAM(Frontaliser):
    """Deep residual equivariant mapping: x + c(yaw) ReLU(W2 ReLU(W1 x)), c = sigmoid(10 (|yaw| / 45° - 1)).

    Cao et al. 2018, arXiv:1803.00839, eq. 3 and the gate of the authors' public code.
    """

    def __init__(self, feature_dim: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, feature_dim), nn.ReLU()
        )

    def predict(self, unit: Tensor, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        gate = torch.sigmoid(10 * (angles[:, 1:2].abs() / (torch.pi / 4) - 1))
        scale = unit.shape[-1] ** 0.5
        return unit + gate * self.layers(unit * scale) / scale
