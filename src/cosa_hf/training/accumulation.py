"""Gradient accumulation that equals the larger batch: means that run over all parts of an optimiser step.

Only what tokens of the same batch say of each other (`separation_scope batch`) ends with the part.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cosa_hf.objective.overall import CoSAObjective
from cosa_hf.objective.pseudo_labels import PseudoLabels
from cosa_hf.objective.reliability import ProcessMean

# Of a batch, and of what it is to be taught.
Part = tuple[dict[str, Any], PseudoLabels | None]


def parts_of(batch: dict[str, Any], pseudo_labels: PseudoLabels | None, size: int) -> Iterator[Part]:
    """The batch of an optimiser step, and what it is to be taught, `size` images at a time.

    Example:
        >>> [part["image_id"] for part, _ in parts_of({"image_id": ["a", "b", "c", "d"]}, None, size=2)]
        [['a', 'b'], ['c', 'd']]
    """
    for start in range(0, len(batch["image_id"]), size):
        part = slice(start, start + size)
        taught = pseudo_labels and replace(
            pseudo_labels,
            cams=pseudo_labels.cams[part],
            aux_cams=pseudo_labels.aux_cams[part],
            segmentation=pseudo_labels.segmentation[part],
        )
        yield {name: value[part] for name, value in batch.items()}, taught


def mean_over_parts(parts: Sequence[Part], losses: Callable[..., Any], mean: ProcessMean) -> ProcessMean:
    """A `ProcessMean` over all processes and over all parts that an optimiser step comes in.

    A loss that divides by a number of its own part (of pixels, of anchors) weighs that part by 1 / number; summed over
    parts it is not the loss of the larger batch. What is counted depends on the pseudo-labels alone and never on the
    online network's outputs, so it is known before any of them is computed: every part is rehearsed, and what it hands
    to `mean` is averaged. During the step, which asks for the same numbers in the same order, the averages are played
    back, part after part. They take one reduction in all.

    Args:
        parts: from `parts_of`.
        losses: takes outputs, images, pseudo-labels and a `ProcessMean`, and calls that as the step's losses will.
        mean: over processes.

    Example:
        >>> parts = [({"labels": torch.zeros(1, 3), "pixels": torch.tensor(n)}, None) for n in (2.0, 6.0)]
        >>> losses = lambda outputs, part, targets, mean: mean(part["pixels"])
        >>> mean = mean_over_parts(parts, losses, mean=lambda value: value)
        >>> [mean(part["pixels"]).item() for part, _ in parts]
        [4.0, 4.0]
    """
    if len(parts) == 1:
        return mean
    taken: list[list[Tensor]] = []
    for part, targets in parts:
        values: list[Tensor] = []

        def take(value: Tensor, values: list[Tensor] = values) -> Tensor:
            values.append(value.detach())
            return value

        with torch.no_grad():
            losses(blank_outputs(part["labels"], targets), part, targets, take)
        taken.append(values)
    if not taken[0]:
        return mean
    averages = cycle(mean(torch.stack([torch.stack(values) for values in taken]).mean(dim=0)))
    return lambda _: next(averages)


def blank_outputs(labels: Tensor, pseudo_labels: PseudoLabels | None) -> SimpleNamespace:
    """What the online network would return if it saw nothing, for a rehearsal: zeros, segmentation as one token."""
    scores = torch.zeros_like(labels)
    background = torch.zeros_like(labels[:, :1])
    return SimpleNamespace(
        cls_logits=scores,
        aux_cls_logits=scores,
        logits=torch.cat([background, scores], dim=1)[:, :, None, None],
        cam_logits=None if pseudo_labels is None else torch.zeros_like(pseudo_labels.cams),
    )


def counting(objective: CoSAObjective) -> CoSAObjective:
    """The objective for a rehearsal: without the parts that count nothing."""
    return replace(objective, detach="none", dense_energy_weight=0.0)
