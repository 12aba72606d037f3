"""Task losses between predicted and true frontal embeddings.

Which one recognises people best was measured on validation people; see notebook 04.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
TEMPERATURE = 0.05  # of the softmax over people; cosines differ by a few tenths


def mse(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """The guide's loss: mean squared error per dimension."""
    return F.mse_loss(predicted, gallery[person])


def cosine(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """1 - cos. Alone it draws predictions toward the mean face."""
    return (1 - F.cosine_similarity(predicted, gallery[person], dim=-1)).mean()


def identity(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """Cross-entropy of telling the person among all training people: softmax_p(cos(predicted, front_p) / T)."""
    logits = F.normalize(predicted, dim=-1) @ F.normalize(gallery, dim=-1).T / TEMPERATURE
    return F.cross_entropy(logits, person)


def identity_cosine(predicted: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """identity + 0.2 cosine."""
    return identity(predicted, gallery, person) + 0.2 * cosine(predicted, gallery, person)


LOSSES: dict[str, Loss] = {"mse": mse, "cosine": cosine, "identity": identity, "identity+cosine": identity_cosine}
"""Each takes predicted (B, D), the training people's frontal embeddings gallery (P, D) and person (B,)."""
