"""How far a CAM pseudo-label can be trusted: perplexity (Eq. 4) and the weights it gives (RAW, Sec. 3.3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from cosa_hf.objective.precision import at_least_float32

# Takes a local scalar to its mean over all processes. With it, every mean below runs over the global batch, since the
# gradients of the processes are themselves averaged.
ProcessMean = Callable[[Tensor], Tensor]


def single_process(value: Tensor) -> Tensor:
    """The mean over processes where there is one."""
    return value


def perplexity(
    confidence: Tensor, threshold: float, alpha: float = 0.8, beta: float = 1.0, eps: float = 1e-4
) -> Tensor:
    """Perplexity of a CAM pseudo-label, large where the confidence is near the threshold (Eq. 4).

    Args:
        confidence: nu = max_c M', any shape, in [0, 1].
        threshold: xi in (0, 1).
        alpha: lambda_alpha; the least perplexity is (-log alpha)^beta.
        beta: lambda_beta; the sharpness.
        eps: the smallest normalised distance to the threshold; it keeps the logarithm finite at nu = xi.

    Example:
        >>> import torch
        >>> [round(p, 3) for p in perplexity(torch.tensor([0.0, 0.5, 0.75, 1.0]), threshold=0.5).tolist()]
        [0.223, 9.433, 0.916, 0.223]
    """
    confidence = at_least_float32(confidence)
    tiny = torch.finfo(confidence.dtype).tiny  # against 0 / 0 with the threshold at a bound
    distance = torch.where(
        confidence >= threshold,
        (confidence - threshold) / max(1 - threshold, tiny),
        (threshold - confidence) / max(threshold, tiny),
    )
    return (-(alpha * distance.clamp(eps, 1.0)).log()).pow(beta)


def reliability_weights(perplexity: Tensor, valid: Tensor, mean: ProcessMean = single_process) -> Tensor:
    """Per-pixel weights of CAM2Seg: reliability 1/P, normalised to mean 1 over the valid pixels of the batch (RAW).

    As typeset, the paper's formula would reward uncertain pixels; its text asks for the "normalized reliability",
    which is what this is.

    Args:
        perplexity: P, (B, H, W), positive.
        valid: (B, H, W), False on padding; those pixels weigh 0.
        mean: makes the mean run over the global batch when there are several processes.

    Returns:
        (B, H, W). All zero where no pixel is valid.

    Example:
        >>> import torch
        >>> reliability_weights(torch.tensor([[[1.0, 0.5]]]), torch.ones(1, 1, 2, dtype=torch.bool)).tolist()
        [[[0.6666666865348816, 1.3333333730697632]]]
    """
    reliability = perplexity.reciprocal() * valid
    total, count = mean(reliability.sum()), mean(valid.sum().to(reliability.dtype))
    return reliability * (count / total.clamp_min(torch.finfo(reliability.dtype).tiny))
