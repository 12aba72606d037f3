"""ViewDiff-style modules that turn side-view face embeddings into frontal ones, for notebooks."""

from viewdiff_nb.modules.attention import CrossViewAttention, PoseConditionedLoRAAttention
from viewdiff_nb.modules.lora import LoRALinearLayer
from viewdiff_nb.modules.prior import EnhancedTransformerWithPrior, PriorPreservationDataset, PriorPreservationLoss
from viewdiff_nb.modules.projection import LightweightFaceProjectionLayer
from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D

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
