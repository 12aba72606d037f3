"""Attention: pose-conditioned LoRA attention, and attention across the views of one person."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb.modules.lora import LoRALinearLayer

FUSED_WIDTH = 256  # wider heads have no fast fused kernel on a GPU; few keys make plain products cheap


def encode_pose(pose: Tensor) -> Tensor:
    """[sin p, cos p]: an angle and the same angle one turn later are the same pose.

    Args:
        pose: (..., P) angles in radians.

    Returns:
        (..., 2 P).
    """
    return torch.cat((pose.sin(), pose.cos()), -1)


def pose_code(pose: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """`encode_pose` for all tokens of a sample: (B, 1, 2 P).

    Raises:
        ValueError: if the pose is not of that shape, (B, P).
    """
    if pose is None or pose.shape != shape:
        got = "none" if pose is None else tuple(pose.shape)
        raise ValueError(f"pose must be {shape} angles in radians, got {got}")
    return encode_pose(pose)[:, None]


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
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # in this order, so that float16 holds them
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


def weighted_tokens(q: Tensor, tokens: Tensor) -> Tensor:
    """softmax(q t^T) t: the tokens themselves are keys and values.

    Args:
        q: (B, Tq, D), scaled already. tokens: (B, T, D).

    Returns:
        (B, Tq, D).
    """
    if q.is_cuda and q.shape[-1] > FUSED_WIDTH:
        return (q @ tokens.transpose(1, 2)).softmax(-1) @ tokens
    return F.scaled_dot_product_attention(q[:, None], tokens[:, None], tokens[:, None], scale=1.0)[:, 0]


def _check_heads(feature_dim: int, num_heads: int) -> None:
    if num_heads < 1 or feature_dim % num_heads:
        raise ValueError(f"feature_dim must be a multiple of num_heads, got {feature_dim} and {num_heads}")


def _acting(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The matrix and bias that a layer's input meets."""
    return layer.acting if isinstance(layer, LoRALinearLayer) else (layer.weight, layer.bias)


def _has_hooks(layer: nn.Module) -> bool:
    """Whether calling a layer does more than its forward; what `nn.Module.__call__` asks itself."""
    own = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(own) or bool(nn.modules.module._has_any_global_hook())


