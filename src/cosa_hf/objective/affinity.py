"""CAMs spread over the tokens that are alike, between their min-max and the threshold.

The paper does without, on purpose. The CAMs of a frozen encoder peak at parts of an object, and the encoder itself says
which tokens belong together: by the cosine of their features, or by its attention.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.objective.precision import at_least_float32
from cosa_hf.objective.pseudo_labels import normalize_cams, restrict_to_labels
from cosa_hf.settings import Settings, setting

CHUNK = 4  # images whose affinities, N x N numbers each, are in memory at a time
LEAST_LENGTH = 1e-5  # of what sets a token apart, relative to the longest token: what is shorter is rounding


@dataclass(kw_only=True)
class AffinityConfig(Settings):
    """How CAMs spread before they become labels. A saved model knows it: the fields are those of its config."""

    _argument_group_name = "Affinity that CAMs are spread by (not in the paper)"

    affinity: Literal["none", "features", "attention"] = setting(
        CoSAConfig.affinity, "what tokens are alike by: the cosine of their features, or the encoder's attention"
    )
    affinity_layer: int = setting(CoSAConfig.affinity_layer, "features: their layer, counted from the end", most=-1)
    affinity_blocks: list[int] = setting(
        CoSAConfig().affinity_blocks, "attention: the blocks it is averaged over, counted from the end", most=-1
    )
    affinity_temperature: float = setting(
        CoSAConfig.affinity_temperature, "features: of the softmax over cosines", above=0
    )
    affinity_power: float | None = setting(
        CoSAConfig.affinity_power,
        "features: positive cosines to this power, not a softmax; attention: itself to this power",
        above=0,
    )
    affinity_steps: int = setting(CoSAConfig.affinity_steps, "how often CAMs are spread", least=1)


def affinity_settings(config: Any) -> dict[str, Any] | None:
    """What a model's config says of its affinity, as reports record it; None if it names none.

    Example:
        >>> affinity_settings(CoSAConfig()) is None
        True
        >>> affinity_settings(CoSAConfig(affinity="features"))["affinity_layer"]
        -4
    """
    if getattr(config, "affinity", "none") == "none":
        return None
    return {name: getattr(config, name) for name in vars(AffinityConfig())}


def feature_affinity(
    features: Tensor, temperature: float = 0.15, power: float | None = None, valid: Tensor | None = None
) -> Tensor:
    """How alike tokens are by their features: the cosine of what sets them apart from the image's mean.

    Args:
        features: (B, D, h, w).
        temperature: softmax(cosine / temperature) over the tokens.
        power: with it max(cosine, 0)^power takes the softmax's place.
        valid: (B, h, w), False on padding, which the mean leaves out.

    Returns:
        (B, N, N) with N = h w; every row sums to 1. Features that are all the same have cosine 0: a softmax makes all
        tokens alike, with a power each is like itself alone.

    Example:
        >>> features = torch.tensor([[2.0, 2.0, 0.0, 0.0]]).view(1, 1, 1, 4)
        >>> feature_affinity(features, power=3)[0].tolist()[0]  # less the mean: 1, 1, -1, -1
        [0.5, 0.5, 0.0, 0.0]
    """
    tokens = at_least_float32(features).flatten(2)
    inside = torch.ones_like(tokens[:, :1]) if valid is None else valid.flatten(1)[:, None].to(tokens)
    mean = (tokens * inside).sum(dim=2, keepdim=True) / inside.sum(dim=2, keepdim=True).clamp_min(1)
    apart = tokens - mean
    longest = tokens.norm(dim=1, keepdim=True).amax(dim=2, keepdim=True)
    least = (LEAST_LENGTH * longest).clamp_min(torch.finfo(tokens.dtype).tiny)
    directions = apart / apart.norm(dim=1, keepdim=True).maximum(least)
    cosine = directions.mT @ directions
    return (cosine / temperature).softmax(dim=2) if power is None else normalize_rows(cosine.clamp_min(0) ** power)


def attention_affinity(attention: Tensor, power: float | None = None) -> Tensor:
    """How alike tokens are by the encoder's attention, as much as either of two attends to the other.

    Args:
        attention: mean over heads and blocks, without class token, (B, N, N).
        power: above 1 only the strongest affinities remain.

    Returns:
        (B, N, N); every row sums to 1.

    Example:
        >>> attention_affinity(torch.tensor([[[0.5, 0.25], [0.25, 1.0]]]))[0].tolist()
        [[0.6666666865348816, 0.3333333432674408], [0.20000000298023224, 0.800000011920929]]
    """
    attention = at_least_float32(attention)
    symmetric = (attention + attention.mT) / 2
    return normalize_rows(symmetric if power is None else symmetric**power)


def normalize_rows(affinity: Tensor, valid: Tensor | None = None) -> Tensor:
    """Every row divided by its sum over the valid columns; padding gets nothing.

    Args:
        affinity: not negative, (B, N, N).
        valid: (B, N).

    Returns:
        (B, N, N). The row of a token that nothing is like, as of padding, is its own unit vector.

    Example:
        >>> affinity = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])
        >>> normalize_rows(affinity)[0].tolist()
        [[0.25, 0.75], [0.0, 1.0]]
    """
    if valid is not None:
        affinity = affinity * valid[:, None]
    total = affinity.sum(dim=2, keepdim=True)
    itself = torch.eye(affinity.shape[-1], dtype=affinity.dtype, device=affinity.device)
    return torch.where(total > 0, affinity / total.clamp_min(torch.finfo(total.dtype).tiny), itself)


def spread(cams: Tensor, affinity: Tensor, steps: int = 1, valid: Tensor | None = None) -> Tensor:
    """CAMs as their tokens' likes see them: at every token the mean over all tokens, weighted by affinity.

    Args:
        cams: normalised CAMs, (B, C, h, w) in [0, 1]. All classes are spread alike.
        affinity: (B, N, N) with N = h w, in rows that sum to 1.
        steps: how often.
        valid: V, (B, h, w). Padding neither gives nor takes: each row is renormalised over the valid tokens.

    Returns:
        (B, C, h, w), min-maxed anew per image and class, since a mean is lower than its peaks and higher than its
        valleys: the threshold keeps its meaning. Padding, and a class that was zero, stay zero.

    Example:
        >>> cams = torch.tensor([[[[1.0, 0.0, 0.0]]]])
        >>> pairs = torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
        >>> spread(cams, pairs).tolist()
        [[[[1.0, 1.0, 0.0]]]]
    """
    tokens = None if valid is None else valid.flatten(1)
    rows = normalize_rows(at_least_float32(affinity), tokens)
    maps = at_least_float32(cams).flatten(2)
    for _ in range(steps):
        maps = maps @ rows.mT
    return normalize_cams(maps.view_as(cams), torch.ones_like(cams[:, :, 0, 0]), valid)


def spread_cams(cams: Tensor, source: Tensor, config: Any, valid: Tensor | None = None) -> Tensor:
    """CAMs spread as a config says, a few images at a time: memory does not grow with their number.

    Args:
        cams: normalised CAMs, (B, C, h, w) in [0, 1].
        source: what tokens are compared by, as the model returns it: features (B, D, h, w), or attention (B, N, N).
        config: `AffinityConfig`, or a model's config.
        valid: V, (B, h, w).

    Returns:
        As `spread`.

    Example:
        >>> cams, features = torch.rand(2, 3, 4, 6), torch.rand(2, 8, 4, 6)
        >>> spread_cams(cams, features, AffinityConfig(affinity="features")).shape
        torch.Size([2, 3, 4, 6])
    """
    parts = [slice(start, start + CHUNK) for start in range(0, len(cams), CHUNK)]
    with torch.autocast(cams.device.type, enabled=False):  # it would lower cosines and means
        return torch.cat([_spread(cams[p], source[p], config, None if valid is None else valid[p]) for p in parts])


def foreground(seg_logits: Tensor, labels: Tensor) -> Tensor:
    """A segmentation read like CAMs: the probability of each tagged class, beside the others and the background.

    The decoder of a frozen encoder decides on each token by itself; spread by `spread_cams`, on the scale of CAMs, what
    reaches the threshold xi is foreground.

    Args:
        seg_logits: S, (B, K, h, w), background first.
        labels: multi-hot tags, (B, C).

    Returns:
        (B, C, h, w); classes without a tag are zero.

    Example:
        >>> foreground(torch.zeros(1, 3, 1, 1), torch.tensor([[1, 0]])).flatten().tolist()
        [0.5, 0.0]
    """
    return restrict_to_labels(at_least_float32(seg_logits), labels).softmax(dim=1)[:, 1:]


def _spread(cams: Tensor, source: Tensor, config: Any, valid: Tensor | None) -> Tensor:
    power = config.affinity_power
    if config.affinity == "attention":
        affinity = attention_affinity(source, power)
    else:
        affinity = feature_affinity(source, config.affinity_temperature, power, valid)
    return spread(cams, affinity, config.affinity_steps, valid)


__all__ = [
    "AffinityConfig", "affinity_settings", "attention_affinity", "feature_affinity", "foreground", "normalize_rows",
    "spread", "spread_cams",
]  # fmt: skip
