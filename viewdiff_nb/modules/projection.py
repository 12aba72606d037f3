"""Light 2D -> 3D -> 2D face projection: lift features to voxels around the keypoints, turn, render.

A volume is (B, C, R, R, R) over (depth, y, x): depth runs away from the camera, y down, x to the image's right, each in
[-1, 1] with voxel centres at (2 i + 1) / R - 1. Points are (x, y, z) with z toward the camera, so z = -depth. Rays are
parallel to the depth axis. Rendering: Max 1995 (IEEE TVCG 1(2), eq. 5-10), as in NeRF (arXiv:2003.08934, eq. 3).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from viewdiff_nb.faces.geometry import face_rotation, normalise_keypoints, rotation_matrix
from viewdiff_nb.modules.lora import check_shape

CHANNELS = 16  # compressed channels of the features, as in the paper
HIDDEN = 8  # channels of the 3-D CNN
PATCHES = 4  # each output pixel sees as many patches of the rendering, down and across
KEYPOINT_REACH = 0.5  # mean distance of the keypoints from the grid's centre; the grid ends at 1
KEYPOINT_WIDTH = 0.25  # standard deviation of a keypoint's Gaussian, in the same units
FINE = 16  # grids up to this resolution render a batch at once; finer ones in parts of as many voxels
VOXEL_BUDGET = 128 * FINE**3  # voxels that are in memory at once, however large the batch is


@dataclass(frozen=True)
class FaceVolume:
    """What the layer computes on the way, for plots. All in the rendered pose but occupancy."""

    keypoints: Tensor  # (B, K, 3) in grid coordinates
    occupancy: Tensor  # (B, K, R, R, R) Gaussians around the keypoints in the face's own frame
    shares: Tensor  # (B, K, R, R, R) how much of each keypoint's features a voxel holds
    features: Tensor  # (B, C, R, R, R) the voxels' features, sum_k shares_k f_k
    density: Tensor  # (B, 1, R, R, R) per unit of length
    weights: Tensor  # (B, 1, R, R, R) weight of each voxel in its ray
    image: Tensor  # (B, C, R, R) the rendering


class LightweightFaceProjectionLayer(nn.Module):
    """Renders face features at a target pose through a small voxel grid.

    After ViewDiff's projection layer (arXiv:2403.01807, sec. 3.2), for one face instead of a scene:

    1. compress the features to a few channels f_k and a gain g_k for each keypoint;
    2. undo the source pose, and put a Gaussian w_k around each keypoint in the face's own frame;
    3. refine g_k w_k with a small 3-D CNN to a density and to shares u_k (`scene`); the
       feature of a voxel is f(v) = sum_k u_k(v) f_k;
    4. turn the grid to the target pose and render it along the depth axis;
    5. expand the picture to feature_dim.

    Rendering is linear, sum_i w_i sum_k u_ik f_k = sum_k f_k (sum_i w_i u_ik): the grid holds K shares, not C channels.

    Args:
        feature_dim: channels C of the features.
        num_keypoints: K.
        voxel_resolution: R; the grid has R^3 voxels.
        zero_init: start with a zero expansion, so that the layer at first changes nothing.
    """

    in_turns = True  # False: render a batch at once whatever it takes, where memory is plenty

    def __init__(
        self, feature_dim: int, num_keypoints: int = 5, voxel_resolution: int = 16, *, zero_init: bool = True
    ) -> None:
        super().__init__()
        if voxel_resolution < 4:
            raise ValueError(f"voxel_resolution must be at least 4, got {voxel_resolution}")
        self.feature_dim, self.num_keypoints, self.voxel_resolution = feature_dim, num_keypoints, voxel_resolution
        self.compress = nn.Linear(feature_dim, num_keypoints * (CHANNELS + 1))
        self.refine = nn.Sequential(
            nn.Conv3d(num_keypoints, HIDDEN, 3, padding=1),
            nn.GELU(),
            nn.Conv3d(HIDDEN, 1 + num_keypoints, 3, padding=1),
        )
        self.refine.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # missing in torch's stubs
        self.background = nn.Parameter(torch.zeros(CHANNELS))
        self.expand = nn.Linear(CHANNELS * PATCHES**2, feature_dim)
        if zero_init:
            nn.init.zeros_(self.expand.weight)
            nn.init.zeros_(self.expand.bias)

    def forward(
        self,
        features: Tensor,
        keypoints_3d: Tensor,
        target_pose: Tensor | None = None,
        source_pose: Tensor | None = None,
        return_volume: bool = False,
    ) -> Tensor | tuple[Tensor, FaceVolume]:
        """
        Args:
            features: (B, C), (B, C, 1, 1), or a map (B, C, H, W) over the square around the face.
            keypoints_3d: (B, K, 3) as the camera sees them, x right, y down, z toward it; any unit.
            target_pose: (B, 3) pitch, yaw, roll in radians to render at; None for frontal.
            source_pose: (B, 3) pose of the face in keypoints_3d; None to read it off the keypoints.
            return_volume: also return the `FaceVolume`.

        Returns:
            the rendered features, shaped as the features given.
        """
        batch, width = features.shape[0], self.feature_dim
        if features.dim() not in (2, 4) or features.shape[1] != width:
            raise ValueError(f"features must be (B, {width}) or (B, {width}, H, W), got {tuple(features.shape)}")
        check_shape("keypoints_3d", keypoints_3d, batch, self.num_keypoints, 3)
        for name, pose in (("target_pose", target_pose), ("source_pose", source_pose)):
            if pose is not None:
                check_shape(f"{name} (pitch, yaw, roll)", pose, batch, 3)

        seen = normalise_keypoints(keypoints_3d) * KEYPOINT_REACH
        rotation = face_rotation(seen) if source_pose is None else rotation_matrix(source_pose)
        keypoints = seen @ rotation  # R^T k: in the face's own frame
        turn = None if target_pose is None else rotation_matrix(target_pose)
        compressed = self._keypoint_features(features, seen)
        keypoint_features, gains = compressed[..., :-1], F.softplus(compressed[..., -1])

        if return_volume:
            occupancy = gaussian_occupancy(keypoints, self.voxel_resolution, KEYPOINT_WIDTH)
            splats, shares, density, weights = self._volumes(keypoints, gains, turn)
        else:
            splats = self._render_in_turns(keypoints, gains, turn)
        palette = torch.cat((keypoint_features, self.background.expand(batch, 1, -1)), 1)  # (B, K + 1, C)
        image = torch.einsum("bkyx,bkc->bcyx", splats, palette)
        output = self._to_features(image, features.shape[2:]).reshape(features.shape)
        if not return_volume:
            return output
        if turn is not None:
            keypoints = keypoints @ turn.transpose(1, 2)
        voxels = lift(keypoint_features, shares)
        return output, FaceVolume(keypoints, occupancy, shares, voxels, density, weights, image)

    def _volumes(self, keypoints: Tensor, gains: Tensor, turn: Tensor | None) -> tuple[Tensor, ...]:
        """All that happens in three dimensions, turned by (B, 3, 3) from keypoints (B, K, 3) in the face's own frame.

        Returns how much of each keypoint's features, and of the background, a ray sees, (B, K + 1, R, R); then shares,
        density and weights as in `FaceVolume`.
        """
        scene = self.scene(keypoints, gains)
        density, shares = self.density(scene[:, :1], keypoints), scene[:, 1:]
        if turn is not None:  # turn density, not its logit: beyond the grid there is nothing
            turned = rotate(torch.cat((density, shares), 1), turn.to(scene.dtype))
            density, shares = turned[:, :1], turned[:, 1:]
        weights = ray_weights(density, 2 / self.voxel_resolution)
        return torch.cat((composite(shares, weights), 1 - weights.sum(2)), 1), shares, density, weights

    def scene(self, keypoints: Tensor, gains: Tensor) -> Tensor:
        """What `refine` makes of gains (B, K) times the occupancy of keypoints (B, K, 3): (B, 1 + K, R, R, R)."""
        first, between, last = self.refine
        hidden = between(splat_and_convolve(keypoints, gains, first, self.voxel_resolution))
        in_planes = hidden.is_cuda and self.voxel_resolution >= FINE
        return convolve_in_planes(hidden, last) if in_planes else last(hidden)

    def density(self, logit: Tensor, keypoints: Tensor) -> Tensor:
        """Per unit of length, (B, 1, R, R, R), of what the CNN says, as large, and keypoints (B, K, 3)."""
        return F.softplus(logit - 1)

    def _render(self, keypoints: Tensor, gains: Tensor, turn: Tensor | None) -> Tensor:
        return self._volumes(keypoints, gains, turn)[0]

    def _render_in_turns(self, keypoints: Tensor, gains: Tensor, turn: Tensor | None) -> Tensor:
        """`_render` with at most `VOXEL_BUDGET` voxels in memory, nor more than the batch has at resolution `FINE`.

        Parts of a batch are rendered again in the backward pass instead of keeping their volumes.
        """
        batch = keypoints.shape[0]
        size = max(1, min(VOXEL_BUDGET, batch * FINE**3) // self.voxel_resolution**3)
        if not self.in_turns or torch.compiler.is_compiling() or batch <= size:
            return self._render(keypoints, gains, turn)
        turns = [None] * -(-batch // size) if turn is None else turn.split(size)
        parts = zip(keypoints.split(size), gains.split(size), turns, strict=True)
        return torch.cat([checkpoint(self._render, *p, use_reentrant=False, preserve_rng_state=False) for p in parts])

    def _keypoint_features(self, features: Tensor, seen: Tensor) -> Tensor:
        """Compressed features and gain of each keypoint, (B, K, channels + 1), from where it lies in the map."""
        per_keypoint = (self.num_keypoints, -1)
        if features.dim() == 2 or features.shape[2:] == (1, 1):
            return self.compress(features.flatten(1)).unflatten(1, per_keypoint)
        at = F.grid_sample(features, seen[:, :, None, :2].to(features.dtype), align_corners=False)  # (B, C, K, 1)
        compressed = torch.einsum("bdk,kcd->bkc", at.squeeze(3), self.compress.weight.unflatten(0, per_keypoint))
        return compressed + self.compress.bias.unflatten(0, per_keypoint)

    def _to_features(self, image: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
        """(B, channels, R, R) to (B, feature_dim, H, W), each pixel from its patches; size is (H, W), or () for one."""
        height, width = (n * PATCHES for n in size or (1, 1))
        patches = F.adaptive_avg_pool2d(image, (height, width))
        split = patches.unflatten(3, (-1, PATCHES)).unflatten(2, (height // PATCHES, PATCHES))
        stacked = split.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, H, W, channels * patches); of no face, too
        return self.expand(stacked).movedim(-1, 1)


def axis_centres(resolution: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Centres of the voxels along one axis of [-1, 1]: (R,).

    >>> axis_centres(4)
    tensor([-0.7500, -0.2500,  0.2500,  0.7500])
    """
    return (2 * torch.arange(resolution, device=device, dtype=dtype or torch.get_default_dtype()) + 1) / resolution - 1


