"""Contrastive separation in CAMs, CSC (Eq. 9-10): pull foreground away from what merely coexists with it."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cosa_hf.objective.precision import at_least_float32

# Anchors are compared with all tokens a chunk at a time and each chunk is recomputed in the backward pass, so memory
# grows with the number of tokens and not with its square.
ANCHORS_AT_ONCE = 1024
LEAST_TEMPERATURE = 1e-3
# Below every similarity that such a temperature can produce, and finite, so that a row without negatives has a finite
# gradient until it is dropped.
NOT_A_PAIR = -1e4


def contrastive_separation_loss(
    cam_logits: Tensor,
    members: Tensor,
    weights: Tensor,
    temperature: float = 0.5,
    scope: Literal["image", "batch"] = "image",
) -> Tensor:
    """InfoNCE over the online CAM vectors of confident tokens: same pseudo-label together, others apart (Eq. 10).

    The similarity of two tokens is the cosine of their vectors in R^C.

    Args:
        cam_logits: M of the online network, (B, C, h, w).
        members: CPL of M†' of the tokens of Omega (Eq. 9), (B, h, w), -1 outside; background is a label like any other.
        weights: of the anchors, (B, h, w), normalised over the step: see `Targets`. 0 for tokens without positives or
            without negatives.
        temperature: of the InfoNCE, at least LEAST_TEMPERATURE; its own setting, not the tau of Eq. 7.
        scope: whether the other tokens come from the same image or from the whole micro-batch.

    Returns:
        Scalar, the weighted sum over anchors; exactly 0, with a gradient graph, where there is none.

    Example:
        >>> import torch
        >>> apart = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).view(1, 2, 2, 2)
        >>> members = torch.tensor([[[0, 0], [1, 1]]])
        >>> round(contrastive_separation_loss(apart, members, torch.full((1, 2, 2), 0.25)).item(), 4)
        0.2395
    """
    # (G, N, C): G groups of N tokens that see each other. The lower bound on the norm is for tokens without any
    # activation, whose direction means nothing and should not move much.
    tokens = at_least_float32(cam_logits).flatten(2).transpose(1, 2)
    members, weights = members.flatten(1), weights.flatten(1)
    if scope == "batch":
        tokens, members, weights = tokens.flatten(0, 1)[None], members.flatten()[None], weights.flatten()[None]
    tokens = F.normalize(tokens, dim=-1, eps=1e-3)

    total = tokens.sum() * 0.0
    for start in range(0, tokens.shape[1], ANCHORS_AT_ONCE):
        total = total + checkpoint(_chunk, tokens, members, weights, start, temperature, use_reentrant=False)
    return total


def _chunk(tokens: Tensor, members: Tensor, weights: Tensor, start: int, temperature: float) -> Tensor:
    """The weighted sum over the anchors of one chunk."""
    chunk = slice(start, start + ANCHORS_AT_ONCE)
    similarity = tokens[:, chunk] @ tokens.transpose(1, 2) / temperature  # (G, n, N)
    pair = (members[:, chunk, None] >= 0) & (members[:, None, :] >= 0)
    same = members[:, chunk, None] == members[:, None, :]
    itself = torch.zeros_like(pair)
    itself.diagonal(offset=start, dim1=1, dim2=2).fill_(True)
    positive, negative = pair & same & ~itself, pair & ~same

    against = similarity.masked_fill(~negative, NOT_A_PAIR).logsumexp(dim=-1, keepdim=True)
    # -log(L / (L + K)) with L = exp(s_pos) and K = sum of exp(s_neg)
    per_pair = F.softplus(against - similarity) * positive
    per_anchor = per_pair.sum(dim=-1) / positive.sum(dim=-1).clamp_min(1)
    return (per_anchor * weights[:, chunk]).sum()
