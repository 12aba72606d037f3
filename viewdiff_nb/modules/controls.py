"""Controls: what could explain a module's gain without the module's idea, and other ways to adapt a base.

Each changes one thing of a model and leaves the rest as it was; `studies.controls` trains them beside the modules.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb.faces.geometry import normalise_keypoints, to_face_frame
from viewdiff_nb.modules.attention import encode_pose
from viewdiff_nb.modules.projection import KEYPOINT_WIDTH, LightweightFaceProjectionLayer, gaussian_occupancy
from viewdiff_nb.modules.transformer import DecoderBlock, EnhancedTransformerDecoderOnly3D

Mistake = Literal["another person's keypoints", "mean keypoints", "pose not undone", "another pose"]


class MisledProjection(nn.Module):
    """A projection layer that is told something wrong; if it does as well, it does not use what it was told.

    Args:
        layer: what is misled.
        mistake: another person's keypoints: the face's own frame holds those of the sample half a batch away; mean
            keypoints: those of mean, for everybody; pose not undone: the keypoints as the camera sees them; another
            pose: undone by the pose of the sample half a batch away.
        mean: (K, 3) in the face's own frame.
    """

    mean: Tensor

    def __init__(self, layer: LightweightFaceProjectionLayer, mistake: Mistake, mean: Tensor) -> None:
        super().__init__()
        self.layer, self.mistake = layer, mistake
        self.register_buffer("mean", normalise_keypoints(mean[None])[0], persistent=False)

    def forward(
        self,
        features: Tensor,
        keypoints_3d: Tensor,
        target_pose: Tensor | None = None,
        source_pose: Tensor | None = None,
    ) -> Tensor:
        """As the layer's; source_pose must be given."""
        if source_pose is None:
            raise ValueError("source_pose must be given (B, 3): there is nothing to be wrong about without it")
        undone, half = torch.zeros_like(source_pose), len(features) // 2
        if self.mistake == "pose not undone":
            return self.layer(features, keypoints_3d, target_pose, undone)
        if self.mistake == "another pose":
            return self.layer(features, keypoints_3d, target_pose, source_pose.roll(half, 0))
        own = to_face_frame(normalise_keypoints(keypoints_3d), source_pose).roll(half, 0)
        if self.mistake == "mean keypoints":
            own = self.mean.expand_as(own)
        return self.layer(features, own, target_pose, undone)


class PlainProjection(nn.Module):
    """One hidden layer on [features, keypoints in both frames, pose code] in the projection's place: no space in it."""

    def __init__(self, feature_dim: int, hidden: int, num_keypoints: int = 5) -> None:
        super().__init__()
        self.hidden = nn.Linear(feature_dim + 6 * num_keypoints + 6, hidden)
        self.expand = nn.Linear(hidden, feature_dim)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(
        self,
        features: Tensor,
        keypoints_3d: Tensor,
        target_pose: Tensor | None = None,
        source_pose: Tensor | None = None,
    ) -> Tensor:
        """As the projection layer's, for features (B, C) and a frontal target; source_pose must be given."""
        if source_pose is None or target_pose is not None:
            raise ValueError("give source_pose (B, 3) and no target_pose: this layer knows the frontal target only")
        seen = normalise_keypoints(keypoints_3d)
        points = torch.cat((seen, to_face_frame(seen, source_pose)), -1).flatten(1)
        return self.expand(F.gelu(self.hidden(torch.cat((features, points, encode_pose(source_pose)), -1))))


class KeypointDensity(LightweightFaceProjectionLayer):
    """A projection whose density starts around the keypoints (start), may not leave them (carve), or is drawn to them
    (draw): the loss counts the share of a face's density that is not near them."""

    DRAWN = 5.0  # that share's weight in the loss

    def __init__(self, *sizes: int, how: Literal["start", "carve", "draw"]) -> None:
        super().__init__(*sizes)
        self.how = how

    def density(self, logit: Tensor, keypoints: Tensor) -> Tensor:
        near = gaussian_occupancy(keypoints, self.voxel_resolution, KEYPOINT_WIDTH).amax(1, keepdim=True)
        if self.how == "start":
            return F.softplus(logit - 4 + 6 * near)
        density = super().density(logit, keypoints)
        if self.how == "carve":
            return density * near
        if density.requires_grad:
            whole = density.detach().sum((1, 2, 3, 4), keepdim=True)
            share = (density.detach() * (1 - near)).sum((1, 2, 3, 4), keepdim=True) / whole
            of_share = (1 - near - share) / whole / len(near)  # its gradient, of the mean over the faces
            density.register_hook(lambda gradient: gradient + self.DRAWN * of_share)
        return density


class Bottleneck(nn.Module):
    """x + W_up GELU(W_down x), zero at first: the adapter of Houlsby et al. 2019, arXiv:1902.00751, sec. 2.1."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


def add_bottlenecks(model: EnhancedTransformerDecoderOnly3D, hidden: int) -> None:
    """Freeze a base, and put a `Bottleneck` behind the attention and behind the MLP of each block."""
    model.requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, DecoderBlock)
        width = block.attention.feature_dim
        block.attention.out = nn.Sequential(block.attention.out, Bottleneck(width, hidden))  # type: ignore[assignment]
        block.linear2 = nn.Sequential(block.linear2, Bottleneck(width, hidden))  # type: ignore[assignment]


def train_only(model: nn.Module, name_ends_with: tuple[str, ...] = (), name_starts_with: tuple[str, ...] = ()) -> None:
    """Freeze all other parameters. ("bias",) is BitFit (Ben Zaken et al. 2022, arXiv:2106.10199).

    Raises:
        ValueError: if no parameter is left.
    """
    trained = {n: n.endswith(name_ends_with) or n.startswith(name_starts_with) for n, _ in model.named_parameters()}
    if not any(trained.values()):
        raise ValueError(f"no parameter ends with {name_ends_with} or starts with {name_starts_with}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])


def separate_views(model: EnhancedTransformerDecoderOnly3D) -> None:
    """Let each view attend to itself only: cross-view attention with the same layers, in which no views meet."""
    if model.cross_view is None:
        raise ValueError("this model has no cross-view attention; build it with use_cross_view=True")
    for layer in model.cross_view.values():
        layer.n_views = 1  # type: ignore[assignment]
