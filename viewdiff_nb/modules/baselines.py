"""What a model must beat, behind the interface of `EnhancedTransformerDecoderOnly3D`.

Some move the gallery as well: `enrolled` gives what is compared with a model's predictions.
"""

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
        """Shapes as in the model; returns the residual r or src + r, (B, D), scaled with the length of src.

        Raises:
            ValueError: for the residual of embeddings of another width, which has no meaning.
        """
        length = src.norm(dim=-1, keepdim=True)
        told = (angles, keypoints_3d) if pose_error is None else (angles, keypoints_3d, pose_error)
        frontal = self.predict(src / length.clamp_min(1e-12), *told) * length
        if return_residual and frontal.shape != src.shape:
            what = f"embeddings of width {frontal.shape[-1]} have no residual to {src.shape[-1]}"
            raise ValueError(f"{what}; ask for the embeddings with return_residual=False")
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
