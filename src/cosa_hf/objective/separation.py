"""Contrastive separation in CAMs, CSC (Eq. 9-10): pull foreground away from what merely coexists with it."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cosa_hf.objective.precision import at_least_float32
from cosa_hf.objective.reliability import ProcessMean, single_process

# Anchors are compared with all tokens a slab at a time and each slab is recomputed in the backward pass, so memory
# grows with the number of tokens and not with its square.
ANCHORS_AT_ONCE = 1024
LEAST_TEMPERATURE = 1e-3
# Below every similarity that such a temperature can produce, and finite, so that a row without negatives has a finite
# gradient until it is dropped.
NOT_A_PAIR = -1e4


def contrastive_separation_loss(
    cam_logits: Tensor,
    pseudo_labels: Tensor,
    confident: Tensor,
    temperature: float = 0.5,
    scope: Literal["image", "batch"] = "image",
    mean: ProcessMean = single_process,
) -> Tensor:
    """InfoNCE over the online CAM vectors of confident tokens: same pseudo-label together, others apart (Eq. 10).

    The similarity of two tokens is the cosine of their vectors in R^C. An anchor without positives or without negatives
    drops out.

    Args:
        cam_logits: M of the online network, (B, C, h, w).
        pseudo_labels: CPL of M†', (B, h, w); background is a label like any other.
        confident: Omega (Eq. 9), (B, h, w): valid tokens whose M†' perplexity is at most epsilon.
        temperature: of the InfoNCE, at least LEAST_TEMPERATURE; its own setting, not the tau of Eq. 7.
        scope: whether the other tokens come from the same image or from the whole (local) batch.
        mean: makes the mean over anchors run over the global batch when there are several processes.

    Returns:
        Scalar; exactly 0, with a gradient graph, where no anchor is left.

    Example:
        >>> import torch
        >>> apart = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).view(1, 2, 2, 2)
        >>> labels = torch.tensor([[[0, 0], [1, 1]]])
        >>> round(contrastive_separation_loss(apart, labels, torch.ones(1, 2, 2, dtype=torch.bool)).item(), 4)
        0.2395
    """
    # (G, N, C): G groups of N tokens that see each other. The floor on the norm is for tokens without any activation,
    # whose direction means nothing and should not move much.
    tokens = at_least_float32(cam_logits).flatten(2).transpose(1, 2)
    labels, members = pseudo_labels.flatten(1), confident.flatten(1)
    if scope == "batch":
        tokens, labels, members = tokens.flatten(0, 1)[None], labels.flatten()[None], members.flatten()[None]
    tokens = F.normalize(tokens, dim=-1, eps=1e-3)

    total, anchors = tokens.sum() * 0.0, tokens.new_zeros(())
    for start in range(0, tokens.shape[1], ANCHORS_AT_ONCE):
        loss, kept = checkpoint(_anchor_losses, tokens, labels, members, start, temperature, use_reentrant=False)
        total, anchors = total + loss, anchors + kept
    return total / mean(anchors).clamp_min(torch.finfo(anchors.dtype).tiny)


def _anchor_losses(
    tokens: Tensor, labels: Tensor, members: Tensor, start: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sum of the anchors' losses in one slab, and how many anchors have both positives and negatives."""
    slab = slice(start, start + ANCHORS_AT_ONCE)
    similarity = tokens[:, slab] @ tokens.transpose(1, 2) / temperature  # (G, n, N)
    pair = members[:, slab, None] & members[:, None, :]
    same = labels[:, slab, None] == labels[:, None, :]
    itself = torch.zeros_like(pair)
    itself.diagonal(offset=start, dim1=1, dim2=2).fill_(True)
    positive, negative = pair & same & ~itself, pair & ~same

    against = similarity.masked_fill(~negative, NOT_A_PAIR).logsumexp(dim=-1, keepdim=True)
    # -log(L / (L + K)) with L = exp(s_pos) and K = sum of exp(s_neg)
    per_pair = F.softplus(against - similarity) * positive
    count = positive.sum(dim=-1)
    keep = (count > 0) & negative.any(dim=-1)
    per_anchor = per_pair.sum(dim=-1) / count.clamp_min(1)
    return (per_anchor * keep).sum(), keep.sum()
