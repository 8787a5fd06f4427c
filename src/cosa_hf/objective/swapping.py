"""The swap: CAM pseudo-labels teach the segmentation (CAM2Seg), segmentation pseudo-labels the CAMs (Seg2CAM)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_hf.objective.precision import at_least_float32
from cosa_hf.objective.reliability import ProcessMean, single_process
from cosa_hf.objective.upsampled import upsampled_cross_entropy


def cam2seg_loss(
    seg_logits: Tensor,
    pseudo_labels: Tensor,
    weights: Tensor | None = None,
    ignore_index: int = 255,
    mean: ProcessMean = single_process,
    balanced: bool = False,
) -> Tensor:
    """Cross-entropy of the segmentation against CAM pseudo-labels, weighted by their reliability (Eq. 5).

    Args:
        seg_logits: S of the online network, (B, K, h, w); resized bilinearly to the pseudo-labels.
        pseudo_labels: class ids (B, H, W), `ignore_index` where nothing is known.
        weights: (B, H, W) from `reliability_weights`; None weighs all pixels alike.
        ignore_index: the id that does not count.
        mean: makes the mean run over the global batch when there are several processes.
        balanced: half the mean over background plus half the mean over foreground (released code), rather than the
            mean over all pixels; a half without pixels is 0.

    Returns:
        Scalar; exactly 0, with a gradient graph, where every pixel is ignored.

    Example:
        >>> import torch
        >>> round(cam2seg_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 8, dtype=torch.long)).item(), 4)
        1.3863
    """
    seg_logits, known = at_least_float32(seg_logits), pseudo_labels != ignore_index
    if balanced:
        background = pseudo_labels == 0
        halves = (background, known & ~background)
        share = torch.stack([_share_of_mean(half, mean, seg_logits.dtype) for half in halves]).mean(dim=0)
    else:
        share = _share_of_mean(known, mean, seg_logits.dtype)
    if weights is not None:
        share = share * weights
    return upsampled_cross_entropy(seg_logits, pseudo_labels.masked_fill(~known, 0), share)


def seg2cam_loss(cam_logits: Tensor, segmentation: Tensor, valid: Tensor, mean: ProcessMean = single_process) -> Tensor:
    """Binary cross-entropy of sigmoid(M) against the foreground of the segmentation pseudo-labels (Eq. 8).

    Args:
        cam_logits: M of the online network, (B, C, h, w), before any activation.
        segmentation: SPL probabilities, (B, K, h, w), background first.
        valid: token positions that hold image, (B, h, w).
        mean: makes the mean run over the global batch when there are several processes.

    Returns:
        Scalar, averaged over the C classes and the valid positions; 0 where none is valid.

    Example:
        >>> import torch
        >>> spl = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        >>> round(seg2cam_loss(torch.zeros(1, 1, 1, 1), spl, torch.ones(1, 1, 1, dtype=torch.bool)).item(), 4)
        0.6931
    """
    cam_logits = at_least_float32(cam_logits)
    target = segmentation[:, 1:].to(cam_logits.dtype)
    loss = F.binary_cross_entropy_with_logits(cam_logits, target, reduction="none")
    return (loss.mean(dim=1) * _share_of_mean(valid, mean, loss.dtype)).sum()


def _share_of_mean(counted: Tensor, mean: ProcessMean, dtype: torch.dtype) -> Tensor:
    """What each position weighs in a mean over all that are `counted`, on all processes; 0 where nothing is."""
    count = mean(counted.sum().to(dtype))
    return counted / count.clamp_min(torch.finfo(count.dtype).tiny)
