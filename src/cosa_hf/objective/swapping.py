"""The swap: CAM pseudo-labels supervise the segmentation (CAM2Seg), segmentation pseudo-labels the CAMs (Seg2CAM)."""

import torch.nn.functional as F
from torch import Tensor

from cosa_hf.objective.precision import at_least_float32
from cosa_hf.objective.upsampled import upsampled_cross_entropy


def cam2seg_loss(seg_logits: Tensor, cpl: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of the segmentation against CAM pseudo-labels, weighted by their reliability (Eq. 5).

    Args:
        seg_logits: S of the online network, (B, K, h, w); resized bilinearly to the pseudo-labels.
        cpl: class ids (B, H, W), in [0, K) also where the weight is 0.
        weights: (B, H, W), normalised over the step: see `Targets`.

    Returns:
        Scalar, the weighted sum; exactly 0, with a gradient graph, where all weights are 0.

    Example:
        >>> import torch
        >>> weights = torch.full((1, 8, 8), 1 / 64)
        >>> round(cam2seg_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 8, dtype=torch.long), weights).item(), 4)
        1.3863
    """
    return upsampled_cross_entropy(at_least_float32(seg_logits), cpl, weights)


def seg2cam_loss(cam_logits: Tensor, spl: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(M) against the foreground of the segmentation pseudo-labels (Eq. 8).

    Args:
        cam_logits: M of the online network, (B, C, h, w), before any activation.
        spl: probabilities, (B, K, h, w), background first.
        weights: (B, h, w), normalised over the step: see `Targets`.

    Returns:
        Scalar: the mean over the C classes, the weighted sum over positions.

    Example:
        >>> import torch
        >>> spl = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        >>> round(seg2cam_loss(torch.zeros(1, 1, 1, 1), spl, torch.ones(1, 1, 1)).item(), 4)
        0.6931
    """
    cam_logits = at_least_float32(cam_logits)
    loss = F.binary_cross_entropy_with_logits(cam_logits, spl[:, 1:].to(cam_logits.dtype), reduction="none")
    return (loss.mean(dim=1) * weights).sum()
