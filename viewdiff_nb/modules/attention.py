"""Attention: pose-conditioned LoRA attention, and attention across the views of one person."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import LoRALinearLayer


def encode_pose(pose: Tensor) -> Tensor:
    """[sin p, cos p]: an angle and the same angle one turn later are the same pose.

    Args:
        pose: (..., P) angles in radians.

    Returns:
        (..., 2 P).
    """
    return torch.cat((pose.sin(), pose.cos()), -1)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, D) to (B, heads, T, D / heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)), the weights that scaled_dot_product_attention uses but does not return.

    Args:
        q: (B, heads, Tq, d). k: (B, heads, Tk, d).
        mask: broadcastable to (B, heads, Tq, Tk); True where attention is allowed.

    Returns:
        (B, heads, Tq, Tk), each row summing to 1.
    """
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


def _check_heads(feature_dim: int, num_heads: int) -> None:
    if num_heads < 1 or feature_dim % num_heads:
        raise ValueError(f"feature_dim must be a multiple of num_heads, got {feature_dim} and {num_heads}")


class PoseConditionedLoRAAttention(nn.Module):
    """Multi-head attention with frozen projections, adapted by LoRA that sees the pose.

        q = W_q h + s B_q A_q [h; c],  k and v alike over [h; memory],  out = W_o a + s B_o A_o a,
        c = [sin p, cos p]

    as the attention processor of ViewDiff (arXiv:2403.01807, sec. 3.1) does. Feature tokens are the
    queries; they attend jointly to themselves and to `memory`. Without memory a single token can only
    attend to itself and its weight is 1 whatever q and k are: give memory tokens, or a sequence.

    The pose is the same for all tokens of a sample, so its part in k shifts all scores of a query
    equally and softmax removes it; the pose acts through q and v.

    Args:
        feature_dim: width D of the tokens, a multiple of num_heads.
        pose_dim: number P of pose angles; 0 for LoRA without a pose.
        num_heads: attention heads.
        rank: LoRA rank; 0 for plain trainable attention (the base model's).
        alpha, rslora, dropout: as in `LoRALinearLayer`.
    """

    def __init__(
        self,
        feature_dim: int,
        pose_dim: int = 3,
        num_heads: int = 8,
        rank: int = 4,
        alpha: float = 1.0,
        *,
        rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_heads(feature_dim, num_heads)
        self.feature_dim, self.num_heads, self.rank = feature_dim, num_heads, rank
        self.pose_dim = pose_dim if rank else 0

        def linear(pose_dim: int) -> nn.Linear:
            if rank == 0:
                return nn.Linear(feature_dim, feature_dim)
            options = {"pose_dim": pose_dim, "rslora": rslora, "dropout": dropout}
            return LoRALinearLayer(feature_dim, feature_dim, rank, alpha, **options)

        self.query, self.key, self.value = (linear(2 * self.pose_dim) for _ in range(3))
        self.out = linear(0)

    def forward(
        self,
        features: Tensor,
        pose: Tensor | None = None,
        memory: Tensor | None = None,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            features: (B, D), one token, or (B, T, D).
            pose: (B, P) angles in radians; may be None if pose_dim is 0 or the adapters are merged.
            memory: (B, M, D) further tokens to attend to.
            return_attention: also return the weights.

        Returns:
            output of the shape of features, and if asked the weights (B, heads, T, T + M).
        """
        h = features[:, None] if features.dim() == 2 else features
        if h.dim() != 3 or h.shape[-1] != self.feature_dim:
            raise ValueError(f"features must be (B, {self.feature_dim}) or (B, T, {self.feature_dim}), "
                             f"got {tuple(features.shape)}")  # fmt: skip
        q, k, v = (self._project(layer, h, pose) for layer in (self.query, self.key, self.value))
        if memory is not None:  # projected apart from h: memory often needs no gradient, which spares its backward
            k = torch.cat((k, self._project(self.key, memory, pose)), 1)
            v = torch.cat((v, self._project(self.value, memory, pose)), 1)
        q, k, v = (split_heads(x, self.num_heads) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        output = self.out(attended).view_as(features)
        return (output, attention_weights(q, k)) if return_attention else output

    def _project(self, layer: nn.Linear, tokens: Tensor, pose: Tensor | None) -> Tensor:
        if not self.pose_dim or layer.is_merged:
            return layer(tokens)
        if pose is None or pose.shape != (len(tokens), self.pose_dim):
            got = "none" if pose is None else tuple(pose.shape)
            raise ValueError(f"pose must be ({len(tokens)}, {self.pose_dim}) angles in radians, got {got}")
        return layer(tokens, encode_pose(pose)[:, None])

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters (with rank 0: all of them)."""
        layers = (self.query, self.key, self.value, self.out)
        return [p for layer in layers for p in (layer.get_trainable_parameters() if self.rank else layer.parameters())]

    def merge(self, pose: Tensor | None = None) -> None:
        """Fold all four adapters into the frozen weights, exactly, for one pose (P,)."""
        code = encode_pose(pose) if self.pose_dim and pose is not None else None
        for layer in (self.query, self.key, self.value):
            layer.merge(code)
        self.out.merge()

    def unmerge(self) -> None:
        for layer in (self.query, self.key, self.value, self.out):
            layer.unmerge()


class CrossViewAttention(nn.Module):
    """Joint attention over all tokens of all views of one person, with a residual connection.

    The cross-frame attention of ViewDiff (arXiv:2403.01807, sec. 3.1): every token attends to every
    token of every view. No view has a position, so permuting the views permutes the outputs.

    Args:
        feature_dim: width D of the tokens, a multiple of num_heads.
        num_heads: attention heads.
        n_views: V, views per person; they lie next to each other in the batch.
        zero_init: start with a zero output projection, so that the layer at first changes nothing.
    """

    def __init__(self, feature_dim: int, num_heads: int = 8, n_views: int = 5, *, zero_init: bool = False) -> None:
        super().__init__()
        _check_heads(feature_dim, num_heads)
        if n_views < 1:
            raise ValueError(f"n_views must be at least 1, got {n_views}")
        self.feature_dim, self.num_heads, self.n_views = feature_dim, num_heads, n_views
        self.norm = nn.LayerNorm(feature_dim)
        self.query, self.key, self.value = (nn.Linear(feature_dim, feature_dim) for _ in range(3))
        self.out = nn.Linear(feature_dim, feature_dim)
        if zero_init:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(
        self, features: Tensor, mask: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            features: (B V, D) or (B V, T, D), the V views of a person next to each other.
            mask: (B V,) bool, True for views that are there; nothing attends to a missing one, and
                its own output is its input.
            return_attention: also return the weights.

        Returns:
            output of the shape of features, and if asked the weights (B, heads, V T, V T).
        """
        views = check_views(len(features), self.n_views)
        tokens = features.reshape(views, -1, self.feature_dim)  # (B, V T, D)
        h = self.norm(tokens)
        q, k, v = (split_heads(layer(h), self.num_heads) for layer in (self.query, self.key, self.value))
        allowed = None
        if mask is not None:
            per_token = mask.view(views, self.n_views).repeat_interleave(tokens.shape[1] // self.n_views, 1)
            itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=mask.device)
            allowed = (per_token[:, None] | itself)[:, None]  # (B, 1, V T, V T); itself, so that no row is empty
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2)
        update = self.out(attended)
        if mask is not None:
            update = update * per_token[..., None]
        output = (tokens + update).view_as(features)
        return (output, attention_weights(q, k, allowed)) if return_attention else output


def check_views(batch: int, n_views: int) -> int:
    """The number of people in a batch of batch = people * n_views rows.

    Raises:
        ValueError: if the batch is no multiple of n_views.
    """
    if batch % n_views:
        below = batch // n_views * n_views
        advice = f"{below} or {below + n_views}" if below else f"{n_views}"
        raise ValueError(
            f"the batch size must be a multiple of n_views (批次大小必须是n_views的倍数): got {batch} with "
            f"n_views={n_views}; use {advice}, and drop_last=True in a DataLoader"
        )
    return batch // n_views
