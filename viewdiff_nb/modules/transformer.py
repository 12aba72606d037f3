"""The frontaliser: from a side-view embedding, its head pose and keypoints to the frontal embedding."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb.faces.geometry import KEYPOINT_NAMES, normalise_keypoints, to_face_frame
from viewdiff_nb.modules.attention import CrossViewAttention, PoseConditionedLoRAAttention, encode_pose
from viewdiff_nb.modules.lora import LoRALinearLayer, check_shape
from viewdiff_nb.modules.projection import FaceVolume, LightweightFaceProjectionLayer

MEMORY_TOKENS = ("pose", *KEYPOINT_NAMES)
LORA_TARGETS = ("attention", "feed_forward")
ROLES = ("base", "lora", "projection", "cross_view")


class DecoderBlock(nn.Module):
    """Pre-norm transformer block: feature tokens attend to themselves and to the memory, then an MLP."""

    def __init__(
        self, attention: PoseConditionedLoRAAttention, linear1: nn.Linear, linear2: nn.Linear, dropout: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(attention.feature_dim), nn.LayerNorm(attention.feature_dim)
        self.attention, self.linear1, self.linear2, self.dropout = attention, linear1, linear2, dropout

    def forward(
        self, x: Tensor, memory: Tensor, pose: Tensor, return_attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x: (B, T, D), memory: (B, M, D), pose: (B, P); returns (B, T, D) and the weights or None."""
        attended = self.attention(self.norm1(x), pose, memory, return_attention)
        attended, weights = attended if return_attention else (attended, None)
        x = x + F.dropout(attended, self.dropout, self.training)
        hidden = F.dropout(F.gelu(self.linear1(self.norm2(x))), self.dropout, self.training)
        return x + F.dropout(self.linear2(hidden), self.dropout, self.training), weights


