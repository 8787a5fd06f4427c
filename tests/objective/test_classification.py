import numpy as np
import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosa_hf.objective.classification import classification_loss

shapes = st.tuples(st.integers(1, 3), st.integers(1, 8))


@given(st.data(), shapes)
def test_equals_reference(data, shape):
    """No score is subtracted from another here, so the relative error stays small whatever their size."""
    logits, labels = data.draw(strategies.logits(shape)), data.draw(strategies.tags(shape))
    value = classification_loss(torch.tensor(logits), torch.tensor(labels)).item()
    assert value == pytest.approx(reference.classification_loss(logits.astype(float), labels), rel=1e-5, abs=1e-6)


def test_gradient():
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(scale=3, size=(2, 3)), requires_grad=True)
    labels = torch.tensor(rng.integers(0, 2, (2, 3)))
    assert torch.autograd.gradcheck(lambda z: classification_loss(z, labels), logits)
