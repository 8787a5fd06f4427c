"""What one optimiser step learns from: pseudo-labels as ids and weights, normalised over the whole step.

Every divisor of Eq. 5, 8 and 10 (RAW's mean, the number of valid positions, CSC's anchors) depends on pseudo-labels and
V alone, so it is known before the first forward pass. Here the weights are divided once, over all micro-batches and
processes of the step, and every loss is a plain weighted sum.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Takes a tensor of this process to its mean over all processes."""


def one_process(value: Tensor) -> Tensor:
    """The mean over processes where there is one."""
    return value


class Targets(NamedTuple):
    """Of a batch of B images. In the mean over micro-batches and processes, each kind of weights sums to 1.

    Attributes:
        cpl: ids of the CAM pseudo-labels from M' (Eq. 3), (B, H, W).
        cpl_weights: (B, H, W), 0 where nothing is known.
        aux_cpl: the same from M†', (B, H, W).
        aux_cpl_weights: (B, H, W).
        spl: class probabilities that guide the CAMs (Eq. 7), (B, K, h, w), background first.
        spl_weights: (B, h, w), 0 where nothing is known.
        members: CPL from M†' of the tokens of Omega (Eq. 9), (B, h, w), -1 outside.
        anchor_weights: of the tokens of Omega that have positives and negatives, (B, h, w).
    """

    cpl: Tensor
    cpl_weights: Tensor
    aux_cpl: Tensor
    aux_cpl_weights: Tensor
    spl: Tensor
    spl_weights: Tensor
    members: Tensor
    anchor_weights: Tensor


def normalized(weights: Sequence[Tensor], micro_batches: int = 1, reduce: Reduce = one_process) -> list[Tensor]:
    """Each tensor of weights divided by its total, so that the mean over micro-batches and processes of its sums is 1.

    Gradients are averaged over micro-batches and processes, so the step's gradient is that of one weighted mean over
    all its images. One reduction for all.

    Args:
        weights: not negative, of any shapes, on one device.
        micro_batches: how many this process takes the step in.
        reduce: over processes.

    Returns:
        As many tensors; zeros where there was nothing but zeros on all processes.

    Example:
        >>> first, second = normalized([torch.tensor([1.0, 3.0]), torch.zeros(2)])
        >>> first.tolist(), second.tolist()
        ([0.25, 0.75], [0.0, 0.0])
    """
    totals = reduce(torch.stack([each.sum() for each in weights])) / micro_batches
    return [each / total.clamp_min(torch.finfo(total.dtype).tiny) for each, total in zip(weights, totals, strict=True)]


def anchors(members: Tensor, scope: Literal["image", "batch"] = "image") -> Tensor:
    """Which members of Omega have another with the same label and one with another label (Eq. 10).

    Args:
        members: labels of Omega, (B, h, w), -1 outside; one micro-batch.
        scope: whether the others are those of the same image or of the whole micro-batch.

    Returns:
        (B, h, w), bool.

    Example:
        >>> anchors(torch.tensor([[[0, 0, 1, -1]], [[2, 2, 2, 2]]])).tolist()
        [[[True, True, False, False]], [[False, False, False, False]]]
    """
    groups = members.flatten(1) if scope == "image" else members.flatten()[None]
    inside = groups >= 0
    shifted = groups + 1  # 0 outside Omega
    counts = shifted.new_zeros(len(groups), int(shifted.max()) + 1)
    counts.scatter_add_(1, shifted, inside.to(counts.dtype))
    same, all_members = counts.gather(1, shifted), inside.sum(dim=1, keepdim=True)
    return (inside & (same > 1) & (same < all_members)).view_as(members)


__all__ = ["Reduce", "Targets", "anchors", "normalized", "one_process"]
