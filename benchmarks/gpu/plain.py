"""The same model written plainly, to compare speed and memory with: no sharing, nothing fused, nothing absorbed.

It has the widths, tokens and parameters of `EnhancedTransformerDecoderOnly3D`, and computes what a first version would:
every token of the memory is projected to a key and a value, attention is two matrix products and a softmax, LoRA is two
more linear layers that read the token with the pose beside it, and the projection layer fills a dense grid with feature
channels, turns it with grid_sample and composites it slab by slab.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb.faces.geometry import normalise_keypoints, rotation_matrix, to_face_frame
from viewdiff_nb.modules.attention import encode_pose
from viewdiff_nb.modules.projection import voxel_centres


class PlainLoRA(nn.Module):
    """W x + b + (alpha / r) B A [x; pose], as three linear layers; W and b frozen."""

    def __init__(self, width: int, rank: int, pose_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width + pose_dim, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, pose: Tensor) -> Tensor:
        """x: (B, T, D), pose: (B, P); returns (B, T, D). alpha is r, so the scale is 1."""
        beside = pose[:, None].expand(-1, x.shape[1], -1)
        return self.linear(x) + self.up(self.down(torch.cat((x, beside), -1)))


class PlainBlock(nn.Module):
    """Pre-norm decoder block; rank 0 is the base's."""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float, rank: int, pose_dim: int) -> None:
        super().__init__()
        self.heads, self.rank = heads, rank
        make = (lambda: PlainLoRA(width, rank, pose_dim)) if rank else (lambda: nn.Linear(width, width))
        self.query, self.key, self.value, self.out = (make() for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward), nn.GELU(), nn.Dropout(dropout), nn.Linear(feed_forward, width)
        )
        self.dropout = nn.Dropout(dropout)
        if rank:
            for module in (self.norm1, self.norm2, self.feed_forward):
                module.requires_grad_(False)

    def forward(self, x: Tensor, memory: Tensor, pose: Tensor) -> Tensor:
        """x: (B, 1, D), memory: (B, M, D), pose: (B, P); returns (B, 1, D)."""
        h = self.norm1(x)
        context = torch.cat((h, memory), 1)

        def project(layer: nn.Module, tokens: Tensor) -> Tensor:
            y = layer(tokens, pose) if self.rank else layer(tokens)
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, d)

        q, k, v = project(self.query, h), project(self.key, context), project(self.value, context)
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        attended = (weights @ v).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(attended, pose) if self.rank else self.out(attended))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class PlainProjection(nn.Module):
    """Dense grid of C feature channels: lift, 3-D convolutions, turn to the front, composite slab by slab, expand."""

    def __init__(self, width: int, resolution: int, channels: int = 16, keypoints: int = 5) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        self.compress = nn.Linear(width, keypoints * channels)
        self.refine = nn.Sequential(
            nn.Conv3d(channels, channels, 3, padding=1), nn.GELU(), nn.Conv3d(channels, channels + 1, 3, padding=1)
        )
        self.expand = nn.Linear(channels * 16, width)

    def forward(self, features: Tensor, keypoints: Tensor, angles: Tensor) -> Tensor:
        """features: (B, D), keypoints: (B, K, 3) as seen, angles: (B, 3); returns (B, D)."""
        size = self.resolution
        points = voxel_centres(size, device=features.device)  # (R, R, R, 3)
        apart = points.flatten(0, 2)[None, :, None] - 0.5 * normalise_keypoints(keypoints)[:, None]  # (B, R^3, K, 3)
        near = torch.exp(-apart.square().sum(-1) / (2 * 0.25**2))  # (B, R^3, K)
        given = self.compress(features).unflatten(1, (keypoints.shape[1], self.channels))  # (B, K, C)
        grid = (near.to(given.dtype) @ given).transpose(1, 2).unflatten(2, (size, size, size))
        scene = self.refine(grid)
        flip = angles.new_ones(3)
        flip[2] = -1  # depth runs away from the camera
        turn = rotation_matrix(angles) * flip[:, None] * flip
        where = F.affine_grid(F.pad(turn, (0, 1)), list(scene.shape), align_corners=False)
        scene = F.grid_sample(scene, where.to(scene.dtype), align_corners=False)
        image, light = 0, 1
        for slab in scene.unbind(2):  # front to back, (B, C + 1, R, R) each
            alpha = 1 - torch.exp(-F.softplus(slab[:, :1] - 1) * 2 / size)
            image, light = image + light * alpha * slab[:, 1:], light * (1 - alpha)
        return self.expand(F.adaptive_avg_pool2d(image, 4).flatten(1))


class PlainTransformer(nn.Module):
    """Called as `EnhancedTransformerDecoderOnly3D` is. rank 0 is the base; voxel_resolution 0 has no projection."""

    def __init__(
        self,
        rank: int = 0,
        voxel_resolution: int = 0,
        dropout: float = 0.1,
        width: int = 512,
        heads: int = 8,
        layers: int = 4,
        feed_forward: int = 1280,
    ) -> None:
        super().__init__()
        self.input, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.pose_encoder, self.keypoint_encoder = (
            nn.Sequential(nn.Linear(6, 128), nn.GELU(), nn.Linear(128, width)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        if rank:
            self.requires_grad_(False)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, feed_forward, dropout, rank, 6) for _ in range(layers))
        self.projection = PlainProjection(width, voxel_resolution) if voxel_resolution else None

    def forward(self, src: Tensor, angles: Tensor, keypoints_3d: Tensor, pose: Tensor, return_residual: bool = True):
        """src: (B, D), angles: (B, 3), keypoints_3d: (B, 5, 3), pose: (B, 3); returns (B, D)."""
        length = src.norm(dim=1, keepdim=True)
        h = self.input(src / length * src.shape[1] ** 0.5)
        seen = normalise_keypoints(keypoints_3d)
        points = self.keypoint_encoder(torch.cat((seen, to_face_frame(seen, angles)), -1))
        memory = torch.cat((self.pose_encoder(encode_pose(angles))[:, None], points), 1)
        if self.projection is not None:
            h = h + self.projection(h, keypoints_3d, angles)
        x, code = h[:, None] + memory[:, :1], encode_pose(pose)
        for block in self.blocks:
            x = block(x, memory, code)
        residual = self.output(self.norm(x[:, 0])) * length
        return residual if return_residual else src + residual
