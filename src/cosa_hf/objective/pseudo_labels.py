"""What a network's maps become once the tags have filtered them: CPL (Eq. 3) and SPL (Eq. 7)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_hf.objective.precision import at_least_float32

LEAST_SHARE = 1e-5  # of valid tokens in a pixel: what is less is rounding


@dataclass(frozen=True)
class PseudoLabels:
    """One batch of swapped assignments: CAMs that supervise the segmentation, a segmentation that supervises the CAMs.

    Attributes:
        cams: normalised M', (B, C, h, w) in [0, 1].
        aux_cams: normalised M†', (B, C, h, w) in [0, 1].
        segmentation: SPL, class probabilities with background first, (B, K, h, w); all zero where nothing is known.
        threshold: xi, that separates foreground from background in M'.
        aux_threshold: the same for M†'.
    """

    cams: Tensor
    aux_cams: Tensor
    segmentation: Tensor
    threshold: float
    aux_threshold: float


def normalize_cams(cam_logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Turn CAM logits into confidences: relu, only the tagged classes, min-max per image and class (Sec. 3.3).

    Args:
        cam_logits: M before any activation, (B, C, h, w).
        labels: multi-hot tags, (B, C). Classes that are absent give an all-zero map.
        valid: (B, h, w), False on padding, which then neither sets the extremes nor holds a confidence.

    Returns:
        (B, C, h, w) in [0, 1]. A map without any positive value stays zero.

    Example:
        >>> import torch
        >>> cams = normalize_cams(torch.tensor([[[[-1.0, 1.0, 3.0]]]]), torch.ones(1, 1))
        >>> [round(value, 3) for value in cams.flatten().tolist()]
        [0.0, 0.333, 1.0]
    """
    cams = at_least_float32(cam_logits).relu()
    inside = labels.bool()[:, :, None, None].expand_as(cams)
    if valid is not None:
        inside = inside & valid[:, None]
    high = cams.masked_fill(~inside, 0.0).amax(dim=(-2, -1), keepdim=True)
    low = cams.masked_fill(~inside, torch.inf).amin(dim=(-2, -1), keepdim=True)
    # A constant map has no extent to stretch: it is all high if positive, and zero if zero.
    low = torch.where(low < high, low, 0.0)
    scaled = (cams - low) / (high - low).clamp_min(torch.finfo(cams.dtype).tiny)
    return scaled.masked_fill(~inside, 0.0)


def present_classes(cams: Tensor) -> tuple[Tensor, Tensor]:
    """Only the CAMs that say anything: an image has a tag or two, and the maps of all other classes are zero.

    Args:
        cams: normalised CAMs, (B, C, h, w) in [0, 1].

    Returns:
        cams: (B, N, h, w) with N the most such maps that an image has, at least 1; zeros where it has fewer.
        classes: which class each map is of, (B, N), ascending among those that are not zero.

    Example:
        >>> import torch
        >>> cams = torch.tensor([0.0, 0.7, 0.0, 0.4]).view(1, 4, 1, 1)
        >>> [tensor.flatten().tolist() for tensor in present_classes(cams)]
        [[0.699999988079071, 0.4000000059604645], [1, 3]]
    """
    present = (cams > 0).flatten(2).any(dim=2)
    most = max(1, int(present.sum(dim=1).max()))
    classes = present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return cams.gather(1, classes[:, :, None, None].expand(-1, -1, *cams.shape[2:])), classes


