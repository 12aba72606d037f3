"""The one description of a training run: shell flags, notebooks and checkpoints share it."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, get_args

LossName = Literal["mse", "cosine", "identity", "identity+cosine", "identity+margin", "two-way", "two-way+pairs"]
LoraTarget = Literal["attention", "feed_forward"]
PriorTerm = Literal["kl", "feature", "l2"]
Monitored = Literal["val_loss", "val_cosine", "val_rank1", "val_tar"]
LOSS_NAMES, LORA_TARGETS, PRIOR_TERMS = get_args(LossName), get_args(LoraTarget), get_args(PriorTerm)
MONITORED = {"val_loss": min, "val_cosine": max, "val_rank1": max, "val_tar": max}  # and which of two is better

Check = tuple[Callable[[Any], bool], str]
"""Whether a value is as wanted, and what is wanted."""


def _between(low: int, high: int) -> Check:
    return lambda value: low <= value <= high, f"from {low:,} to {high:,}"


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


KINDS: dict[object, Check] = {
    int: (lambda value: type(value) is int, "a whole number"),
    float: (_is_finite, "a finite number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (lambda value: isinstance(value, str) and value != "", "a name or a path (leave it out for none)"),
}
LIMITS: dict[str, Check] = {
    **dict.fromkeys(("d_model", "dim_feedforward", "rank", "voxel_resolution"), _between(1, 65_536)),
    **dict.fromkeys(("num_layers", "nhead", "n_views", "devices"), _between(1, 1024)),
    **dict.fromkeys(("epochs", "save_every", "val_every", "patience"), _between(1, 10**9)),
    **dict.fromkeys(("val_people", "test_people"), _between(2, 2**31 - 1)),
    **dict.fromkeys(("seed", "split_seed"), _between(0, 2**63 - 1)),  # what torch takes
    **dict.fromkeys(("lr", "lora_lr", "lora_alpha", "clip_norm"), (lambda value: value > 0, "above 0")),
    **dict.fromkeys(("lambda_prior", "weight_decay", "save_minutes", "min_yaw"), (lambda value: value >= 0, ">= 0")),
    **dict.fromkeys(("dropout", "warmup"), (lambda value: 0 <= value < 1, "in [0, 1)")),
    "prior_fraction": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "batch_size": _between(1, 2**31 - 1),
    "gradient_accumulation_steps": _between(1, 10**9),
    "num_workers": _between(0, 1024),
    "pose_dim": (lambda value: value in (0, 3), "3 (the data has pitch, yaw, roll) or 0"),
    "lora_targets": (lambda value: set(value) <= set(LORA_TARGETS), f"of {', '.join(LORA_TARGETS)}"),
    "prior_terms": (lambda value: len(value) > 0 and set(value) <= set(PRIOR_TERMS), f"of {', '.join(PRIOR_TERMS)}"),
    "loss": (lambda value: value in LOSS_NAMES, f"one of {', '.join(LOSS_NAMES)}"),
    "monitor": (lambda value: value in MONITORED, f"one of {', '.join(MONITORED)}"),
}


@cache
def _checks(config: type) -> list[tuple[str, bool, list[Check]]]:
    """Of each field of a config's class: its name, whether None will do, and what a value is checked for."""
    found = []
    for field in fields(config):
        kinds = get_args(field.type) or (field.type,)
        checks = [KINDS[kind] for kind in kinds if kind in KINDS]
        found.append((field.name, type(None) in kinds, checks + [LIMITS[n] for n in (field.name,) if n in LIMITS]))
    return found


