"""Voxel geometry of the projection layer: one pure function per equation.

A volume is (B, C, R, R, R) with axes (depth, y, x): depth runs away from the camera, y down, x to the
image's right, each over [-1, 1] with voxel centres at (2 i + 1) / R - 1. Points are (x, y, z) with z
toward the camera as everywhere in the kit, so z = -depth. Rays are parallel to the depth axis.

Volume rendering follows Max 1995 (IEEE TVCG 1(2), eq. 5-10) as NeRF states it (arXiv:2003.08934, eq. 3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def axis_centres(resolution: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Centres of the voxels along one axis of [-1, 1]: (R,).

    >>> axis_centres(4)
    tensor([-0.7500, -0.2500,  0.2500,  0.7500])
    """
    return (2 * torch.arange(resolution, device=device, dtype=dtype or torch.get_default_dtype()) + 1) / resolution - 1


def voxel_centres(resolution: int, **options) -> Tensor:
    """Points (x, y, z) of all voxel centres: (R, R, R, 3) over (depth, y, x).

    >>> voxel_centres(2)[0, 0, 1]            # nearest layer, top, right
    tensor([ 0.5000, -0.5000,  0.5000])
    """
    c = axis_centres(resolution, **options)
    depth, y, x = torch.meshgrid(c, c, c, indexing="ij")
    return torch.stack((x, y, -depth), -1)


def gaussian_occupancy(keypoints: Tensor, resolution: int, width: float) -> Tensor:
    """w_k(v) = exp(-|v - p_k|^2 / (2 width^2)), as a product over the axes: 3 R exponentials, not R^3.

    Args:
        keypoints: (B, K, 3) points p in grid coordinates.
        resolution: R.
        width: standard deviation in grid units (the grid is 2 wide).

    Returns:
        (B, K, R, R, R).

    >>> w = gaussian_occupancy(torch.tensor([[[0.5, -0.5, 0.5]]]), 2, width=1.0)
    >>> w[0, 0, 0, 0, 1].item()              # a keypoint in the voxel's centre
    1.0
    >>> round(w[0, 0, 0, 0, 0].item(), 4)    # one unit to the left: exp(-1/2)
    0.6065
    """
    c = axis_centres(resolution, device=keypoints.device, dtype=keypoints.dtype)
    x, y, z = keypoints.unsqueeze(-1).unbind(-2)  # (B, K, 1) each
    along_x, along_y, along_depth = (torch.exp(-((c - p) ** 2) / (2 * width**2)) for p in (x, y, -z))
    return along_depth[..., :, None, None] * along_y[..., None, :, None] * along_x[..., None, None, :]


def lift(features: Tensor, occupancy: Tensor) -> Tensor:
    """f(v) = sum_k w_k(v) f_k: every voxel takes the features of the keypoints near it.

    Args:
        features: (B, K, C), one feature per keypoint.
        occupancy: (B, K, R, R, R), see `gaussian_occupancy`.

    Returns:
        (B, C, R, R, R).

    >>> lift(torch.tensor([[[2.0], [10.0]]]), torch.tensor([0.5, 0.1]).view(1, 2, 1, 1, 1)).item()
    2.0
    """
    return (features.transpose(1, 2) @ occupancy.flatten(2)).unflatten(2, occupancy.shape[2:])


def rotate(volume: Tensor, rotation: Tensor) -> Tensor:
    """Turn the scene: what was at point p is found at R p afterwards, f'(v) = f(R^T v), trilinear.

    Outside of [-1, 1]^3 there is nothing (zero).

    Args:
        volume: (B, C, R, R, R).
        rotation: (B, 3, 3), acting on (x, y, z).

    Returns:
        (B, C, R, R, R).

    >>> volume = torch.zeros(1, 1, 2, 2, 2)
    >>> volume[0, 0, 0, 0, 1] = 1.0                                   # near, top, right
    >>> clockwise = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])  # roll by +90 degrees
    >>> rotate(volume, clockwise).round()[0, 0, 0, 1, 1].item()       # near, bottom, right
    1.0
    """
    flip = rotation.new_tensor([1.0, 1.0, -1.0])  # from z toward the camera to depth away from it
    inverse = rotation.transpose(1, 2) * flip[:, None] * flip
    theta = F.pad(inverse, (0, 1))  # (B, 3, 4) without a translation
    grid = F.affine_grid(theta, list(volume.shape), align_corners=False)
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
    """w_i = T_i alpha_i, how much slab i adds to its ray; they sum to 1 - T_end <= 1.

    Args:
        density: (B, 1, R, R, R), not negative, per unit of length.
        step: thickness of a slab (2 / R for a whole grid).

    Returns:
        (B, 1, R, R, R).

    >>> ray_weights(torch.tensor([0.6931, 0.6931, 1e9]).view(1, 1, 3, 1, 1), 1.0).flatten().round(decimals=2)
    tensor([0.5000, 0.2500, 0.2500])
    """
    return transmittance(density, step) * opacity(density, step)


def composite(features: Tensor, weights: Tensor, background: Tensor | None = None) -> Tensor:
    """I = sum_i w_i f_i + (1 - sum_i w_i) * background, along dimension 2 (front to back).

    Args:
        features: (B, C, R, R, R). weights: (B, 1, R, R, R), see `ray_weights`.
        background: (C,), zero if None.

    Returns:
        (B, C, R, R).

    >>> f = torch.tensor([8.0, 4.0]).view(1, 1, 2, 1, 1)
    >>> w = torch.tensor([0.5, 0.25]).view(1, 1, 2, 1, 1)
    >>> composite(f, w, background=torch.tensor([100.0])).item()      # 4 + 1 + a quarter of 100
    30.0
    """
    image = (weights * features).sum(2)
    if background is None:
        return image
    return image + (1 - weights.sum(2)) * background.view(1, -1, 1, 1)
