from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch

from cosa_hf.objective.supervised import supervised_loss


def make_outputs():
    rng = np.random.default_rng(0)
    return SimpleNamespace(
        logits=torch.tensor(rng.normal(size=(2, 4, 3, 3)), dtype=torch.float32),
        cls_logits=torch.tensor(rng.normal(size=(2, 3)), dtype=torch.float32),
        aux_cls_logits=torch.tensor(rng.normal(size=(2, 3)), dtype=torch.float32),
    )


LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize("ignored", [255, -1])
def test_equals_reference(ignored):
    outputs = make_outputs()
    masks = torch.tensor(np.random.default_rng(1).choice([0, 1, 2, 3, ignored], (2, 8, 7)))
    losses = supervised_loss(outputs, LABELS, masks, ignore_index=ignored)
    cls_logits, aux_cls_logits, seg_logits = (
        logits.detach().double().numpy() for logits in (outputs.cls_logits, outputs.aux_cls_logits, outputs.logits)
    )
    expected = {
        "cls": reference.classification_loss(cls_logits, LABELS.numpy()),
        "aux_cls": reference.classification_loss(aux_cls_logits, LABELS.numpy()),
        "seg": reference.cam2seg_loss(seg_logits, masks.numpy(), ignore=ignored),
    }
    expected["loss"] = sum(expected.values())
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)
