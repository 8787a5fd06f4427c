import pytest
import torch
import torch.nn.functional as F

from cosa_hf.objective import upsampled
from cosa_hf.objective.upsampled import upsampled_cross_entropy


def draw(batch, classes, grid, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(batch, classes, *grid, generator=generator, dtype=dtype)
    targets = torch.randint(classes, (batch, *size), generator=generator)
    return logits.requires_grad_(), targets, torch.rand(batch, *size, generator=generator, dtype=dtype)


def plain(logits, targets, weights):
    resized = F.interpolate(logits, size=targets.shape[-2:], mode="bilinear", align_corners=False)
    return (F.cross_entropy(resized, targets, reduction="none") * weights).sum()


@pytest.mark.parametrize(
    ("grid", "size"), [((3, 4), (48, 64)), ((5, 3), (17, 32)), ((4, 4), (4, 4)), ((1, 1), (7, 5)), ((6, 6), (3, 4))]
)
@pytest.mark.parametrize("values", [1, 300, 10**6], ids=["a row at a time", "some rows", "all rows"])
def test_equals_the_cross_entropy_of_upsampled_logits(monkeypatch, grid, size, values):
    monkeypatch.setattr(upsampled, "VALUES_AT_ONCE_ON_CPU", values)
    inputs = draw(2, 5, grid, size)
    value, expected = upsampled_cross_entropy(*inputs), plain(*inputs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    (gradient,), (reference,) = (torch.autograd.grad(loss, inputs[:1]) for loss in (3 * value, 3 * expected))
    torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    logits, targets, weights = draw(2, 3, (2, 3), (6, 7))
    assert torch.autograd.gradcheck(lambda maps: upsampled_cross_entropy(maps, targets, weights), logits)


def test_what_it_keeps_for_the_backward_pass_is_as_small_as_the_logits():
    inputs = draw(2, 50, (4, 4), (64, 64), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        upsampled_cross_entropy(*inputs)
    assert [tensor.shape for tensor in kept] == [inputs[0].shape]


def test_autocast_does_not_lower_its_precision():
    inputs = draw(2, 5, (4, 4), (32, 32), torch.float32)
    expected = upsampled_cross_entropy(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(upsampled_cross_entropy(*inputs), expected)
