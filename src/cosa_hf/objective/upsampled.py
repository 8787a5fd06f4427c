"""Cross-entropy of maps at a finer grid than their own, without holding them there."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Upsampled values (classes x pixels) that are in memory at a time: on a CPU what its cache holds (six times as fast as
# all at once), on an accelerator enough to keep it busy.
VALUES_AT_ONCE, VALUES_AT_ONCE_ON_CPU = 2**24, 2**17


def upsampled_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over pixels of weight times cross-entropy, the logits resized bilinearly to the targets.

    Equals `F.cross_entropy` of `F.interpolate(logits)` up to rounding. That would hold three tensors of all classes at
    all pixels at a time, 2.4 GB for each image of 448 pixels with 1,000 classes. Here a chunk of rows is upsampled, its
    gradient taken at once, brought back to the grid of `logits`, and the chunk discarded.

    Args:
        logits: (B, K, h, w), float32 or float64. The gradient is theirs alone, and only once: no second derivative.
        targets: class ids, (B, H, W), in [0, K) also where the weight is 0.
        weights: (B, H, W).

    Returns:
        Scalar.

    Example:
        >>> logits, weights = torch.randn(2, 5, 4, 4), torch.rand(2, 16, 16)
        >>> targets = torch.randint(5, (2, 16, 16))
        >>> resized = F.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)
        >>> expected = (F.cross_entropy(resized, targets, reduction="none") * weights).sum()
        >>> torch.allclose(upsampled_cross_entropy(logits, targets, weights), expected)
        True
    """
    return _UpsampledCrossEntropy.apply(logits, targets, weights)


class _UpsampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):  # it would lower the products below
            total, gradient = _value_and_gradient(logits, targets, weights.to(logits.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None


def _value_and_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    (_, classes, height, width), (tall, wide) = logits.shape, targets.shape[-2:]
    # Bilinear is linear along the columns, then along the rows: (H, h) and (W, w), as matrix products.
    along_rows, along_columns = _linear(height, tall, logits), _linear(width, wide, logits)
    budget = VALUES_AT_ONCE_ON_CPU if logits.device.type == "cpu" else VALUES_AT_ONCE
    chunk = max(1, budget // (classes * wide))
    total, gradient = logits.new_zeros(()), []
    for maps, ids, weight in zip(logits, targets, weights, strict=True):
        stretched = maps @ along_columns.T  # (K, h, W)
        stretched_gradient = torch.zeros_like(stretched)
        for top in range(0, tall, chunk):
            rows = slice(top, min(top + chunk, tall))
            # The rows of tokens that these rows of pixels lie between.
            tokens = slice(
                max(0, int((rows.start + 0.5) * height / tall - 0.5)),
                min(height, int((rows.stop - 0.5) * height / tall - 0.5) + 2),
            )
            blend = along_rows[rows, tokens]
            log_p = torch.matmul(blend, stretched[:, tokens]).log_softmax(dim=0)  # (K, rows, W)
            target = ids[None, rows]
            total -= (log_p.gather(0, target)[0] * weight[rows]).sum()
            # d CE / d logits = p - onehot
            error = log_p.exp_().scatter_add_(0, target, torch.full_like(target, -1, dtype=log_p.dtype))
            stretched_gradient[:, tokens] += torch.matmul(blend.T, error.mul_(weight[rows]))
        gradient.append(stretched_gradient @ along_columns)
    return total, torch.stack(gradient)


def _linear(size: int, finer: int, like: Tensor) -> Tensor:
    """The matrix (finer, size) that resizes a row of numbers as `F.interpolate` does."""
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], size=finer, mode="linear", align_corners=False)[0].T