class PoseConditionedLoRAAttention(nn.Module):
    """Multi-head attention with frozen projections, adapted by LoRA that sees the pose.

        q = W_q h + b_q + s B_q A_q [h; c]         c = [sin p, cos p]
        k = W_k [h; memory] + s B_k A_k [h; memory]
        v = W_v [h; memory] + b_v + s B_v A_v [h; memory; c]
        out = W_o a + b_o + s B_o A_o a            a = softmax(q k^T / sqrt(d)) v

    after the attention processor of ViewDiff (arXiv:2403.01807, sec. 3.1). Feature tokens are the
    queries; they attend jointly to themselves and to `memory`. Without memory a single token can only
    attend to itself and its weight is 1 whatever q and k are: give memory tokens, or a sequence.

    A bias or a pose in k would shift all scores of a query equally, and softmax would remove it again;
    so k has neither, and the pose acts through q and v.

    Few queries over many keys take a shorter way to the same numbers: q_h . (W_h m) = (W_h^T q_h) . m,
    so W_k moves to the side of the queries and W_v behind the weighted sum, and no token of the memory
    has to be projected (the weight absorption of multi-head latent attention, arXiv:2405.04434,
    sec. 2.1.2).

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
        self.feature_dim, self.num_heads, self.rank, self.dropout = feature_dim, num_heads, rank, dropout
        self.pose_dim = pose_dim if rank else 0

        def linear(pose_dim: int, bias: bool = True) -> nn.Linear:
            if rank == 0:
                return nn.Linear(feature_dim, feature_dim, bias)
            options = {"pose_dim": pose_dim, "bias": bias, "rslora": rslora, "dropout": dropout}
            return LoRALinearLayer(feature_dim, feature_dim, rank, alpha, **options)

        self.query, self.value = linear(2 * self.pose_dim), linear(2 * self.pose_dim)
        self.key, self.out = linear(0, bias=False), linear(0)

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
            raise ValueError(
                f"features must be (B, {self.feature_dim}) or (B, T, {self.feature_dim}), got {tuple(features.shape)}"
            )
        code = self._pose_code(pose, h.shape[0])
        context = h if memory is None else torch.cat((h, memory), 1)
        q = split_heads(self.query(h, code) if self.pose_dim else self.query(h), self.num_heads)
        if self._may_absorb(h.shape[1], context.shape[1]):
            attended, weights = self._absorbed(q, context, code, return_attention)
        else:
            attended, weights = self._projected(q, context, code, return_attention)
        output = self.out(attended).view_as(features)
        return (output, weights) if return_attention else output

    def _may_absorb(self, queries: int, keys: int) -> bool:
        """Whether the short way is shorter, and allowed: adapter dropout acts on projected tokens, and a
        layer that somebody else has wrapped (PEFT, quantisation) or watches by a hook has to be called."""
        ours = all(
            type(layer) in (nn.Linear, LoRALinearLayer) and not _has_hooks(layer) for layer in (self.key, self.value)
        )
        return keys > 2 * queries and ours and not (self.dropout and self.training)

    def _projected(self, q: Tensor, context: Tensor, code: Tensor | None, with_weights: bool):
        """Attention as it is written: project every token to a key and a value."""
        k = split_heads(self.key(context), self.num_heads)
        v = split_heads(self.value(context, code) if self.pose_dim else self.value(context), self.num_heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attended, attention_weights(q, k) if with_weights else None

    def _absorbed(self, q: Tensor, context: Tensor, code: Tensor | None, with_weights: bool):
        """The same with W_k applied to the queries and W_v after the weighted sum of the tokens."""
        batch, heads, count, width = q.shape  # (B, H, T, d)
        (key, _), (value, bias) = _acting(self.key), _acting(self.value)
        by_head = (q * width**-0.5).transpose(0, 1).reshape(heads, batch * count, width)  # (H, B T, d)
        towards = by_head @ key.unflatten(0, (heads, width))  # (H, B T, D)
        if self.rank and self.key.adapter_acts:
            low = by_head @ self.key.lora_up.unflatten(0, (heads, width))  # (H, B T, r)
            towards = towards + (low * self.key.scale) @ self.key.lora_down
        towards = towards.unflatten(1, (batch, count)).transpose(0, 1).flatten(1, 2)  # (B, H T, D)
        summed = weighted_tokens(towards, context)
        by_head = summed.unflatten(1, (heads, count)).transpose(0, 1).reshape(heads, batch * count, -1)
        attended = by_head @ value.unflatten(0, (heads, width)).transpose(1, 2)  # (H, B T, d)
        if self.rank and self.value.adapter_acts:
            down, pose_down = self.value.lora_down.split((self.feature_dim, self.value.pose_dim), 1)
            low = by_head @ down.T  # (H, B T, r)
            if self.pose_dim:
                low = low + F.linear(code, pose_down).expand(-1, count, -1).flatten(0, 1)
            up = self.value.lora_up.unflatten(0, (heads, width)).transpose(1, 2)
            attended = attended + (low * self.value.scale) @ up
        attended = attended.unflatten(1, (batch, count)).permute(1, 2, 0, 3).flatten(2) + bias
        if not with_weights:
            return attended, None
        scores = towards @ context.transpose(1, 2)
        return attended, scores.softmax(-1).unflatten(1, (heads, count))

    def _pose_code(self, pose: Tensor | None, batch: int) -> Tensor | None:
        """[sin p, cos p] for all tokens of a sample: (B, 1, 2 P); None if no adapter asks for it."""
        if not self.pose_dim:
            return None
        if pose is None and not (self.query.adapter_acts or self.value.adapter_acts):
            return None
        return pose_code(pose, (batch, self.pose_dim))

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters (with rank 0: all of them)."""
        layers = (self.query, self.key, self.value, self.out)
        return [p for layer in layers for p in (layer.get_trainable_parameters() if self.rank else layer.parameters())]

    def merge(self, pose: Tensor | None = None) -> None:
        """Fold all four adapters into the frozen weights, exactly, for one pose (P,)."""
        if merged := [name for name, layer in self.named_children() if layer.is_merged]:
            raise RuntimeError(f"{merged[0]} is merged already; call unmerge() of it first")  # before any other is
        code = encode_pose(pose) if self.pose_dim and pose is not None else None
        self.query.merge(code)
        self.value.merge(code)
        self.key.merge()
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
        views = check_views(features.shape[0], self.n_views)
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
