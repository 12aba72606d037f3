"""Many adapters of one frozen base, side by side in one model.

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
from torch.nn.utils.rnn import pad_sequence

from viewdiff_nb.modules.attention import PoseConditionedLoRAAttention, pose_code, split_heads
from viewdiff_nb.modules.lora import LoRALinearLayer
from viewdiff_nb.modules.projection import FINE, LightweightFaceProjectionLayer
from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D


class StackedLoRALinear(nn.Module):
    """A LoRA layers over one frozen linear layer, to be trained: they can be neither merged nor disabled.

    As in `LoRALinearLayer`, but lora_down is (A, R, in_features + pose_dim), lora_up (A, out_features, R), and scale
    (A, 1, 1), with R the highest rank. The layers have the same base and pose_dim; their parameters are copied.
    """

    scale: Tensor

    def __init__(self, layers: Sequence[LoRALinearLayer]) -> None:
        super().__init__()
        first = layers[0]
        if any(layer.dropout or layer.pose_dim != first.pose_dim or layer.is_merged for layer in layers):
            raise ValueError(
                "adapters that are trained together share pose_dim, are not merged, and have no dropout of their own"
            )
        self.weight, self.bias = first.weight, first.bias
        self.in_features, self.pose_dim, self.ranks = first.in_features, first.pose_dim, [x.rank for x in layers]
        scales = torch.tensor([x.scale for x in layers], device=self.weight.device, dtype=self.weight.dtype)
        self.register_buffer("scale", scales[:, None, None], persistent=False)
        downs, ups = [x.lora_down.detach() for x in layers], [x.lora_up.detach().T for x in layers]
        self.lora_down = nn.Parameter(pad_sequence(downs, batch_first=True))
        self.lora_up = nn.Parameter(pad_sequence(ups, batch_first=True).transpose(1, 2).contiguous())

    def forward(self, x: Tensor, pose: Tensor | None = None) -> Tensor:
        """x: (A B, T, in_features), pose: (A B, 1, pose_dim) to (A B, T, out_features)."""
        y = F.linear(x, self.weight, self.bias)
        low = self.down(x)
        if pose is not None:
            low = low + self.down_pose(pose)[:, :, None]
        low = low.flatten(1, 2)  # (A, B T, R)
        return y + ((low * self.scale) @ self.lora_up.transpose(1, 2)).view_as(y)

    def extra_repr(self) -> str:
        return f"{self.in_features} to {len(self.weight)}, ranks={self.ranks}, pose_dim={self.pose_dim}"

    def down(self, x: Tensor) -> Tensor:
        """A_x x of each adapter: (A B, K, in_features) to (A, B, K, R)."""
        matrices, _ = self.lora_down.split((self.in_features, self.pose_dim), 2)
        low = x.reshape(len(self.ranks), -1, self.in_features) @ matrices.transpose(1, 2)
        return low.unflatten(1, (-1, x.shape[1]))

    def down_pose(self, pose: Tensor) -> Tensor:
        """A_p c of each adapter: (A B, 1, pose_dim) to (A, B, R)."""
        _, matrices = self.lora_down.split((self.in_features, self.pose_dim), 2)
        return pose.reshape(len(self.ranks), -1, self.pose_dim) @ matrices.transpose(1, 2)


class StackedAttention(nn.Module):
    """A attentions over one frozen one, for a single feature token with a memory.

    The short way of `PoseConditionedLoRAAttention`, and one step further for the adapters: what A_k and A_v make of a
    token is R numbers, so scores and sums are taken there, and no adapter ever sees (heads, tokens, D).
    """

    def __init__(self, layers: Sequence[PoseConditionedLoRAAttention]) -> None:
        super().__init__()
        self.num_heads, self.pose_dim = layers[0].num_heads, layers[0].pose_dim

        def stacked(name: str) -> StackedLoRALinear:
            return StackedLoRALinear([getattr(layer, name) for layer in layers])

        self.query, self.key = stacked("query"), stacked("key")
        self.value, self.out = stacked("value"), stacked("out")

    def forward(
        self, features: Tensor, pose: Tensor | None, memory: Tensor, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """features: (A B, 1, D), pose: (A B, P), memory: (A B, M, D); see `PoseConditionedLoRAAttention`."""
        runs, heads = len(self.key.ranks), self.num_heads
        code = pose_code(pose, (len(features), self.pose_dim)) if self.pose_dim else None
        q = split_heads(self.query(features, code), heads)[:, :, 0]  # (N, H, d), N = A B
        q = q * q.shape[-1] ** -0.5
        towards = q.transpose(0, 1) @ self.key.weight.unflatten(0, (heads, -1))  # (H, N, D)
        towards = towards.transpose(0, 1)
        scores = torch.cat((towards @ features.transpose(1, 2), towards @ memory.transpose(1, 2)), 2)  # (N, H, 1 + M)
        low_q = q.unflatten(0, (runs, -1)).transpose(1, 2) @ self.key.lora_up.unflatten(1, (heads, -1))  # (A, H, B, R)
        low_q = low_q.transpose(1, 2) * self.key.scale[:, None]  # (A, B, H, R)
        low_k = torch.cat((self.key.down(features), self.key.down(memory)), 2)  # (A, B, 1 + M, R)
        weights = (scores + (low_q @ low_k.transpose(2, 3)).flatten(0, 1)).softmax(-1)

        summed = weights[:, :, :1] * features + weights[:, :, 1:] @ memory  # (N, H, D)
        attended = summed.transpose(0, 1) @ self.value.weight.unflatten(0, (heads, -1)).transpose(1, 2)  # (H, N, d)
        low_v = torch.cat((self.value.down(features), self.value.down(memory)), 2)  # (A, B, 1 + M, R)
        low_v = weights.unflatten(0, (runs, -1)) @ low_v  # (A, B, H, R)
        if code is not None:
            low_v = low_v + self.value.down_pose(code)[:, :, None]
        low_v = (low_v * self.value.scale[:, None]).transpose(1, 2)  # (A, H, B, R)
        update = (low_v @ self.value.lora_up.unflatten(1, (heads, -1)).transpose(2, 3)).transpose(1, 2)  # (A, B, H, d)
        attended = (attended.transpose(0, 1) + update.flatten(0, 1)).flatten(1) + self.value.bias
        output = self.out(attended[:, None])
        return (output, weights[:, :, None]) if return_attention else output


class StackedProjection(nn.Module):
    """A projection layers of the same sizes: one layer whose every parameter is a stack (A, ...), copied from them."""

    def __init__(self, layers: Sequence[LightweightFaceProjectionLayer]) -> None:
        super().__init__()
        self.count = len(layers)
        self.layer = copy.deepcopy(layers[0])
        for name, parameter in self.layer.named_parameters():
            parameter.data = torch.stack([layer.get_parameter(name).detach() for layer in layers])

    def forward(
        self, features: Tensor, keypoints_3d: Tensor, target_pose: Tensor | None, source_pose: Tensor
    ) -> Tensor:
        """(A B, D), (A B, K, 3), None (frontal), (A B, 3) to (A B, D)."""
        if target_pose is not None:
            raise ValueError("a stack of projections renders the frontal pose only; give no target_pose")
        stacks: dict[str, Tensor] = dict(self.layer.named_parameters())
        parts = [value.unflatten(0, (self.count, -1)) for value in (features, keypoints_3d, source_pose)]
        self.layer.in_turns = not features.is_cuda
        if (
            features.is_cuda and self.layer.voxel_resolution < FINE
        ):  # one launch for all; finer grids fill it one by one
            return vmap(self._one)(stacks, *parts).flatten(0, 1)
        rows = ({name: stack[i] for name, stack in stacks.items()} for i in range(self.count))
        return torch.cat([self._one(row, *own) for row, *own in zip(rows, *parts, strict=True)])

    def _one(self, parameters: dict[str, Tensor], features: Tensor, keypoints: Tensor, pose: Tensor) -> Tensor:
        return functional_call(self.layer, parameters, (features, keypoints), {"source_pose": pose})


def stack_adapters(models: Sequence[EnhancedTransformerDecoderOnly3D]) -> EnhancedTransformerDecoderOnly3D:
    """A models that differ in their adapters only, as one: (A B, ...) samples to (A B, D) predictions.

    Args:
        models: with LoRA, perhaps with a projection, without cross-view attention; of the same base, whose weights are
            copied from the first. Ranks and scales may differ.

    Returns:
        a model whose trainable parameters are stacks, each (A, ...).
    """
    first = models[0]
    if first.cross_view is not None:
        raise ValueError("cross-view attention is trained one model at a time")
    roles = first.parameter_roles()
    if base := [name for name, p in first.named_parameters() if p.requires_grad and roles[name] == "base"]:
        raise ValueError(f"only adapters are trained together, and {base[0]} is trainable; freeze the base")
    projections = [model.projection for model in models if model.projection is not None]
    if len(projections) not in (0, len(models)) or len({layer.voxel_resolution for layer in projections}) > 1:
        raise ValueError("of models that are trained together all have a projection of one voxel_resolution, or none")
    stack = copy.deepcopy(first)
    for block, *originals in zip(stack.blocks, *(model.blocks for model in models), strict=True):
        if block.attention.rank:
            block.attention = StackedAttention([original.attention for original in originals])
        if isinstance(block.linear1, LoRALinearLayer):
            block.linear1 = StackedLoRALinear([original.linear1 for original in originals])
            block.linear2 = StackedLoRALinear([original.linear2 for original in originals])
    if projections:
        stack.projection = StackedProjection(projections)  # type: ignore[assignment]  # takes what the original takes
    return stack


@torch.no_grad()
def unstack(stack: nn.Module, models: Sequence[nn.Module]) -> None:
    """Write what the adapters have become into models like those that were stacked, to each without the padding."""
    for name, stacked in stack.named_parameters():
        if stacked.requires_grad:
            for row, model in zip(stacked, models, strict=True):
                own = model.get_parameter(name.replace("projection.layer.", "projection."))
                own.copy_(row[tuple(slice(size) for size in own.shape)])