@dataclass(frozen=True, kw_only=True)
class Data:
    """Whose views."""

    data_dir: str = "data/heads"
    """Folder with the six files of a face set."""
    val_people: int | None = None
    """Kept out of training to validate, by default 10 %, of small sets more; drawn by split_seed, whatever the seed."""
    test_people: int | None = None
    """Kept out of training for a test, by default 15 %, of small sets more."""
    split_seed: int = 0
    """Draws who validates and who is kept for a test."""
    split_file: str | None = None
    """A split written by `save_split`, instead of drawing one."""
    min_yaw: float = 0.0
    """Train on side views with min_yaw <= |yaw| < max_yaw, degrees."""
    max_yaw: float = 180.0
    """180 is no limit."""
    paired_views: bool = False
    """Two views of each person in a batch, which the loss two-way+pairs asks for."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The model: what `build_model` builds from."""

    use_lora_attention: bool = False
    """Adapt the attention by LoRA, conditioned on the head pose."""
    use_projection_layer: bool = False
    """Add the light 2D-3D-2D face projection."""
    use_cross_view: bool = False
    """Let n_views views of a person attend to each other."""
    d_model: int = 512
    """Width of the tokens; a multiple of nhead."""
    nhead: int = 8
    """Attention heads."""
    num_layers: int = 4
    """Decoder blocks."""
    dim_feedforward: int = 1280
    """Width of the blocks' MLPs."""
    dropout: float = 0.1
    """Share of the blocks' activations that a step leaves out."""
    pose_dim: int = 3
    """Angles that condition the LoRA attention: 3, or 0 for none."""
    n_views: int = 5
    """Views per person in a batch, with use_cross_view."""
    rank: int = 4
    """Of LoRA; guide: 4 to 16, 8 for most."""
    lora_alpha: float = 1.0
    """Scale of the LoRA update, alpha / rank; guide: as large as the rank."""
    lora_targets: tuple[LoraTarget, ...] = ("attention",)
    """What LoRA adapts."""
    voxel_resolution: int = 16
    """Of the projection, a side; guide: 16, or 8 where memory is short."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What becomes of a base model."""

    base_model_path: str | None = None
    """Checkpoint of the base model to adapt."""
    freeze_base: bool | None = None
    """Train only what is added to the base model; by default, if a base is given and LoRA is used."""
    use_prior_preservation: bool = False
    """Hold the model to what its base says of near-frontal views."""
    lambda_prior: float = 0.1
    """Weight of that; guide: 0.1, from 0.05 (changes more) to 0.2 (keeps more)."""
    prior_terms: tuple[PriorTerm, ...] = ("kl", "feature", "l2")
    """What is held: whom a prediction resembles, its direction, itself."""
    prior_max_yaw: float = 45.0
    """The prior set: training views with |yaw| below this, whose base predictions are preserved."""
    prior_fraction: float = 0.25
    """Prior samples per batch, as a share of batch_size."""


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """The training itself."""

    loss: LossName = "two-way"
    """Task loss; mse is the guide's."""
    mixup: bool = False
    """Train on mixtures of different people with about the same yaw."""
    epochs: int = 100
    """Guide: 50 to 200."""
    batch_size: int = 32
    """Guide: 16 to 64, by memory."""
    num_workers: int = 0
    """Processes that read ahead; data that fits the device needs none."""
    lr: float = 1e-4
    """Learning rate of base parameters and of cross-view attention; guide: 1e-4."""
    lora_lr: float = 1e-3
    """Learning rate of LoRA and projection parameters; guide: ten times lr."""
    weight_decay: float = 1e-2
    """Of AdamW."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; then it falls along a cosine to 1 % of itself."""
    gradient_accumulation_steps: int = 1
    """Batches to a step of the optimiser; guide: 1 to 4, where a larger batch does not fit."""
    clip_norm: float = 1.0
    """Longest gradient."""
    use_amp: bool = False
    """Mixed precision: bfloat16 where the device has it, else float16 with a gradient scaler; guide: on."""
    use_cuda_graph: bool = False
    """Replay each step as one CUDA graph: on a GPU, small batches train many times as fast. No other thread may use the
    GPU while it is recorded, which takes a tenth of a second."""
    use_compile: bool = False
    """Let torch.compile make one program of model and loss: on a GPU faster steps, after half a minute."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto: the first GPU, if there is one."""
    devices: int = 1
    """Processes with a device each, which share every batch; the command line starts them, elsewhere torchrun does."""
    seed: int = 0
    """Of weights, order and dropout."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is kept, and when."""

    save_dir: str | None = None
    """Folder of checkpoints and of the best weights; of the command by default a dated one under runs/."""
    log_dir: str | None = None
    """Folder of TensorBoard's events."""
    save_every: int = 10
    """Epochs between periodic checkpoints."""
    save_minutes: float = 5.0
    """At most so much work is lost: minutes between writes of last_enhanced.pth, also within an epoch."""
    val_every: int = 1
    """Epochs between validations; the last epoch always has one."""
    monitor: Monitored = "val_loss"
    """What the best checkpoint is the best by."""
    patience: int | None = None
    """Stop early after so many validations without a better one; by default never."""
    resume: str | None = None
    """Checkpoint to go on from, a folder of them, or auto: the newest in save_dir, if any. With more epochs than it had
    the learning rate follows the longer cosine."""