def voxel_centres(resolution: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Points (x, y, z) of all voxel centres: (R, R, R, 3) over (depth, y, x).

    >>> voxel_centres(2)[0, 0, 1]            # nearest layer, top, right
    tensor([ 0.5000, -0.5000,  0.5000])
    """
    c = axis_centres(resolution, device=device, dtype=dtype)
    depth, y, x = torch.meshgrid(c, c, c, indexing="ij")
    return torch.stack((x, y, -depth), -1)


def gaussian_occupancy(keypoints: Tensor, resolution: int, width: float) -> Tensor:
    """w_k(v) = exp(-|v - p_k|^2 / (2 width^2)) around keypoints (B, K, 3) in grid coordinates: (B, K, R, R, R).

    A product over the axes: 3 R exponentials, not R^3.

    >>> w = gaussian_occupancy(torch.tensor([[[0.5, -0.5, 0.5]]]), 2, width=1.0)
    >>> w[0, 0, 0, 0, 1].item()              # a keypoint in the voxel's centre
    1.0
    >>> round(w[0, 0, 0, 0, 0].item(), 4)    # one unit to the left: exp(-1/2)
    0.6065
    """
    along_depth, along_y, along_x = _along_axes(keypoints, resolution, width)
    return along_depth[..., :, None, None] * along_y[..., None, :, None] * along_x[..., None, None, :]


def _along_axes(keypoints: Tensor, resolution: int, width: float) -> list[Tensor]:
    """The factors of `gaussian_occupancy` along depth, y and x, (B, K, R) each."""
    c = axis_centres(resolution, device=keypoints.device, dtype=keypoints.dtype)
    x, y, z = keypoints.unsqueeze(-1).unbind(-2)  # (B, K, 1) each
    return [torch.exp(-((c - p) ** 2) / (2 * width**2)) for p in (-z, y, x)]


def splat_and_convolve(
    keypoints: Tensor, gains: Tensor, convolution: Any, resolution: int, width: float = KEYPOINT_WIDTH
) -> Tensor:
    """A convolution of 3^3 taps, K to O channels, of gains (B, K) times `gaussian_occupancy`: (B, O, R, R, R).

    The Gaussians are products over the axes, so they need not be made: taps along x are summed first, for each keypoint
    and each tap along depth and y, and then one matrix product of 9 K terms gives every voxel, instead of 27 K.
    """
    gains.new_empty(gains.shape[0], resolution**2, resolution * convolution.bias.shape[0])  # no room? before any work
    padded = [F.pad(factor, (1, 1)) for factor in _along_axes(keypoints, resolution, width)]
    along_depth, along_y, along_x = (torch.stack([a[..., i : i + resolution] for i in range(3)], -1) for a in padded)
    rows = torch.einsum("bkzi,bkyj->bzykij", along_depth, along_y).flatten(3).flatten(1, 2)  # (B, R R, 9 K)
    lines = torch.einsum("okijt,bkxt->bkijxo", convolution.weight, along_x * gains[..., None, None])
    found = rows @ lines.flatten(4).flatten(1, 3) + convolution.bias.repeat(resolution)  # (B, R R, R O)
    return found.unflatten(2, (resolution, -1)).unflatten(1, (resolution, -1)).permute(0, 4, 1, 2, 3)


def convolve_in_planes(volume: Tensor, convolution: Any) -> Tensor:
    """A convolution of 3^3 taps that keeps the size, in two dimensions: (B, C, R, R, R) to (B, O, R, R, R).

    x and channels are one axis, over which a tap is a band of a matrix. That is R / 3 times the multiplications, but in
    products that fill a GPU, which is slow with few channels.
    """
    resolution = volume.shape[-1]
    ones = convolution.weight.new_ones(resolution, resolution)
    bands = torch.stack([ones.triu(shift).tril(shift) for shift in (-1, 0, 1)])  # (3, x to, x from)
    weight = torch.einsum("oczyt,tij->iojczy", convolution.weight, bands).flatten(2, 3).flatten(0, 1)
    planes = volume.permute(0, 2, 3, 4, 1).flatten(3).permute(0, 3, 1, 2)  # (B, R C, R, R), as it lies in memory
    weight = weight.contiguous(memory_format=torch.channels_last)
    found = F.conv2d(planes, weight, convolution.bias.repeat(resolution), padding=1)
    return found.unflatten(1, (resolution, -1)).permute(0, 2, 3, 4, 1)


def lift(features: Tensor, occupancy: Tensor) -> Tensor:
    """f(v) = sum_k w_k(v) f_k of features (B, K, C) and occupancy (B, K, R, R, R): (B, C, R, R, R).

    >>> lift(torch.tensor([[[2.0], [10.0]]]), torch.tensor([0.5, 0.1]).view(1, 2, 1, 1, 1)).item()
    2.0
    """
    return (features.transpose(1, 2) @ occupancy.flatten(2)).unflatten(2, occupancy.shape[2:])


def rotate(volume: Tensor, rotation: Tensor) -> Tensor:
    """Turn the scene: what was at point p is found at R p afterwards, f'(v) = f(R^T v), trilinear, zero outside.

    volume: (B, C, R, R, R), rotation: (B, 3, 3) acting on (x, y, z); returns (B, C, R, R, R).

    >>> volume = torch.zeros(1, 1, 2, 2, 2)
    >>> volume[0, 0, 0, 0, 1] = 1.0                                   # near, top, right
    >>> clockwise = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])  # roll by +90 degrees
    >>> rotate(volume, clockwise).round()[0, 0, 0, 1, 1].item()       # near, bottom, right
    1.0
    """
    flip = rotation.new_tensor([1.0, 1.0, -1.0])  # from z toward the camera to depth away from it
    inverse = rotation.transpose(1, 2) * flip[:, None] * flip
    without_translation = F.pad(inverse, (0, 1))  # (B, 3, 4)
    grid = F.affine_grid(without_translation, list(volume.shape), align_corners=False)
    return F.grid_sample(volume, grid.to(volume.dtype), align_corners=False)


def opacity(density: Tensor, step: float) -> Tensor:
    """alpha = 1 - exp(-sigma * step), the share of light a slab of this density stops.

    >>> opacity(torch.tensor([0.0, 0.6931, 1e9]), 1.0).round(decimals=2)
    tensor([0.0000, 0.5000, 1.0000])
    """
    return -torch.expm1(-density * step)


def transmittance(density: Tensor, step: float) -> Tensor:
    """T_i = exp(-sum_{j<i} sigma_j * step) along dimension 2, the light left in front of slab i.

    >>> transmittance(torch.tensor([1.0, 1.0, 1.0]).view(1, 1, 3, 1, 1), 0.5).flatten()  # exp(-t), t = 0, .5, 1
    tensor([1.0000, 0.6065, 0.3679])
    """
    in_front = (density[:, :, :-1] * step).cumsum(2)  # not cumsum minus own: that cancels behind an opaque slab
    return torch.exp(-F.pad(in_front, (0, 0, 0, 0, 1, 0)))


def ray_weights(density: Tensor, step: float) -> Tensor:
    """w_i = T_i alpha_i, how much slab i adds to its ray, (B, 1, R, R, R) as the density; they sum to 1 - T_end <= 1.

    density: not negative, per unit of length; step: thickness of a slab (2 / R for a whole grid).

    >>> ray_weights(torch.tensor([0.6931, 0.6931, 1e9]).view(1, 1, 3, 1, 1), 1.0).flatten().round(decimals=2)
    tensor([0.5000, 0.2500, 0.2500])
    """
    return transmittance(density, step) * opacity(density, step)


def composite(features: Tensor, weights: Tensor) -> Tensor:
    """I = sum_i w_i f_i along dimension 2, front to back: (B, C, R, R, R) and (B, 1, R, R, R) to (B, C, R, R).

    >>> f = torch.tensor([8.0, 4.0]).view(1, 1, 2, 1, 1)
    >>> w = torch.tensor([0.5, 0.25]).view(1, 1, 2, 1, 1)
    >>> composite(f, w).item()                                        # 4 + 1
    5.0
    """
    return (weights * features).sum(2)
