"""Many adapters of one frozen base, side by side in one pass.

A batch holds the samples of A adapters one after the other, (A B, ...). The frozen layers see one large batch; what an
adapter adds is a product with a stack of A matrices. Adapters of different rank are padded with zeros to the highest:
where both factors are zero neither gets a gradient, so the padding stays zero and changes nothing.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .attention import PoseConditionedLoRAAttention, pose_code, split_heads
from .lora import LoRALinearLayer
from .projection import LightweightFaceProjectionLayer
from .transformer import EnhancedTransformerDecoderOnly3D


class StackedLoRALinear(nn.Module):
    """A LoRA layers over one frozen linear layer, to be trained: they can be neither merged nor disabled.

    As in `LoRALinearLayer`, but lora_down is (A, R, in_features + pose_dim), lora_up (A, out_features, R), and scale
    (A, 1, 1), with R the highest rank.

    Args:
        layers: of equal base and pose_dim, without adapter dropout; their parameters are copied.
    """

    def __init__(self, layers: Sequence[LoRALinearLayer]) -> None:
        super().__init__()
        first = layers[0]
        self.in_features, self.out_features, self.pose_dim = first.in_features, first.out_features, first.pose_dim
        if any(layer.dropout or layer.pose_dim != first.pose_dim or layer.is_merged for layer in layers):
            raise ValueError("adapters that are trained together share pose_dim, are not merged, and have no dropout "
                             "of their own")  # fmt: skip
        self.weight, self.bias = first.weight, first.bias
        self.ranks = [layer.rank for layer in layers]
        scales = torch.tensor([layer.scale for layer in layers], device=self.weight.device, dtype=self.weight.dtype)
        self.register_buffer("scale", scales[:, None, None], persistent=False)
        pads = [max(self.ranks) - rank for rank in self.ranks]
        self.lora_down = nn.Parameter(torch.stack([F.pad(x.lora_down.detach(), (0, 0, 0, p))
                                                   for x, p in zip(layers, pads, strict=True)]))  # fmt: skip
        self.lora_up = nn.Parameter(torch.stack([F.pad(x.lora_up.detach(), (0, p))
                                                 for x, p in zip(layers, pads, strict=True)]))  # fmt: skip

    @torch.no_grad()
    def copy_to(self, index: int, layer: LoRALinearLayer) -> None:
        """Write the adapter of that number back into a layer of its own rank."""
        layer.lora_down.copy_(self.lora_down[index, : layer.rank])
        layer.lora_up.copy_(self.lora_up[index, :, : layer.rank])

    def forward(self, x: Tensor, pose: Tensor | None = None) -> Tensor:
        """x: (A B, T, in_features), pose: (A B, 1, pose_dim) to (A B, T, out_features)."""
        y = F.linear(x, self.weight, self.bias)
        low = self.down(x)
        if self.pose_dim:
            low = low + self.down_pose(pose)[:, :, None]
        low = low.flatten(1, 2)  # (A, B T, R)
        return y + ((low * self.scale) @ self.lora_up.transpose(1, 2)).view_as(y)

    def extra_repr(self) -> str:
        return f"{self.in_features} to {self.out_features}, ranks={self.ranks}, pose_dim={self.pose_dim}"

    def _split_down(self) -> tuple[Tensor, Tensor]:
        return self.lora_down.split((self.in_features, self.pose_dim), 2)

    def down(self, x: Tensor) -> Tensor:
        """A_x x of each adapter: (A B, K, in_features) to (A, B, K, R)."""
        low = x.reshape(len(self.ranks), -1, self.in_features) @ self._split_down()[0].transpose(1, 2)
        return low.unflatten(1, (-1, x.shape[1]))

    def down_pose(self, pose: Tensor) -> Tensor:
        """A_p c of each adapter: (A B, 1, pose_dim) to (A, B, R)."""
        return pose.reshape(len(self.ranks), -1, self.pose_dim) @ self._split_down()[1].transpose(1, 2)

    def up_by_head(self, heads: int) -> Tensor:
        """B_h: (A, H, out_features / H, R)."""
        return self.lora_up.unflatten(1, (heads, -1))


class StackedAttention(nn.Module):
    """A attentions over one frozen one, for a single feature token with a memory.

    The short way of `PoseConditionedLoRAAttention`, and one step further for the adapters: what A_k and A_v make of a
    token is R numbers, so scores and sums are taken there, and no adapter ever sees (heads, tokens, D).

    Args:
        layers: of equal sizes; their parameters are copied.
    """

    def __init__(self, layers: Sequence[PoseConditionedLoRAAttention]) -> None:
        super().__init__()
        self.num_heads, self.pose_dim = layers[0].num_heads, layers[0].pose_dim
        for name in ("query", "key", "value", "out"):
            setattr(self, name, StackedLoRALinear([getattr(layer, name) for layer in layers]))

    def copy_to(self, index: int, layer: PoseConditionedLoRAAttention) -> None:
        for name in ("query", "key", "value", "out"):
            getattr(self, name).copy_to(index, getattr(layer, name))

    def forward(
        self, features: Tensor, pose: Tensor | None = None, memory: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """features: (A B, 1, D), pose: (A B, P), memory: (A B, M, D); see `PoseConditionedLoRAAttention`.

        The feature token and the memory are kept apart: what a frozen base makes of pose and keypoints needs no
        gradient.
        """
        runs, heads = len(self.key.ranks), self.num_heads
        code = pose_code(pose, (len(features), self.pose_dim)) if self.pose_dim else None
        q = split_heads(self.query(features, code), heads)[:, :, 0]  # (N, H, d), N = A B
        q = q * q.shape[-1] ** -0.5
        towards = q.transpose(0, 1) @ self.key.weight.unflatten(0, (heads, -1))  # (H, N, D)
        towards = towards.transpose(0, 1)
        scores = torch.cat((towards @ features.transpose(1, 2), towards @ memory.transpose(1, 2)), 2)  # (N, H, 1 + M)
        low_q = q.unflatten(0, (runs, -1)).transpose(1, 2) @ self.key.up_by_head(heads)  # (A, H, B, R)
        low_q = low_q.transpose(1, 2) * self.key.scale[:, None]  # (A, B, H, R)
        low_k = torch.cat((self.key.down(features), self.key.down(memory)), 2)  # (A, B, 1 + M, R)
        weights = (scores + (low_q @ low_k.transpose(2, 3)).flatten(0, 1)).softmax(-1)

        summed = weights[:, :, :1] * features + weights[:, :, 1:] @ memory  # (N, H, D)
        attended = summed.transpose(0, 1) @ self.value.weight.unflatten(0, (heads, -1)).transpose(1, 2)  # (H, N, d)
        low_v = torch.cat((self.value.down(features), self.value.down(memory)), 2)  # (A, B, 1 + M, R)
        low_v = weights.unflatten(0, (runs, -1)) @ low_v  # (A, B, H, R)
        if self.pose_dim:
            low_v = low_v + self.value.down_pose(code)[:, :, None]
        low_v = (low_v * self.value.scale[:, None]).transpose(1, 2)  # (A, H, B, R)
        update = (low_v @ self.value.up_by_head(heads).transpose(2, 3)).transpose(1, 2)  # (A, B, H, d)
        attended = (attended.transpose(0, 1) + update.flatten(0, 1)).flatten(1) + self.value.bias
        output = self.out(attended[:, None])
        return (output, weights[:, :, None]) if return_attention else output


class StackedProjection(nn.Module):
    """A projection layers side by side: one layer whose every parameter is a stack (A, ...).

    Args:
        layers: of the same sizes; their parameters are copied.
    """

    def __init__(self, layers: Sequence[LightweightFaceProjectionLayer]) -> None:
        super().__init__()
        self.count = len(layers)
        self.layer = copy.deepcopy(layers[0])
        for name, parameter in self.layer.named_parameters():
            parameter.data = torch.stack([layer.get_parameter(name).detach() for layer in layers])

    @torch.no_grad()
    def copy_to(self, index: int, layer: LightweightFaceProjectionLayer) -> None:
        for name, parameter in layer.named_parameters():
            parameter.copy_(self.layer.get_parameter(name)[index])

    def forward(self, features: Tensor, keypoints_3d: Tensor, source_pose: Tensor) -> Tensor:
        """(A B, D), (A B, K, 3), (A B, 3) to (A B, D)."""
        stacks = dict(self.layer.named_parameters())
        parts = [value.unflatten(0, (self.count, -1)) for value in (features, keypoints_3d, source_pose)]
        if features.is_cuda:  # one launch for all, of all voxels
            self.layer.in_turns = False
            return vmap(self._one)(stacks, *parts).flatten(0, 1)
        return torch.cat([self._one({name: stack[i] for name, stack in stacks.items()}, *(part[i] for part in parts))
                          for i in range(self.count)])  # fmt: skip

    def _one(self, parameters: dict[str, Tensor], features: Tensor, keypoints: Tensor, pose: Tensor) -> Tensor:
        return functional_call(self.layer, parameters, (features, keypoints), {"source_pose": pose})


class StackedAdapters(nn.Module):
    """A models that differ in their adapters only, as one: (A B, ...) samples to (A B, D) predictions.

    Args:
        models: with LoRA, perhaps with a projection, without cross-view attention; of the same base, whose weights are
            taken from the first. Ranks and scales may differ.
    """

    def __init__(self, models: Sequence[EnhancedTransformerDecoderOnly3D]) -> None:
        super().__init__()
        first = models[0]
        if first.cross_view is not None:
            raise ValueError("cross-view attention is trained one model at a time")
        self.models = list(models)  # not this module's own
        self.together = copy.deepcopy(first)
        for name, kind in _outermost(first):
            parent, _, leaf = name.rpartition(".")
            stack = kind([model.get_submodule(name) for model in models])
            setattr(self.together.get_submodule(parent), leaf, stack)
        stacked = [f"{name}." for name, _ in _outermost(first)]
        if left := [name for name in self.trainable() if not name.startswith(tuple(stacked))]:
            raise ValueError(f"only adapters are trained together, and {left[0]} is trainable; freeze the base")

    def forward(self, src: Tensor, **conditions) -> Tensor:
        return self.together(src, **conditions)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The stacked parameters, each (A, ...), by name."""
        return {name: p for name, p in self.together.named_parameters() if p.requires_grad}

    def unstack(self) -> list[EnhancedTransformerDecoderOnly3D]:
        """The models given, with what their adapters have become."""
        for name, _ in _outermost(self.models[0]):
            for i, model in enumerate(self.models):
                self.together.get_submodule(name).copy_to(i, model.get_submodule(name))
        return self.models


def _outermost(model: nn.Module) -> list[tuple[str, type]]:
    """Names of the modules that are stacked, none within another, with the class that does it."""
    found: list[tuple[str, type]] = []
    for name, module in model.named_modules():
        kind = STACKS.get(type(module))
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if kind is not None and not inside and (kind is not StackedAttention or module.rank):
            found.append((name, kind))
    return found


STACKS = {
    PoseConditionedLoRAAttention: StackedAttention,
    LoRALinearLayer: StackedLoRALinear,
    LightweightFaceProjectionLayer: StackedProjection,
}