ARCHITECTURE = tuple(field.name for field in fields(Architecture))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Files, Optimisation, Adaptation, Architecture, Data):
    """A training run. Field names are the flags of the command line."""

    def __post_init__(self) -> None:
        for name, may_lack, checks in _checks(type(self)):  # type: ignore[arg-type] # a class has a hash
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, value := os.fspath(value))
            elif isinstance(value, list):
                object.__setattr__(self, name, value := tuple(value))
            if value is None and may_lack:
                continue
            for is_wanted, wanted in checks:
                if not is_wanted(value):
                    raise ValueError(f"{name} must be {wanted}, got {value!r}")
        for message, is_so in self._contradictions().items():
            if is_so:
                raise ValueError(message)

    def _contradictions(self) -> dict[str, bool]:
        """What to say of fields that do not go together, and whether to say it."""
        narrowest = min(self.d_model, self.dim_feedforward) if "feed_forward" in self.lora_targets else self.d_model
        return {
            f"d_model must be a multiple of nhead={self.nhead}, got {self.d_model}": self.d_model % self.nhead > 0,
            f"rank must not exceed {narrowest}, the width of the narrowest adapted layer (d_model={self.d_model}, "
            f"dim_feedforward={self.dim_feedforward}), got {self.rank}": (
                self.use_lora_attention and self.rank > narrowest
            ),
            "use_lora_attention adapts nothing; name attention or feed_forward in lora_targets": (
                self.use_lora_attention and not self.lora_targets
            ),
            f"min_yaw must be below max_yaw, got {self.min_yaw} and {self.max_yaw}": self.min_yaw >= self.max_yaw,
            "resume auto looks in save_dir; give save_dir": self.resume == "auto" and not self.save_dir,
            "prior preservation needs the base model that is to be preserved; give base_model_path": (
                self.use_prior_preservation and not self.base_model_path
            ),
            "freeze_base would freeze random weights; give base_model_path": (
                bool(self.freeze_base) and not self.base_model_path
            ),
            "prior samples are single views and cannot stand in a batch of n_views views of a person; "
            "use either use_prior_preservation or use_cross_view": self.use_prior_preservation and self.use_cross_view,
            "mixup mixes single views, not groups of n_views; use either mixup or use_cross_view": (
                self.mixup and self.use_cross_view
            ),
            f"batch_size must be a multiple of n_views={self.n_views} (批次大小必须是n_views的倍数), "
            f"got {self.batch_size}": self.use_cross_view and self.batch_size % self.n_views > 0,
            f"paired_views needs an even batch_size, got {self.batch_size}": self.paired_views
            and self.batch_size % 2 > 0,
            "use either paired_views or use_cross_view, which has n_views of each": self.paired_views
            and self.use_cross_view,
            f"use_cuda_graph records one batch, and gradient_accumulation_steps is {self.gradient_accumulation_steps}; "
            "give --no-use_cuda_graph": self.use_cuda_graph and self.gradient_accumulation_steps > 1,
            f"use_compile is for one process, and devices is {self.devices}; give --no-use_compile": self.use_compile
            and self.devices > 1,
        }

    @property
    def views_together(self) -> int:
        """How many views of a person lie next to each other in a batch."""
        return self.n_views if self.use_cross_view else 1 + self.paired_views

    @property
    def freezes_base(self) -> bool:
        adapts = self.base_model_path is not None and self.use_lora_attention
        return adapts if self.freeze_base is None else self.freeze_base

    def prior_count(self, batch_size: int) -> int:
        """Prior samples that go with a batch."""
        return max(1, round(self.prior_fraction * batch_size))

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))
