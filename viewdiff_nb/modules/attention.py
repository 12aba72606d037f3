"""Attention: pose-conditioned LoRA attention, and attention across the views of one person."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viewdiff_nb.modules.lora import LoRALinearLayer, check_shape, lora_layers

Attended = tuple[Tensor, Tensor | None]  # (B, T, D), and if asked the weights (B, heads, T, T + M)
FUSED_WIDTH = 256  # wider heads have no fast fused kernel on a GPU; few keys make plain products cheap


def encode_pose(pose: Tensor, error: Tensor | None = None) -> Tensor:
    """[sin p, cos p] of angles in radians, the same after a full turn: (..., P) to (..., 2 P).

    error: (..., P) standard deviations of angles that are not exactly known. The code is then its expectation over a
    normal distribution, sin and cos times exp(-error^2 / 2) (Barron et al. 2021, arXiv:2103.13415, eq. 13).

    >>> known, unknown = torch.tensor([torch.pi / 2, torch.pi / 2]), torch.tensor([0.0, 10.0])
    >>> [round(value, 6) for value in encode_pose(known, unknown)[:2].tolist()]   # the sines
    [1.0, 0.0]
    """
    code = torch.cat((pose.sin(), pose.cos()), -1)
    return code if error is None else code * torch.cat((error, error), -1).square().div(-2).exp()


def pose_code(pose: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """`encode_pose` for all tokens of a sample: (B, 1, 2 P); a ValueError if the pose is not of that shape, (B, P)."""
    return encode_pose(check_shape("pose (angles in radians)", pose, *shape))[:, None]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, D) to (B, heads, T, D / heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) of q (B, H, T, d) and k (B, H, M, d): (B, H, T, M); mask: True where it is allowed."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # in this order, so that float16 holds them
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


def weighted_tokens(q: Tensor, tokens: Tensor) -> Tensor:
    """softmax(q t^T) t with queries (B, Tq, D), scaled already, and tokens (B, T, D): (B, Tq, D)."""
    if q.is_cuda and q.shape[-1] > FUSED_WIDTH:
        return (q @ tokens.transpose(1, 2)).softmax(-1) @ tokens
    return F.scaled_dot_product_attention(q[:, None], tokens[:, None], tokens[:, None], scale=1.0)[:, 0]


def _check_heads(feature_dim: int, num_heads: int) -> None:
    if num_heads < 1 or feature_dim % num_heads:
        raise ValueError(f"feature_dim must be a multiple of num_heads, got {feature_dim} and {num_heads}")


def _dense(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return layer.dense if isinstance(layer, LoRALinearLayer) else (layer.weight, layer.bias)


def _may_be_bypassed(layer: nn.Module) -> bool:
    """Whether its weights may be used without calling it: no wrapper (PEFT, quantisation), none of torch's hooks."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    hooked = any(getattr(layer, f"_{kind}") or getattr(nn.modules.module, f"_global_{kind}") for kind in kinds)
    return type(layer) in (nn.Linear, LoRALinearLayer) and not hooked


