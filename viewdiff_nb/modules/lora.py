"""Low-rank adaptation of a linear layer, optionally conditioned on a pose.

    y = W x + b + s B (A_x x + A_p c),        s = alpha / rank   (rsLoRA: alpha / sqrt(rank))

LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. Appending the pose c to the
input of A is ViewDiff's pose conditioning (Höllein et al. 2024, arXiv:2403.01807, sec. 3.1).
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinearLayer(nn.Linear):
    """A frozen linear layer (W, b) plus a trainable update of low rank.

    `lora_down` is A = [A_x A_p], `lora_up` is B, zero at first. Merged or not, a state dict holds W, b, A and B; that
    of a plain linear layer fits W and b. Loading one undoes a merge.

    Args:
        in_features, out_features: widths of the layer.
        rank: width of the bottleneck, 1 ... min(in_features, out_features).
        alpha, rslora: s = alpha / rank, or alpha / sqrt(rank).
        pose_dim: width of the pose c; 0 for plain LoRA.
        bias: whether the frozen layer has a bias.
        dropout: on the adapter's input x (never on the frozen path, nor on the pose).

    Raises:
        ValueError: for a rank, alpha, pose_dim or dropout out of range.
    """

    merged_weight: Tensor | None
    merged_bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 4,
        alpha: float = 1.0,
        *,
        pose_dim: int = 0,
        bias: bool = True,
        rslora: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        highest = min(in_features, out_features)
        for valid, message in (
            (1 <= rank <= highest, f"rank must be in 1..{highest} for {in_features} to {out_features}, got {rank}"),
            (alpha > 0, f"alpha must be positive, got {alpha}"),
            (pose_dim >= 0, f"pose_dim must not be negative, got {pose_dim}"),
            (0 <= dropout < 1, f"dropout must be in [0, 1), got {dropout}"),
        ):
            if not valid:
                raise ValueError(message)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.requires_grad_(False)
        self.rank, self.alpha, self.pose_dim = rank, float(alpha), pose_dim
        self.rslora, self.dropout = rslora, dropout
        self.scale = self.alpha / (math.sqrt(rank) if rslora else rank)
        self.adapter_enabled = True
        self.register_buffer("merged_weight", None, persistent=False)  # W and b with the adapter, while it is merged
        self.register_buffer("merged_bias", None, persistent=False)
        self.lora_down = nn.Parameter(torch.empty(rank, in_features + pose_dim, device=device, dtype=dtype))
        self.lora_up = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))  # as PEFT

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int = 4, alpha: float = 1.0, **options: Any) -> "LoRALinearLayer":
        """Wrap an existing layer; its weight and bias are shared (and frozen), not copied."""
        bias, dtype = linear.bias is not None, linear.weight.dtype
        sizes = linear.in_features, linear.out_features
        layer = cls(*sizes, rank, alpha, bias=bias, dtype=dtype, device="meta", **options)  # W and b are there
        linear.requires_grad_(False)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.lora_down = nn.Parameter(torch.empty_like(layer.lora_down, device=linear.weight.device))
        layer.lora_up = nn.Parameter(torch.zeros_like(layer.lora_up, device=linear.weight.device))
        nn.init.kaiming_uniform_(layer.lora_down, a=math.sqrt(5))
        return layer

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, [A, B]."""
        return [self.lora_down, self.lora_up]

    @property
    def is_merged(self) -> bool:
        return self.merged_weight is not None

    @property
    def adapter_active(self) -> bool:
        """Whether the adapter is computed beside W: neither merged nor disabled."""
        return self.adapter_enabled and not self.is_merged

    @property
    def dense(self) -> tuple[Tensor, Tensor | None]:
        """W and b, or the merged ones unless they are disabled."""
        if self.merged_weight is not None and self.adapter_enabled:
            return self.merged_weight, self.merged_bias
        return self.weight, self.bias

    def forward(self, x: Tensor, pose: Tensor | None = None) -> Tensor:
        """(..., in_features) to (..., out_features); a pose (..., pose_dim), needed if pose_dim > 0, is broadcast."""
        y = F.linear(x, *self.dense)
        if not self.adapter_active:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_down[:, : self.in_features])
        if self.pose_dim:
            if pose is None or pose.shape[-1] != self.pose_dim:
                got = "none" if pose is None else tuple(pose.shape)
                raise ValueError(f"pose must be (..., {self.pose_dim}), which this layer is conditioned on, got {got}")
            low = low + F.linear(pose, self.lora_down[:, self.in_features :])
        return y + F.linear(low * self.scale, self.lora_up)

    def delta_weight(self) -> Tensor:
        """s B A_x, the update of W: (out_features, in_features), in float64."""
        return self.scale * (self.lora_up.double() @ self.lora_down[:, : self.in_features].double())

    @torch.no_grad()
    def merge(self, pose: Tensor | None = None) -> None:
        """Use W + s B A_x and b + s B A_p c in place of W and b, computed in float64 and rounded once.

        Raises:
            RuntimeError: if the adapter is merged already, or there is a pose and no bias to merge it into.
            ValueError: unless the pose is (pose_dim,).
        """
        if self.is_merged:
            raise RuntimeError("the adapter is merged already; call unmerge() first")
        bias = None if self.bias is None else self.bias.clone()
        if self.pose_dim:
            if bias is None:
                raise RuntimeError("a pose merges into the bias, and this layer has none; build it with bias=True")
            pose = check_shape("the one pose that a merge is exact for", pose, self.pose_dim)
            low = self.lora_down[:, self.in_features :].double() @ pose.double()
            bias = (bias + self.scale * (self.lora_up.double() @ low)).to(bias.dtype)
        self.merged_weight, self.merged_bias = (self.weight + self.delta_weight()).to(self.weight.dtype), bias

    def unmerge(self) -> None:
        if not self.is_merged:
            raise RuntimeError("the adapter is not merged")
        self.merged_weight = self.merged_bias = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.merged_weight = self.merged_bias = None  # computed from what is replaced now
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, pose_dim={self.pose_dim}"


def lora_layers(model: nn.Module) -> dict[str, LoRALinearLayer]:
    """All LoRA layers of a model by their name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinearLayer)}


@contextmanager
def _restored(modules: Iterable[nn.Module], attribute: str) -> Iterator[None]:
    before = [(module, getattr(module, attribute)) for module in modules]
    try:
        yield
    finally:
        for module, value in before:
            setattr(module, attribute, value)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within this context the model's LoRA layers compute W x + b only, merged or not; a ValueError if it has none."""
    layers = lora_layers(model).values()
    if not layers:
        name = type(model).__name__
        raise ValueError(f"{name} has no LoRA layer to disable; unstack() adapters trained in one pass first")
    with _restored(layers, "adapter_enabled"):
        for layer in layers:
            layer.adapter_enabled = False
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; afterwards every module is in its own mode again, also a frozen BatchNorm."""
    with _restored(model.modules(), "training"), torch.no_grad():
        model.eval()
        yield


def check_shape(name: str, value: Tensor | None, *shape: int) -> Tensor:
    """The value, or a ValueError unless it is given and has this shape."""
    if value is None or value.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {'none' if value is None else tuple(value.shape)}")
    return value
