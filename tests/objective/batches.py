"""One training step's tensors at toy size, for the tests of the whole objective."""

from types import SimpleNamespace

import numpy as np
import torch

from cosa_hf.objective.overall import CoSAObjective
from cosa_hf.objective.pseudo_labels import PseudoLabels, normalize_cams, segmentation_pseudo_labels

B, C, GRID, STRIDE = 2, 3, (3, 4), 4
SIZE = (GRID[0] * STRIDE, GRID[1] * STRIDE)


def make_batch(seed=0, batch=B, dtype=torch.float32, labels=None, threshold=0.5, aux_threshold=0.4):
    """Outputs of an online network, tags, a valid mask and pseudo-labels, as one training step has them."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return torch.tensor(rng.normal(scale=2, size=shape), dtype=torch.float32).to(dtype)

    outputs = SimpleNamespace(
        cls_logits=draw(batch, C).requires_grad_(),
        aux_cls_logits=draw(batch, C).requires_grad_(),
        cam_logits=draw(batch, C, *GRID).requires_grad_(),
        logits=draw(batch, C + 1, *GRID).requires_grad_(),
    )
    if labels is None:
        labels = torch.tensor(rng.integers(0, 2, (batch, C)), dtype=torch.float32)
        labels[:, 0] = 1
    valid = torch.ones(batch, *SIZE, dtype=torch.bool)
    valid[0, :, -5:] = False
    valid[-1, :3] = False
    pseudo_labels = PseudoLabels(
        cams=normalize_cams(draw(batch, C, *GRID), labels),
        aux_cams=normalize_cams(draw(batch, C, *GRID), labels),
        segmentation=segmentation_pseudo_labels(draw(batch, C + 1, *GRID), labels, 0.5),
        threshold=threshold,
        aux_threshold=aux_threshold,
    )
    return outputs, labels, valid, pseudo_labels


def losses_of(objective: CoSAObjective, outputs, labels, valid, pseudo_labels, **options):
    """One step of one micro-batch: targets, then the objective."""
    targets = pseudo_labels and objective.targets(pseudo_labels, valid)
    return objective(outputs, labels, targets, valid, **options)
