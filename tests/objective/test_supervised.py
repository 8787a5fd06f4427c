from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cosa_hf.objective.supervised import supervised_loss


def make_outputs(dtype=torch.float32):
    rng = np.random.default_rng(0)
    return SimpleNamespace(
        logits=torch.tensor(rng.normal(size=(2, 4, 3, 3))).to(dtype).requires_grad_(),
        cls_logits=torch.tensor(rng.normal(size=(2, 3))).to(dtype).requires_grad_(),
        aux_cls_logits=torch.tensor(rng.normal(size=(2, 3))).to(dtype).requires_grad_(),
    )


LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0]])


def reference_classification(logits: torch.Tensor) -> float:
    z = logits.detach().double().numpy()
    y = LABELS.numpy()
    return float((y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)).mean())


@pytest.mark.parametrize("ignored", [255, -1])
def test_equals_reference(ignored):
    outputs = make_outputs()
    # At the resolution of the logits, so that the reference needs no resizing.
    masks = torch.tensor(np.random.default_rng(1).choice([0, 1, 2, 3, ignored], (2, 3, 3)))
    losses = supervised_loss(outputs, LABELS, masks, ignore_index=ignored)
    scores, terms = outputs.logits.detach().double().numpy(), []
    for image, y, x in np.ndindex(2, 3, 3):
        label = masks[image, y, x].item()
        if label != ignored:
            vector = scores[image, :, y, x]
            terms.append(np.logaddexp.reduce(vector) - vector[label])
    expected = {
        "cls": reference_classification(outputs.cls_logits),
        "aux_cls": reference_classification(outputs.aux_cls_logits),
        "seg": float(np.mean(terms)),
    }
    expected["loss"] = sum(expected.values())
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [255, 0, 3])
def test_one_valued_masks_stay_finite(value, dtype):
    outputs = make_outputs(dtype)
    losses = supervised_loss(outputs, LABELS, torch.full((2, 12, 12), value))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    for logits in vars(outputs).values():
        assert torch.isfinite(logits.grad).all()
    if value == 255:
        assert losses["seg"].item() == 0
        assert (outputs.logits.grad == 0).all()
