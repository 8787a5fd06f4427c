import numpy as np
import pytest
import torch

from cosa_hf.objective.classification import classification_loss


def reference(logits: np.ndarray, labels: np.ndarray) -> float:
    """Eq. 1, one image and one class at a time."""
    total = 0.0
    for image in range(logits.shape[0]):
        for c in range(logits.shape[1]):
            z, y = logits[image, c], labels[image, c]
            # -log sigmoid(z) = log(1 + exp(-z))
            total += y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
    return total / logits.size


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (4, 3)])
@pytest.mark.parametrize("tags", ["random", "none", "all"])
def test_equals_reference(shape, tags):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=4, size=shape)
    labels = {"random": rng.integers(0, 2, shape), "none": np.zeros(shape), "all": np.ones(shape)}[tags]
    value = classification_loss(torch.tensor(logits, dtype=torch.float32), torch.tensor(labels))
    assert value.item() == pytest.approx(reference(logits, labels), rel=1e-5, abs=1e-6)


def test_gradient_equals_central_differences(numeric_gradient):
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(2, 3)), rng.integers(0, 2, (2, 3))
    tensor = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    classification_loss(tensor, torch.tensor(labels)).backward()
    expected = numeric_gradient(lambda z: reference(z, labels), logits)
    np.testing.assert_allclose(tensor.grad.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extreme", [0.0, 1e4, -1e4])
def test_extreme_logits_stay_finite(dtype, extreme):
    logits = torch.full((2, 3), extreme, dtype=dtype, requires_grad=True)
    labels = torch.tensor([[0, 0, 0], [1, 0, 1]])
    loss = classification_loss(logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    expected = reference(logits.detach().double().numpy(), labels.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(logits.grad).all()