class PoseConditionedLoRAAttention(nn.Module):
    """Multi-head attention with frozen projections, adapted by LoRA that sees the pose.

        q = W_q h + b_q + s B_q A_q [h; c]         c = [sin p, cos p]
        k = W_k [h; memory] + s B_k A_k [h; memory]
        v = W_v [h; memory] + b_v + s B_v A_v [h; memory; c]
        out = W_o a + b_o + s B_o A_o a            a = softmax(q k^T / sqrt(d)) v

    after the attention processor of ViewDiff (arXiv:2403.01807, sec. 3.1). Feature tokens attend to themselves and to
    `memory`; a single token without memory has weight 1 whatever q and k are. A bias or a pose in k would shift all
    scores of a query equally, and softmax would remove it.

    With few queries and many keys the projections are absorbed: q_h . (W_h m) = (W_h^T q_h) . m, so W_k is applied to
    the queries and W_v to the weighted sum of tokens (multi-head latent attention, arXiv:2405.04434, sec. 2.1.2).

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
        self.pose_dim, self.dropout = pose_dim if rank else 0, dropout

        def linear(pose_dim: int = 0, bias: bool = True) -> nn.Linear:
            if rank == 0:
                return nn.Linear(feature_dim, feature_dim, bias)
            return LoRALinearLayer(
                feature_dim, feature_dim, rank, alpha, pose_dim=pose_dim, bias=bias, rslora=rslora, dropout=dropout
            )

        self.query, self.value = linear(2 * self.pose_dim), linear(2 * self.pose_dim)
        self.key, self.out = linear(bias=False), linear()

    def forward(
        self, features: Tensor, pose: Tensor | None = None, memory: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            features: (B, D), one token, or (B, T, D).
            pose: (B, P) angles in radians; may be None if pose_dim is 0 or the adapters are merged.
            memory: (B, M, D) further tokens to attend to.
            return_attention: also return the weights, (B, heads, T, T + M).
        """
        h = features[:, None] if features.dim() == 2 else features
        if h.dim() != 3 or h.shape[-1] != self.feature_dim:
            width = self.feature_dim
            raise ValueError(f"features must be (B, {width}) or (B, T, {width}), got {tuple(features.shape)}")
        context = h if memory is None else torch.cat((h, memory), 1)  # (B, T + M, D)
        code = self._pose_code(pose, h.shape[0])
        q = self._project(self.query, h, code)
        attend = self._absorbed if self._may_absorb(h.shape[1], context.shape[1]) else self._projected
        attended, weights = attend(q, context, code, return_attention)
        output = self.out(attended).view_as(features)
        return output if weights is None else (output, weights)

    def _pose_code(self, pose: Tensor | None, batch: int) -> Tensor | None:
        """(B, 1, 2 P), or None where no layer needs it; what wraps a layer is taken to need it."""
        idle = all(isinstance(x, LoRALinearLayer) and not x.adapter_active for x in (self.query, self.value))
        if self.pose_dim == 0 or (pose is None and idle):
            return None
        return pose_code(pose, (batch, self.pose_dim))

    def _project(self, layer: nn.Linear, tokens: Tensor, code: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, H, T, d)."""
        return split_heads(layer(tokens) if code is None else layer(tokens, code), self.num_heads)

    def _may_absorb(self, queries: int, keys: int) -> bool:
        """Whether absorbing is less work, and allowed: adapter dropout acts on projected tokens."""
        bypassed = _may_be_bypassed(self.key) and _may_be_bypassed(self.value)
        return keys > 2 * queries and bypassed and not (self.dropout and self.training)

    def _projected(self, q: Tensor, context: Tensor, code: Tensor | None, with_weights: bool) -> Attended:
        """Attention of q (B, H, T, d) over the context (B, T + M, D), every token projected to a key and a value."""
        k, v = self._project(self.key, context), self._project(self.value, context, code)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attended, attention_weights(q, k) if with_weights else None

    def _absorbed(self, q: Tensor, context: Tensor, code: Tensor | None, with_weights: bool) -> Attended:
        """`_projected` with W_k applied to the queries and W_v to the weighted sum of the tokens.

        Axes are b: batch, h: heads, t: queries, d: width of a head, m: width of the model, r: rank.
        """
        heads = (self.num_heads, -1)
        (key, _), (value, bias) = _dense(self.key), _dense(self.value)
        q = q * q.shape[-1] ** -0.5
        over_tokens = torch.einsum("bhtd,hdm->hbtm", q, key.unflatten(0, heads))
        if isinstance(self.key, LoRALinearLayer) and self.key.adapter_active:
            low = torch.einsum("bhtd,hdr->hbtr", q, self.key.lora_up.unflatten(0, heads))
            over_tokens = over_tokens + (low * self.key.scale) @ self.key.lora_down
        over_tokens = over_tokens.transpose(0, 1).flatten(1, 2)  # (B, H T, D)
        summed = weighted_tokens(over_tokens, context).unflatten(1, heads)  # (B, H, T, D)
        attended = torch.einsum("bhtm,hdm->hbtd", summed, value.unflatten(0, heads))
        if isinstance(self.value, LoRALinearLayer) and self.value.adapter_active:
            down, pose_down = self.value.lora_down.split((self.feature_dim, self.value.pose_dim), 1)
            low = summed.transpose(0, 1) @ down.T  # (H, B, T, r)
            if code is not None:
                low = low + F.linear(code, pose_down).expand(-1, q.shape[2], -1)
            up = self.value.lora_up.unflatten(0, heads)
            attended = attended + torch.einsum("hbtr,hdr->hbtd", low * self.value.scale, up)
        attended = attended.permute(1, 2, 0, 3).flatten(2)
        attended = attended if bias is None else attended + bias
        weights = (over_tokens @ context.transpose(1, 2)).softmax(-1).unflatten(1, heads) if with_weights else None
        return attended, weights

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters (with rank 0: all of them)."""
        layers = (self.query, self.key, self.value, self.out)  # an optimiser's state goes by this order
        own = (x.get_trainable_parameters() if isinstance(x, LoRALinearLayer) else x.parameters() for x in layers)
        return [parameter for parameters in own for parameter in parameters]

    def merge(self, pose: Tensor | None = None) -> None:
        """Fold all four adapters into the frozen weights, exactly, for one pose (P,)."""
        layers = self._adapted()
        if merged := [name for name, layer in layers.items() if layer.is_merged]:
            raise RuntimeError(f"{merged[0]} is merged already; call unmerge() of it first")  # before any other is
        code = None if pose is None else encode_pose(pose)
        for layer in layers.values():
            layer.merge(code)

    def unmerge(self) -> None:
        for layer in self._adapted().values():
            layer.unmerge()

    def _adapted(self) -> dict[str, LoRALinearLayer]:
        if not self.rank:
            raise RuntimeError("attention of rank 0 has no adapter to merge; build it with rank 1 or more")
        return lora_layers(self)


