"""The one description of a training run: shell flags, notebooks and checkpoints share it."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

LORA_TARGETS = ("attention", "feed_forward")
LOSS_NAMES = ("mse", "cosine", "identity", "identity+cosine", "identity+margin", "two-way", "two-way+pairs")
MONITORED = {"val_loss": min, "val_cosine": max, "val_rank1": max, "val_tar": max}  # and which of two is better
ARCHITECTURE = (
    "use_lora_attention",
    "use_projection_layer",
    "use_cross_view",
    "d_model",
    "nhead",
    "num_layers",
    "dim_feedforward",
    "dropout",
    "pose_dim",
    "n_views",
    "rank",
    "lora_alpha",
    "lora_targets",
    "voxel_resolution",
)  # what `build_model` builds from
LARGEST_INTEGER = 2**63 - 1  # that torch takes as a seed or a size


def _between(low: float, high: float) -> tuple[Callable[[float], bool], str]:
    return lambda value: low <= value <= high, f"from {low:,} to {high:,}"


LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("d_model", "dim_feedforward", "rank", "voxel_resolution"), _between(1, 65_536)),
    **dict.fromkeys(("num_layers", "nhead", "n_views", "devices"), _between(1, 1024)),
    "num_workers": _between(0, 1024),
    "batch_size": _between(1, 2**31 - 1),
    **dict.fromkeys(
        ("epochs", "gradient_accumulation_steps", "save_every", "val_every", "patience"), _between(1, 10**9)
    ),
    **dict.fromkeys(("val_people", "test_people"), _between(2, 2**31 - 1)),
    **dict.fromkeys(("seed", "split_seed"), _between(0, LARGEST_INTEGER)),
    **dict.fromkeys(("lr", "lora_lr", "lora_alpha", "clip_norm"), (lambda value: value > 0, "above 0")),
    **dict.fromkeys(("lambda_prior", "weight_decay", "save_minutes", "min_yaw"), (lambda value: value >= 0, ">= 0")),
    **dict.fromkeys(("dropout", "warmup"), (lambda value: 0 <= value < 1, "in [0, 1)")),
    "prior_fraction": (lambda value: 0 < value <= 1, "in (0, 1]"),
}
"""For each field with limits, the values that it may have, as a test and in words."""


def _check_kind(name: str, value: object, kinds: tuple) -> None:
    """
    Args:
        kinds: the types that the field may have.

    Raises:
        ValueError: if value is no whole number, no finite number, or an empty path.
    """
    if value is None and type(None) in kinds:
        return
    if int in kinds and type(value) is not int:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if float in kinds and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if bool in kinds and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    if str in kinds and (not isinstance(value, str) or not value):
        raise ValueError(f"{name} must be a name or a path, got {value!r}; leave it out for none")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Field names are the flags of the command line."""

    data_dir: str = "data/heads"
    """Folder with the six files of a face set."""
    val_people: int | None = None
    """People kept out of training to validate, by default 10 %, of small sets more; drawn by split_seed, so they stay
    the same for every --seed."""
    test_people: int | None = None
    """People kept out of training for a test, by default 15 %, of small sets more."""
    split_seed: int = 0
    split_file: str | None = None
    """A split written by `save_split`, instead of drawing one."""
    min_yaw: float = 0.0
    """Train on side views with min_yaw <= |yaw| < max_yaw, degrees; 180 is no limit."""
    max_yaw: float = 180.0

    d_model: int = 512
    nhead: int = 8
    num_layers: int = 4
    dim_feedforward: int = 1280
    dropout: float = 0.1
    pose_dim: int = 3
    use_lora_attention: bool = False
    use_projection_layer: bool = False
    use_cross_view: bool = False
    n_views: int = 5
    """Views per person in a batch, with use_cross_view."""
    paired_views: bool = False
    """Two views of each person in a batch, which the loss two-way+pairs asks for."""
    rank: int = 4
    lora_alpha: float = 1.0
    """Scale of the LoRA update, alpha / rank."""
    lora_targets: tuple[Literal["attention", "feed_forward"], ...] = ("attention",)
    voxel_resolution: int = 16

    use_prior_preservation: bool = False
    lambda_prior: float = 0.1
    prior_max_yaw: float = 45.0
    """The prior set: training views with |yaw| below this, whose base predictions are preserved."""
    prior_fraction: float = 0.25
    """Prior samples per batch, as a share of batch_size."""
    base_model_path: str | None = None
    """Checkpoint of the base model to adapt."""
    freeze_base: bool | None = None
    """Train only what is added to the base model; by default, if a base is given and LoRA is used."""

    loss: Literal[*LOSS_NAMES] = "two-way"
    """Task loss; mse is the guide's."""
    mixup: bool = False
    """Train on mixtures of different people with about the same yaw."""
    epochs: int = 100
    batch_size: int = 32
    num_workers: int = 0
    """Processes that read ahead; data that fits the device needs none."""
    lr: float = 1e-4
    """Learning rate of base parameters and of cross-view attention."""
    lora_lr: float = 1e-3
    """Learning rate of LoRA and projection parameters."""
    weight_decay: float = 1e-2
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; then it falls along a cosine to 1 % of itself."""
    gradient_accumulation_steps: int = 1
    clip_norm: float = 1.0
    use_amp: bool = False
    """Mixed precision: bfloat16 where the device has it, else float16 with a gradient scaler."""
    use_cuda_graph: bool = False
    """Replay each step as one CUDA graph: on a GPU, small batches train many times as fast. No other thread may use the
    GPU while it is recorded, which takes a tenth of a second."""
    device: str = "auto"
    devices: int = 1
    """Processes with a device each, which share every batch; or start the program with torchrun."""
    seed: int = 0

    save_dir: str | None = None
    log_dir: str | None = None
    save_every: int = 10
    """Epochs between periodic checkpoints."""
    save_minutes: float = 5.0
    """At most so much work is lost: minutes between writes of last_enhanced.pth, also within an epoch."""
    val_every: int = 1
    """Epochs between validations; the last epoch always has one."""
    monitor: Literal[*MONITORED] = "val_loss"
    """What the best checkpoint is the best by."""
    patience: int | None = None
    """Stop early after so many validations without a better one; by default never."""
    resume: str | None = None
    """Checkpoint to go on from, a folder of them, or auto: the newest in save_dir, if there is one. With more epochs
    than before, the learning rate follows the longer cosine."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), os.PathLike):
                object.__setattr__(self, field.name, os.fspath(value))
            _check_kind(field.name, getattr(self, field.name), get_args(field.type) or (field.type,))
        if isinstance(self.lora_targets, list):
            object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for name, (holds, range_) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {range_}, got {value}")
        for name, choices in (("monitor", MONITORED), ("loss", LOSS_NAMES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for is_wrong, what in self._contradictions():
            if is_wrong:
                raise ValueError(what)

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        """What must not be the case, and what to say if it is."""
        yield self.d_model % self.nhead > 0, f"d_model must be a multiple of nhead={self.nhead}, got {self.d_model}"
        narrowest = min(self.d_model, self.dim_feedforward) if "feed_forward" in self.lora_targets else self.d_model
        yield (
            self.use_lora_attention and self.rank > narrowest,
            (
                f"rank must not exceed {narrowest}, the narrowest adapted layer (d_model={self.d_model}, "
                f"dim_feedforward={self.dim_feedforward}), got {self.rank}"
            ),
        )
        yield (
            self.use_lora_attention and not self.lora_targets,
            ("use_lora_attention without lora_targets adapts nothing; name attention or feed_forward"),
        )
        unknown = set(self.lora_targets) - set(LORA_TARGETS)
        yield bool(unknown), f"lora_targets must be of {', '.join(LORA_TARGETS)}, got {self.lora_targets!r}"
        yield (
            self.pose_dim not in (0, 3),
            (f"pose_dim must be 3 (the data has pitch, yaw, roll) or 0, got {self.pose_dim}"),
        )
        yield not self.min_yaw < self.max_yaw, f"min_yaw must be below max_yaw, got {self.min_yaw} and {self.max_yaw}"
        yield (
            self.resume == "auto" and not self.save_dir,
            ("resume auto looks for the newest checkpoint in save_dir; give save_dir"),
        )
        yield (
            self.use_prior_preservation and not self.base_model_path,
            ("prior preservation needs the base model that is to be preserved: give base_model_path"),
        )
        yield (
            bool(self.freeze_base) and not self.base_model_path,
            ("freeze_base without base_model_path would freeze random weights; give a base model"),
        )
        yield (
            self.use_prior_preservation and self.use_cross_view,
            (
                "prior samples are single views and cannot stand in a batch of n_views views of a person; "
                "use either use_prior_preservation or use_cross_view"
            ),
        )
        yield (
            self.mixup and self.use_cross_view,
            ("mixup mixes single views, not groups of views of a person; use either mixup or use_cross_view"),
        )
        yield (
            self.use_cross_view and self.batch_size % self.n_views > 0,
            (
                f"batch_size must be a multiple of n_views={self.n_views} (批次大小必须是n_views的倍数), "
                f"got {self.batch_size}"
            ),
        )
        yield (
            self.paired_views and (self.use_cross_view or self.batch_size % 2 > 0),
            (
                f"paired_views needs an even batch_size, got {self.batch_size}, and no use_cross_view, which has n_views "
                "of each person"
            ),
        )
        yield (
            self.use_cuda_graph and self.gradient_accumulation_steps > 1,
            (
                "use_cuda_graph replays whole steps of one batch, and gradient_accumulation_steps is "
                f"{self.gradient_accumulation_steps}; give --no-use_cuda_graph"
            ),
        )

    @property
    def views_together(self) -> int:
        """How many views of a person lie next to each other in a batch."""
        return self.n_views if self.use_cross_view else 1 + self.paired_views

    def prior_count(self, batch_size: int) -> int:
        """Prior samples that go with a batch."""
        return max(1, round(self.prior_fraction * batch_size))

    @property
    def freezes_base(self) -> bool:
        if self.freeze_base is not None:
            return self.freeze_base
        return self.base_model_path is not None and self.use_lora_attention

    def to_dict(self) -> dict:
        return asdict(self)
