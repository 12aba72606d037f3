"""Training: one loop, its config, and what it leaves."""

from viewdiff_nb.training.checkpoint import load_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import choose_device
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.one_pass import train_together
from viewdiff_nb.training.result import (
    StopRequest,
    TrainingAdvice,
    TrainingDiverged,
    TrainingInterrupted,
    TrainResult,
    evaluate,
    predict,
)

__all__ = [
    "StopRequest",
    "TrainConfig",
    "TrainResult",
    "TrainingAdvice",
    "TrainingDiverged",
    "TrainingInterrupted",
    "choose_device",
    "evaluate",
    "load_model",
    "predict",
    "train",
    "train_together",
]