class CrossViewAttention(nn.Module):
    """Joint attention over all tokens of all views of one person, with a residual connection.

    The cross-frame attention of ViewDiff (arXiv:2403.01807, sec. 3.1). No view has a position, so permuting the views
    permutes the outputs.

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
        self.query, self.key, self.value, self.out = (nn.Linear(feature_dim, feature_dim) for _ in range(4))
        if zero_init:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(
        self, features: Tensor, mask: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            features: (B V, D) or (B V, T, D).
            mask: (B V,) bool, False for missing views: no view attends to them, and their outputs are their inputs.
            return_attention: also return the weights, (B, heads, V T, V T).
        """
        people = check_views(features.shape[0], self.n_views)
        tokens = features.reshape(people, -1, self.feature_dim)  # (B, V T, D)
        h = self.norm(tokens)
        q, k, v = (split_heads(layer(h), self.num_heads) for layer in (self.query, self.key, self.value))
        present = allowed = None
        if mask is not None:
            present = mask.view(people, self.n_views).repeat_interleave(tokens.shape[1] // self.n_views, 1)  # (B, V T)
            itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=mask.device)  # so that no row is empty
            allowed = (present[:, None] | itself)[:, None]  # (B, 1, V T, V T)
        update = self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2))
        if present is not None:
            update = update * present[..., None]
        output = (tokens + update).view_as(features)
        return (output, attention_weights(q, k, allowed)) if return_attention else output


def check_views(batch: int, n_views: int) -> int:
    """The number of people in a batch; a ValueError unless it is a multiple of n_views."""
    if batch % n_views:
        below = batch // n_views * n_views
        advice = f"{below} or {below + n_views}" if below else f"{n_views}"
        raise ValueError(
            f"the batch size must be a multiple of n_views (批次大小必须是n_views的倍数): got {batch} with "
            f"n_views={n_views}; use {advice}, and drop_last=True in a DataLoader"
        )
    return batch // n_views
