"""The upper bound: the same network taught by true masks."""

from typing import Any

from torch import Tensor

from cosa_hf.objective.classification import classification_loss
from cosa_hf.objective.reliability import ProcessMean, single_process
from cosa_hf.objective.swapping import cam2seg_loss


def supervised_loss(
    outputs: Any, labels: Tensor, masks: Tensor, ignore_index: int = 255, mean: ProcessMean = single_process
) -> dict[str, Tensor]:
    """Classification and plain cross-entropy against true masks, for what full supervision would reach.

    Args:
        outputs: of the network (`logits`, `cls_logits`, `aux_cls_logits`).
        labels: multi-hot tags, (B, C).
        masks: class ids, (B, H, W).
        ignore_index: the id that does not count.
        mean: makes the mean over pixels run over the global batch when there are several processes.

    Returns:
        Scalars by name; `loss` is what to differentiate.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> zeros = torch.zeros(1, 2)
        >>> outputs = SimpleNamespace(logits=torch.zeros(1, 3, 2, 2), cls_logits=zeros, aux_cls_logits=zeros)
        >>> losses = supervised_loss(outputs, torch.ones(1, 2), torch.full((1, 8, 8), 2))
        >>> {name: round(value.item(), 4) for name, value in losses.items()}
        {'cls': 0.6931, 'aux_cls': 0.6931, 'seg': 1.0986, 'loss': 2.4849}
    """
    losses = {
        "cls": classification_loss(outputs.cls_logits, labels),
        "aux_cls": classification_loss(outputs.aux_cls_logits, labels),
        "seg": cam2seg_loss(outputs.logits, masks, ignore_index=ignore_index, mean=mean),
    }
    return losses | {"loss": losses["cls"] + losses["aux_cls"] + losses["seg"]}
