"""What guides the CAMs: segmentation pseudo-labels (Eq. 7), or one of the oracles that Fig. 1 compares them with."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_hf.objective.pseudo_labels import segmentation_pseudo_labels


def seg2cam_target(
    source: Literal["none", "spl", "gt", "noise"],
    seg_logits: Tensor,
    labels: Tensor,
    temperature: float = 0.01,
    masks: Tensor | None = None,
) -> Tensor:
    """Class probabilities that Seg2CAM (Eq. 8) holds the CAMs to.

    Args:
        source: `spl`, the method, and what `none` computes in vain; `gt`, true masks; `noise`, masks of random noise,
            drawn anew at every call: each token is background or one of the tagged classes, all equally likely.
        seg_logits: S' of the assignment network, (B, K, h, w).
        labels: multi-hot tags, (B, C).
        temperature: tau of Eq. 7.
        masks: class ids (B, H, W), 255 where unknown; read for `gt` alone.

    Returns:
        (B, K, h, w), background first. All zero where nothing is known.

    Example:
        >>> noise = seg2cam_target("noise", torch.zeros(1, 4, 8, 8), torch.tensor([[1, 0, 1]]))
        >>> noise.argmax(dim=1).unique().tolist()  # never the second class
        [0, 1, 3]
    """
    if source == "gt":
        assert masks is not None
        return mask_probabilities(masks, seg_logits.shape[1], seg_logits.shape[-2:])
    if source == "noise":
        seg_logits = torch.rand_like(seg_logits)
    return segmentation_pseudo_labels(seg_logits, labels, temperature)


def mask_probabilities(masks: Tensor, num_labels: int, grid: torch.Size) -> Tensor:
    """Each class's share of the known pixels of each token, (B, K, h, w); all zero where no pixel is known.

    Args:
        masks: class ids (B, H, W); any id beyond the classes, as 255, is unknown.
        num_labels: K, background included.
        grid: h and w.

    Example:
        >>> masks = torch.tensor([[[1, 1, 255, 255], [1, 0, 255, 255]]])
        >>> mask_probabilities(masks, 2, torch.Size((1, 2))).flatten(1).tolist()
        [[0.25, 0.0, 0.75, 0.0]]
    """
    ids = torch.arange(num_labels, device=masks.device)
    fractions = F.interpolate((masks[:, None] == ids.view(-1, 1, 1)).float(), size=grid, mode="area")
    return fractions / fractions.sum(dim=1, keepdim=True).clamp_min(torch.finfo(fractions.dtype).tiny)
