"""How far a CAM pseudo-label can be trusted: its perplexity (Eq. 4), whose reciprocal weighs it in RAW (Eq. 5)."""

import torch
from torch import Tensor

from cosa_hf.objective.precision import at_least_float32


def perplexity(
    confidence: Tensor, threshold: float, alpha: float = 0.8, beta: float = 1.0, eps: float = 1e-4
) -> Tensor:
    """Perplexity of a CAM pseudo-label, large where the confidence is near the threshold (Eq. 4).

    RAW weighs a pixel by its reciprocal, normalised. As typeset, the paper's formula would reward uncertain pixels; its
    text asks for the "normalized reliability", which is what `CoSAObjective.targets` builds.

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
