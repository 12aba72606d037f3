"""ViewDiff-style modules that turn side-view face embeddings into frontal ones, for notebooks."""

from .modules.attention import CrossViewAttention, PoseConditionedLoRAAttention
from .modules.lora import LoRALinearLayer
from .modules.prior import EnhancedTransformerWithPrior, PriorPreservationDataset, PriorPreservationLoss
from .modules.projection import LightweightFaceProjectionLayer
from .modules.transformer import EnhancedTransformerDecoderOnly3D

__version__ = "0.1.0"

__all__ = [
    "CrossViewAttention",
    "EnhancedTransformerDecoderOnly3D",
    "EnhancedTransformerWithPrior",
    "LightweightFaceProjectionLayer",
    "LoRALinearLayer",
    "PoseConditionedLoRAAttention",
    "PriorPreservationDataset",
    "PriorPreservationLoss",
]
