"""What is compared: models, the controls that could refute what is said of them, and other ways to adapt a base.

`studies.controls` trains them all with the same budget.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.faces.geometry import normalise_keypoints, to_face_frame
from viewdiff_nb.modules import controls
from viewdiff_nb.modules.baselines import DREAM, MLP
from viewdiff_nb.modules.projection import LightweightFaceProjectionLayer
from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.training import TrainConfig
from viewdiff_nb.training.checkpoint import prepare_model

VIEW_BATCH = 120  # a multiple of 2, 3 and 5 views
Build = Callable[[TrainConfig, FaceViews], nn.Module]


@dataclass(frozen=True)
class Row:
    """A model of a table.

    group: "scratch" (all views), "adapted" (from a base, views beyond 45 degrees), "recipe" (from scratch, other
    losses), "views" (several views of a person, from a model that sees one) or "guide" (its recipe, nothing chosen).
    options: changes of the config. build: makes the model, if it is not the one that the config describes.
    """

    group: str
    options: dict[str, Any] = field(default_factory=dict)
    build: Build | None = None


def _mlp(hidden: int) -> Row:
    return Row("scratch", build=lambda config, faces: MLP(faces.feature_dim, hidden, config.dropout))


def _changed(change: Callable[[EnhancedTransformerDecoderOnly3D, FaceViews], None]) -> Build:
    """Builds the model that the config describes, with a change."""

    def build(config: TrainConfig, faces: FaceViews) -> nn.Module:
        model, _ = prepare_model(config, faces.feature_dim)
        change(model, faces)
        return model

    return build


def _projection(model: EnhancedTransformerDecoderOnly3D) -> LightweightFaceProjectionLayer:
    assert model.projection is not None
    return model.projection


def _misled(mistake: controls.Mistake) -> Build:
    def change(model: EnhancedTransformerDecoderOnly3D, faces: FaceViews) -> None:
        own = to_face_frame(normalise_keypoints(faces.keypoints_3d[:]), faces.angles)
        model.projection = controls.MisledProjection(_projection(model), mistake, own.mean(0))  # type: ignore

    return _changed(change)


def _plain(model: EnhancedTransformerDecoderOnly3D, faces: FaceViews) -> None:
    layer = _projection(model)
    count, width = sum(p.numel() for p in layer.parameters()), layer.feature_dim
    model.projection = controls.PlainProjection(width, (count - width) // (2 * width + 37))  # type: ignore[assignment]


def _dense(how: Any) -> Build:
    def change(model: EnhancedTransformerDecoderOnly3D, faces: FaceViews) -> None:
        layer = _projection(model)
        sizes = layer.feature_dim, layer.num_keypoints, layer.voxel_resolution
        model.projection = controls.KeypointDensity(*sizes, how=how)

    return _changed(change)


def _dora(model: EnhancedTransformerDecoderOnly3D, faces: FaceViews) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("DoRA is PEFT's: pip install 'viewdiff_nb[peft]', or leave its row out") from error

    names = ["query", "key", "value", "out"]
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=names, use_dora=True), model)


def _prior(weight: float, *terms: str) -> dict[str, Any]:
    chosen = {"prior_terms": terms} if terms else {}
    return {"use_prior_preservation": True, "lambda_prior": weight} | chosen


def lora(rank: int, alpha: float | None = None, **more: Any) -> dict[str, Any]:
    return {"use_lora_attention": True, "freeze_base": True, "rank": rank, "lora_alpha": alpha or float(rank)} | more


SMALL = {"d_model": 256, "num_layers": 2, "dim_feedforward": 512}
PROJECTION = {"use_projection_layer": True, "voxel_resolution": 8, "freeze_base": True}
SCRATCH_PROJECTION = {"use_projection_layer": True, "voxel_resolution": 8}
BOTH = lora(8) | PROJECTION
VIEWS = BOTH | {"use_cross_view": True, "batch_size": VIEW_BATCH, "mixup": False}
GUIDE = {"loss": "mse", "mixup": False, "batch_size": 32, "lr": 1e-4, "lora_lr": 1e-3, "dropout": 0.1}
VIEW_COUNTS = (2, 3, 5)
ROWS: dict[str, Row] = {
    "MLP, 256 wide": _mlp(256),
    "MLP, 1024 wide": _mlp(1024),
    "MLP, 2048 wide": _mlp(2048),
    "DREAM": Row("scratch", build=lambda config, faces: DREAM(faces.feature_dim)),
    "small transformer": Row("scratch", SMALL),
    "small transformer + projection": Row("scratch", SMALL | SCRATCH_PROJECTION),
    "transformer": Row("scratch"),
    "transformer + projection": Row("scratch", SCRATCH_PROJECTION),
    "full fine-tuning": Row("adapted"),
    **{f"full fine-tuning + prior {w:g}": Row("adapted", _prior(w)) for w in (0.1, 1, 10)},
    **{f"full fine-tuning + prior 1, {t} only": Row("adapted", _prior(1, t)) for t in ("kl", "feature", "l2")},
    "last layer only": Row("adapted", build=_changed(lambda m, _: controls.train_only(m, (), ("output",)))),
    "biases only (BitFit)": Row("adapted", build=_changed(lambda m, _: controls.train_only(m, ("bias",)))),
    "bottleneck adapters, 16 wide": Row("adapted", build=_changed(lambda m, _: controls.add_bottlenecks(m, 16))),
    "DoRA r=8 (PEFT)": Row("adapted", build=_changed(_dora)),
    "LoRA r=4": Row("adapted", lora(4)),
    "LoRA r=8": Row("adapted", lora(8)),
    "LoRA r=16": Row("adapted", lora(16)),
    "LoRA r=19": Row("adapted", lora(19)),
    "rsLoRA r=16": Row("adapted", lora(16, 64.0)),  # alpha / r = 16 / sqrt(16), the scale of rsLoRA with alpha = rank
    "LoRA r=8 without pose": Row("adapted", lora(8, pose_dim=0)),
    "LoRA r=8 on feed-forward": Row("adapted", lora(8, lora_targets=("feed_forward",))),
    "LoRA r=8 on both": Row("adapted", lora(8, lora_targets=("attention", "feed_forward"))),
    **{f"LoRA r=8 + prior {w:g}": Row("adapted", lora(8) | _prior(w)) for w in (0.1, 1, 10)},
    "projection": Row("adapted", PROJECTION),
    "projection, another person's keypoints": Row("adapted", PROJECTION, _misled("another person's keypoints")),
    "projection, mean keypoints": Row("adapted", PROJECTION, _misled("mean keypoints")),
    "projection, pose not undone": Row("adapted", PROJECTION, _misled("pose not undone")),
    "projection, another pose": Row("adapted", PROJECTION, _misled("another pose")),
    "projection, density starts at keypoints": Row("adapted", PROJECTION, _dense("start")),
    "projection, density kept near keypoints": Row("adapted", PROJECTION, _dense("carve")),
    "projection, density drawn to keypoints": Row("adapted", PROJECTION, _dense("draw")),
    "plain layer": Row("adapted", PROJECTION, _changed(_plain)),
    "LoRA r=8 + projection": Row("adapted", BOTH),
    "LoRA r=8 + projection 16³": Row("adapted", BOTH | {"voxel_resolution": 16}),
    "LoRA r=8 + plain layer": Row("adapted", BOTH, _changed(_plain)),
    "LoRA r=8 + projection + prior 0.1": Row("adapted", BOTH | _prior(0.1)),
    "loss mse": Row("recipe", SMALL | {"loss": "mse", "mixup": False}),
    "loss mse, mix-up": Row("recipe", SMALL | {"loss": "mse"}),
    "loss cosine, mix-up": Row("recipe", SMALL | {"loss": "cosine"}),
    "loss identity": Row("recipe", SMALL | {"loss": "identity", "mixup": False}),
    "loss identity, mix-up": Row("recipe", SMALL | {"loss": "identity"}),
    "loss identity + margin, mix-up": Row("recipe", SMALL | {"loss": "identity+margin"}),
    "loss two-way": Row("recipe", SMALL | {"mixup": False}),
    "loss two-way + pairs, mix-up": Row("recipe", SMALL | {"loss": "two-way+pairs", "paired_views": True}),
    **{f"cross-view, {v} views": Row("views", VIEWS | {"n_views": v}) for v in VIEW_COUNTS},
    **{
        f"cross-view, {v} views that do not meet": Row(
            "views", VIEWS | {"n_views": v}, _changed(lambda m, _: controls.separate_views(m))
        )
        for v in VIEW_COUNTS
    },
    "guide: full fine-tuning": Row("guide", GUIDE),
    "guide: LoRA r=8": Row("guide", GUIDE | lora(8)),
    "guide: LoRA r=8 + projection 16³": Row("guide", GUIDE | BOTH | {"voxel_resolution": 16}),
}


def rows_of(*groups: str) -> list[str]:
    return [name for name, row in ROWS.items() if row.group in groups]
