"""Low-rank adaptation of a linear layer, optionally conditioned on a pose.

    y = W x + b + s B (A_x x + A_p c),        s = alpha / rank   (rsLoRA: alpha / sqrt(rank))

W and b are frozen; A = [A_x A_p] (`lora_down`) starts Kaiming-uniform and B (`lora_up`) at zero, so a
new adapter changes nothing. Without a pose this is LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3;
rsLoRA: Kalajdzievski 2023, arXiv:2312.03732). Appending the pose c to the input of A is ViewDiff's pose
conditioning (Höllein et al. 2024, arXiv:2403.01807, sec. 3.1).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinearLayer(nn.Linear):
    """A frozen linear layer plus a trainable low-rank update.

    It is an `nn.Linear` with two more parameters, so the state dict of a plain linear layer fits it. Merging makes no
    difference to its state dict, which holds W, b, A and B as they are trained; loading one undoes the merge.

    Args:
        in_features, out_features: widths of the layer.
        rank: width of the bottleneck, 1 ... min(in_features, out_features).
        alpha: scale of the update; s = alpha / rank.
        pose_dim: width of the pose c appended to the input of A; 0 for plain LoRA.
        bias: whether the frozen layer has a bias.
        rslora: scale by alpha / sqrt(rank) instead.
        dropout: dropout on the adapter's input x (never on the frozen path, nor on the pose).

    Raises:
        ValueError: for a rank, alpha, pose_dim or dropout out of range.
    """

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
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank must be in 1..{min(in_features, out_features)} for a {in_features} to "
                f"{out_features} layer, got {rank}"
            )
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        if pose_dim < 0:
            raise ValueError(f"pose_dim must not be negative, got {pose_dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.rank, self.alpha, self.pose_dim = rank, float(alpha), pose_dim
        self.rslora, self.dropout = rslora, dropout
        self.scale = self.alpha / (math.sqrt(rank) if rslora else rank)
        self.adapter_enabled = True
        for name in ("merged_weight", "merged_bias"):  # W and b with the adapter, while it is merged
            self.register_buffer(name, None, persistent=False)
        self.lora_down = nn.Parameter(torch.empty(rank, in_features + pose_dim, device=device, dtype=dtype))
        self.lora_up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.reset_adapter()
        self.freeze_base()

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int = 4, alpha: float = 1.0, **options) -> "LoRALinearLayer":
        """Wrap an existing layer; its weight and bias are shared (and frozen), not copied."""
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank,
            alpha,
            bias=linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
            **options,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.lora_down = nn.Parameter(torch.empty(layer.lora_down.shape, **like))
        layer.lora_up = nn.Parameter(torch.empty(layer.lora_up.shape, **like))
        layer.reset_adapter()
        layer.freeze_base()
        return layer

    def reset_adapter(self) -> None:
        """A Kaiming-uniform with a = sqrt(5) (as PEFT), B zero."""
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up)

    def freeze_base(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, [A, B]; the frozen layer is not among them."""
        return [self.lora_down, self.lora_up]

    @property
    def is_merged(self) -> bool:
        return self.merged_weight is not None

    @property
    def adapter_acts(self) -> bool:
        """Whether the adapter has to be computed beside W: not if it is merged or disabled."""
        return self.adapter_enabled and not self.is_merged

    @property
    def acting(self) -> tuple[Tensor, Tensor | None]:
        """The matrix and bias that x meets: W and b, with the adapter if it is merged and not disabled."""
        if self.is_merged and self.adapter_enabled:
            return self.merged_weight, self.merged_bias
        return self.weight, self.bias

    def forward(self, x: Tensor, pose: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (..., in_features).
            pose: (..., pose_dim), broadcast against the leading dimensions of x; needed if pose_dim > 0.

        Returns:
            (..., out_features).
        """
        y = F.linear(x, *self.acting)
        if not self.adapter_acts:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_down[:, : self.in_features])
        if self.pose_dim:
            low = low + F.linear(self._checked(pose), self.lora_down[:, self.in_features :])
        return y + F.linear(low * self.scale, self.lora_up)

    def delta_weight(self) -> Tensor:
        """s B A_x, the update of W: (out_features, in_features), in float64."""
        return self.scale * (self.lora_up.double() @ self.lora_down[:, : self.in_features].double())

    @torch.no_grad()
    def merge(self, pose: Tensor | None = None) -> None:
        """Fold the adapter into W (and, for one pose of shape (pose_dim,), into b); `unmerge` undoes it.

        W and b stay as they are; merged_weight and merged_bias are used in their place. They are computed in float64
        and rounded once, to the layer's dtype.
        """
        if self.is_merged:
            raise RuntimeError("the adapter is merged already; call unmerge() first")
        if self.pose_dim:
            if self.bias is None:
                raise RuntimeError("a pose merges into the bias, and this layer has none; build it with bias=True")
            if self._checked(pose).dim() != 1:
                raise ValueError(f"merging is exact for one pose of shape ({self.pose_dim},), got {tuple(pose.shape)}")
        dtype = self.weight.dtype
        self.merged_weight = (self.weight + self.delta_weight()).to(dtype)
        if self.bias is not None:
            self.merged_bias = self.bias.clone()
        if self.pose_dim:
            low = self.lora_down[:, self.in_features :].double() @ pose.double()
            self.merged_bias = (self.bias + self.scale * (self.lora_up.double() @ low)).to(dtype)

    def unmerge(self) -> None:
        """Compute W and b and the adapter beside them again."""
        if not self.is_merged:
            raise RuntimeError("the adapter is not merged")
        self.merged_weight = self.merged_bias = None

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.merged_weight = self.merged_bias = None  # they were made of what is replaced now
        super()._load_from_state_dict(*args, **kwargs)

    def _checked(self, pose: Tensor | None) -> Tensor:
        if pose is None or pose.shape[-1] != self.pose_dim:
            got = "none" if pose is None else f"shape {tuple(pose.shape)}"
            raise ValueError(f"this layer is conditioned on a pose of width {self.pose_dim}, got {got}")
        return pose

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, pose_dim={self.pose_dim}"


def lora_layers(model: nn.Module) -> dict[str, LoRALinearLayer]:
    """All adapters of a model by their name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinearLayer)}


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within this context the model's LoRA layers compute the frozen W x + b only, merged or not.

    Raises:
        ValueError: if the model has none; adapters that are trained together (`stacked.py`) cannot be disabled.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layer to disable; adapters that are trained together are "
            "disabled in the models that unstack() fills"
        )
    before = {name: layer.adapter_enabled for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.adapter_enabled = False
        yield
    finally:
        for name, layer in layers.items():
            layer.adapter_enabled = before[name]


# ---- A model's mode, changed for a while.


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; afterwards every module is in its own mode again, also a frozen BatchNorm."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
