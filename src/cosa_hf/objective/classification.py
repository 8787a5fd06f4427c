"""Eq. 1: what the image-level tags say about the whole image."""

import torch.nn.functional as F
from torch import Tensor

from cosa_hf.objective.precision import at_least_float32


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Multi-label soft margin of class logits against tags (Eq. 1).

    Args:
        logits: image-level class logits Z, (B, C).
        labels: multi-hot tags, (B, C), 1 where the image holds the class.

    Returns:
        Scalar: the mean over images and classes of the binary cross-entropy of sigmoid(Z).

    Example:
        >>> import torch
        >>> round(classification_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).item(), 4)
        0.6931
    """
    logits = at_least_float32(logits)
    return F.multilabel_soft_margin_loss(logits, labels.to(logits.dtype))