def resize_cams(cams: Tensor, tokens: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """CAMs at another resolution, bilinearly, from valid tokens alone.

    What padding left empty would pull the pixels beside it below any threshold: there the valid tokens share the weight
    of the others. Where no padding takes part the values are those of `F.interpolate`, bit for bit.

    Args:
        cams: normalised CAMs, (B, C, h, w).
        tokens: which of them are valid, (B, h, w).
        size: H and W.

    Returns:
        cams: (B, C, H, W).
        reached: (B, H, W), False where no valid token says anything of a pixel, as behind the corner of an image.

    Example:
        >>> import torch
        >>> cams, tokens = torch.tensor([[[[0.5, 0.75, 0.0]]]]), torch.tensor([[[True, True, False]]])
        >>> [values.flatten().tolist() for values in resize_cams(cams, tokens, (1, 6))]
        [[0.5, 0.5625, 0.6875, 0.75, 0.75, 0.0], [True, True, True, True, True, False]]
    """

    def resize(maps: Tensor) -> Tensor:
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)

    inside, outside = resize(torch.stack([tokens, ~tokens], dim=1).to(cams)).split(1, dim=1)
    resized = resize(cams * tokens[:, None])
    reached = inside > LEAST_SHARE
    shared = torch.where(reached, resized / inside.clamp_min(LEAST_SHARE), 0)
    return torch.where(outside > 0, shared, resized), reached[:, 0]


def cam_pseudo_labels(
    cams: Tensor,
    threshold: float,
    valid: Tensor | None = None,
    ignore_index: int = 255,
    background_threshold: float | None = None,
    classes: Tensor | None = None,
) -> Tensor:
    """CAM pseudo-labels, CPL (Eq. 3): the strongest class where it reaches the threshold, else background.

    Args:
        cams: normalised CAMs, (B, C, H, W) in [0, 1].
        threshold: xi in (0, 1).
        valid: (B, H, W), False where random crop padded the image; those pixels get `ignore_index`.
        ignore_index: the id that no loss and no metric counts.
        background_threshold: confidences from here up to the threshold are neither, and get `ignore_index` (released
            code). None: there is no such range.
        classes: which class each of the maps is of, (B, N), from `present_classes`; None where they are all there.

    Returns:
        Class ids (B, H, W), background 0, class c as c + 1.

    Example:
        >>> import torch
        >>> cam_pseudo_labels(torch.tensor([[[[0.2, 0.9]], [[0.6, 0.1]]]]), threshold=0.5).tolist()
        [[[2, 1]]]
    """
    confidence, winner = cams.max(dim=1)
    if classes is not None:
        winner = classes.gather(1, winner.flatten(1)).view_as(winner)
    ids = torch.where(confidence >= threshold, winner + 1, 0)
    if background_threshold is not None:
        ids = ids.masked_fill((confidence >= background_threshold) & (confidence < threshold), ignore_index)
    return ids if valid is None else ids.masked_fill(~valid, ignore_index)


def restrict_to_labels(seg_logits: Tensor, labels: Tensor) -> Tensor:
    """Put the logits of classes that the tags rule out at -inf; background always stays (Eq. 7, left).

    Args:
        seg_logits: S, (B, K, h, w), background first.
        labels: multi-hot tags over the C = K - 1 foreground classes, (B, C).

    Example:
        >>> import torch
        >>> restrict_to_labels(torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]]), torch.tensor([[1, 0]])).flatten().tolist()
        [1.0, 2.0, -inf]
    """
    background = torch.ones_like(labels[:, :1], dtype=torch.bool)
    present = torch.cat([background, labels.bool()], dim=1)
    return seg_logits.masked_fill(~present[:, :, None, None], -torch.inf)


def segmentation_pseudo_labels(seg_logits: Tensor, labels: Tensor, temperature: float = 0.01) -> Tensor:
    """Segmentation pseudo-labels, SPL (Eq. 7): sharpened probabilities over the tagged classes and background.

    Args:
        seg_logits: S' of the assignment network, (B, K, h, w).
        labels: multi-hot tags, (B, C).
        temperature: tau; 0.01 in the paper, which is close to one-hot.

    Returns:
        Probabilities (B, K, h, w); absent classes are exactly 0.

    Example:
        >>> import torch
        >>> segmentation_pseudo_labels(torch.zeros(1, 3, 1, 1), torch.tensor([[1, 0]])).flatten().tolist()
        [0.5, 0.5, 0.0]
    """
    return (restrict_to_labels(at_least_float32(seg_logits), labels) / temperature).softmax(dim=1)