class EnhancedTransformerDecoderOnly3D(nn.Module):
    """Predicts the residual r with frontal ~ src + r.

    The side-view embedding is one feature token. Its memory are six tokens: the head pose and the five 3-D keypoints,
    as the camera sees them and in the face's own frame. The prediction scales with the length of src.

    With use_lora_attention=False and use_projection_layer=False it is the base model. An enhanced model has the same
    base parameters under the same names (`load_base`), and at step 0 computes exactly what its base computes.

    Args:
        d_model: width of the tokens.
        nhead, num_layers, dim_feedforward, dropout: attention heads, decoder blocks, width and dropout of their MLPs.
        use_lora_attention: adapt by LoRA what lora_targets names; its base weights are frozen.
        use_projection_layer: add the 3-D face projection of the input features.
        use_cross_view: let the n_views views of a person, neighbours in the batch, attend to each other.
        n_views: views per person.
        cross_view_after: numbers of blocks after which they do, with one layer for each; 0 is before the first block.
        rank, lora_alpha, rslora, lora_dropout: see `LoRALinearLayer`.
        lora_targets: of "attention" (conditioned on the pose) and "feed_forward".
        voxel_resolution: of the projection layer.
        pose_dim: number of angles in `pose`.
        feature_dim: width of the embeddings; d_model if None.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_layers: int = 4,
        dim_feedforward: int = 1280,
        dropout: float = 0.1,
        use_lora_attention: bool = True,
        use_projection_layer: bool = True,
        use_cross_view: bool = False,
        n_views: int = 5,
        rank: int = 4,
        lora_alpha: float = 1.0,
        pose_dim: int = 3,
        voxel_resolution: int = 16,
        feature_dim: int | None = None,
        lora_targets: tuple[str, ...] = ("attention",),
        rslora: bool = False,
        lora_dropout: float = 0.0,
        cross_view_after: tuple[int, ...] = (0,),
    ) -> None:
        super().__init__()
        if unknown := set(lora_targets) - set(LORA_TARGETS):
            raise ValueError(f"lora_targets must be among {LORA_TARGETS}, got {sorted(unknown)}")
        self.feature_dim, self.n_views, self.use_cross_view = feature_dim or d_model, n_views, use_cross_view
        adapted = lora_targets if use_lora_attention else ()
        attention_rank = rank if "attention" in adapted else 0

        def linear(inputs: int, outputs: int) -> nn.Linear:
            if "feed_forward" not in adapted:
                return nn.Linear(inputs, outputs)
            return LoRALinearLayer(inputs, outputs, rank, lora_alpha, rslora=rslora, dropout=lora_dropout)

        def block() -> DecoderBlock:
            attention = PoseConditionedLoRAAttention(
                d_model, pose_dim, nhead, attention_rank, lora_alpha, rslora=rslora, dropout=lora_dropout
            )
            return DecoderBlock(attention, linear(d_model, dim_feedforward), linear(dim_feedforward, d_model), dropout)

        self.input = nn.Linear(self.feature_dim, d_model)
        self.pose_encoder = _encoder(6, d_model)
        self.keypoint_encoder = _encoder(6, d_model)
        self.keypoint_identity = nn.Parameter(torch.randn(len(KEYPOINT_NAMES), d_model) * 0.02)
        self.blocks = nn.ModuleList(block() for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, self.feature_dim)
        nn.init.zeros_(self.output.weight)  # an untrained model predicts its input
        nn.init.zeros_(self.output.bias)

        self.projection = None
        if use_projection_layer:
            self.projection = LightweightFaceProjectionLayer(d_model, len(KEYPOINT_NAMES), voxel_resolution)
        self.cross_view = None
        if use_cross_view:
            if not cross_view_after or not set(cross_view_after) <= set(range(num_layers + 1)):
                raise ValueError(f"cross_view_after must be among 0..{num_layers}, got {cross_view_after}")
            layers = {str(i): CrossViewAttention(d_model, nhead, n_views, zero_init=True) for i in cross_view_after}
            self.cross_view = nn.ModuleDict(layers)

    def forward(
        self,
        src: Tensor,
        angles: Tensor,
        keypoints_3d: Tensor,
        pose: Tensor | None = None,
        return_residual: bool = True,
        return_attention: bool = False,
        view_mask: Tensor | None = None,
        pose_error: Tensor | None = None,
        target_pose: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            src: (B, feature_dim) side-view embeddings, of any length.
            angles: (B, 3) pitch, yaw, roll of the head in radians.
            keypoints_3d: (B, 5, 3) in `KEYPOINT_NAMES` order, any unit.
            pose: (B, pose_dim) angles that condition the LoRA attention; the head pose if None.
            return_residual: return r, else src + r.
            return_attention: also return the weights, (B, num_layers, heads, 1, 7) over the feature token itself and
                `MEMORY_TOKENS`.
            view_mask: (B,) bool with use_cross_view, False for views that only fill up a group of n_views.
            pose_error: (B, 3) standard deviations of angles in radians, for the pose's memory token; None: exact.
            target_pose: (B, 3) radians to render the projection at; None for frontal, which `training` trains.

        Returns:
            (B, feature_dim).

        Raises:
            ValueError: for shapes that do not fit, or a target_pose without a projection layer, which turns to it.
        """
        if target_pose is not None and self.projection is None:
            raise ValueError("target_pose needs the projection layer; build the model with use_projection_layer=True")
        h, length = self._embed(src, angles, keypoints_3d)
        memory = self._encode_memory(angles, keypoints_3d, pose_error)
        if self.projection is not None:
            h = h + self.projection(h, keypoints_3d, target_pose, angles)
        x = self._attend_across_views(h[:, None] + memory[:, :1], 0, view_mask)
        weights = []
        for i, block in enumerate(self.blocks, 1):
            x, attention = block(x, memory, angles if pose is None else pose, return_attention)
            x = self._attend_across_views(x, i, view_mask)
            weights.append(attention)
        residual = self.output(self.norm(x[:, 0])).to(src.dtype) * length
        result = residual if return_residual else src + residual
        return (result, torch.stack(weights, 1)) if return_attention else result

    def face_volume(
        self,
        src: Tensor,
        angles: Tensor,
        keypoints_3d: Tensor,
        target_pose: Tensor | None = None,
        resolution: int | None = None,
    ) -> FaceVolume:
        """What the projection layer computes on the way, for plots; a ValueError if there is none.

        target_pose: (B, 3) radians to render at; None for frontal, as the model does. resolution: of the grid, if
        another than the model's; no weight depends on it.
        """
        if self.projection is None:
            raise ValueError("this model has no projection layer; build it with use_projection_layer=True")
        layer = copy.copy(self.projection)  # the same weights
        layer.voxel_resolution = resolution or layer.voxel_resolution
        h, _ = self._embed(src, angles, keypoints_3d)
        return layer(h, keypoints_3d, target_pose, angles, return_volume=True)[1]

    def _embed(self, src: Tensor, angles: Tensor, keypoints_3d: Tensor) -> tuple[Tensor, Tensor]:
        """Check the inputs; return the feature token (B, d_model), and the embeddings' lengths (B, 1)."""
        batch = src.shape[0]  # not len(), which would fix the batch size of an exported model
        check_shape("src", src, batch, self.feature_dim)
        check_shape("angles", angles, batch, 3)
        check_shape("keypoints_3d", keypoints_3d, batch, len(KEYPOINT_NAMES), 3)
        length = src.norm(dim=-1, keepdim=True)
        unit = src / length.clamp_min(1e-12)
        return self.input(unit * self.feature_dim**0.5), length  # entries of order 1

    def _encode_memory(self, angles: Tensor, keypoints_3d: Tensor, pose_error: Tensor | None = None) -> Tensor:
        """The tokens that features attend to, in `MEMORY_TOKENS` order: (B, 6, d_model)."""
        seen = normalise_keypoints(keypoints_3d)
        both = torch.cat((seen, to_face_frame(seen, angles)), -1)  # (B, 5, 6)
        points = self.keypoint_encoder(both) + self.keypoint_identity
        return torch.cat((self.pose_encoder(encode_pose(angles, pose_error))[:, None], points), 1)

    def _attend_across_views(self, x: Tensor, blocks_done: int, view_mask: Tensor | None) -> Tensor:
        if self.cross_view is None or str(blocks_done) not in self.cross_view:
            return x
        return self.cross_view[str(blocks_done)](x, view_mask)

    def load_base(self, state: dict[str, Tensor]) -> None:
        """Load the state dict of a base model, or of one that was adapted already; what it lacks stays as initialised.

        Raises:
            ValueError: if it lacks a base parameter, or holds one that is unknown or of another size.
        """
        mine = self.state_dict()
        base = {name for name, role in self.parameter_roles().items() if role == "base"}
        missing, foreign = sorted(base - set(state)), sorted(set(state) - set(mine))
        if missing or foreign:
            problem = f"{len(missing)} parameters missing {missing[:3]}, {len(foreign)} unknown {foreign[:3]}"
            raise ValueError(f"not this model's base: {problem}")
        for name in sorted(state):
            found, wanted = tuple(state[name].shape), tuple(mine[name].shape)
            if found != wanted:
                raise ValueError(f"the base was built with other sizes: {name} is {found} instead of {wanted}")
        self.load_state_dict(state, strict=False)

    def parameter_roles(self) -> dict[str, str]:
        """The role of every parameter by name: one of `ROLES`."""
        roles = {name: name.split(".")[0] for name, _ in self.named_parameters()}
        for name, module in roles.items():
            if name.endswith((".lora_down", ".lora_up")):
                roles[name] = "lora"
            elif module not in ROLES:
                roles[name] = "base"
        return roles

    def freeze_base(self) -> None:
        """Train only what the enhancement adds: LoRA, projection, cross-view attention."""
        for name, role in self.parameter_roles().items():
            if role == "base":
                self.get_parameter(name).requires_grad_(False)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by role; roles without any are left out."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, role in self.parameter_roles().items():
            if (parameter := self.get_parameter(name)).requires_grad:
                groups.setdefault(role, []).append(parameter)
        return groups


def _encoder(inputs: int, outputs: int, hidden: int = 128) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def fuse_views(predicted: Tensor, n_views: int) -> Tensor:
    """Mean of the unit predictions of each group of n_views: (G n_views, D) to (G, D)."""
    return F.normalize(F.normalize(predicted, dim=1).unflatten(0, (-1, n_views)).mean(1), dim=1)
