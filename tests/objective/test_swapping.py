import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosa_hf.objective.swapping import cam2seg_loss, seg2cam_loss

IGNORE = reference.IGNORE


@given(st.data(), strategies.map_shapes, st.tuples(st.integers(1, 7), st.integers(1, 7)), st.booleans())
def test_cam2seg_equals_reference(data, shape, size, weighted):
    batch, classes, *grid = shape
    seg_logits = data.draw(strategies.logits((batch, classes + 1, *grid)))
    known = st.sampled_from([*range(classes + 1), IGNORE])
    ids = data.draw(hnp.arrays(np.int64, (batch, *size), elements=known))
    weights = data.draw(hnp.arrays(np.float32, ids.shape, elements=st.floats(0, 8, width=32))) if weighted else None
    value = cam2seg_loss(
        torch.tensor(seg_logits), torch.tensor(ids), None if weights is None else torch.tensor(weights)
    )
    expected = reference.cam2seg_loss(seg_logits.astype(float), ids, weights)
    largest = 1.0 if weights is None else max(1.0, float(weights.max()))
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=largest * reference.tolerance(seg_logits))


def test_cam2seg_gradient():
    rng = np.random.default_rng(1)
    seg_logits = torch.tensor(rng.normal(size=(2, 3, 2, 2)), requires_grad=True)
    ids, weights = torch.tensor(rng.choice([0, 1, 2, IGNORE], size=(2, 4, 5))), torch.tensor(rng.random((2, 4, 5)))
    assert torch.autograd.gradcheck(lambda s: cam2seg_loss(s, ids, weights), seg_logits)


def test_cam2seg_custom_ignore_index():
    seg_logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[[0, 1], [2, IGNORE]]])
    moved = torch.where(ids == IGNORE, -1, ids)
    assert torch.equal(cam2seg_loss(seg_logits, ids), cam2seg_loss(seg_logits, moved, ignore_index=-1))


@pytest.mark.parametrize("ids", [[0, 0, 1, 2], [0, 0, 0, 0], [2, 1, 1, IGNORE], [IGNORE] * 4])
def test_balanced_cam2seg_is_half_background_and_half_foreground(ids):
    seg_logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    target = torch.tensor(ids).view(1, 2, 2)
    halves = [target.masked_fill(target != 0, IGNORE), target.masked_fill(target == 0, IGNORE)]
    expected = sum(reference.cam2seg_loss(seg_logits.double().numpy(), half.numpy()) for half in halves) / 2
    assert cam2seg_loss(seg_logits, target, balanced=True).item() == pytest.approx(expected, rel=1e-5)


@given(st.data(), strategies.map_shapes)
def test_seg2cam_equals_reference(data, shape):
    batch, classes, *grid = shape
    cam_logits = data.draw(strategies.logits(shape))
    segmentation = data.draw(strategies.probabilities((batch, classes + 1, *grid)))
    valid = data.draw(strategies.masks((batch, *grid)))
    value = seg2cam_loss(torch.tensor(cam_logits), torch.tensor(segmentation), torch.tensor(valid))
    expected = reference.seg2cam_loss(cam_logits.astype(float), segmentation.astype(float), valid)
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=reference.tolerance(cam_logits))


def test_seg2cam_gradient():
    rng = np.random.default_rng(4)
    cam_logits = torch.tensor(rng.normal(size=(2, 2, 2, 2)), requires_grad=True)
    segmentation = torch.tensor(rng.dirichlet(np.ones(3), size=(2, 2, 2)).transpose(0, 3, 1, 2))
    valid = torch.tensor([[[True, True], [False, True]], [[False, False], [True, False]]])
    assert torch.autograd.gradcheck(lambda m: seg2cam_loss(m, segmentation, valid), cam_logits)
    (gradient,) = torch.autograd.grad(seg2cam_loss(cam_logits, segmentation, valid), cam_logits)
    assert (gradient.transpose(0, 1)[:, ~valid] == 0).all()


def test_seg2cam_takes_the_sigmoid_of_raw_maps():
    """The released code floors the loss at ln 2 by a relu; the paper's loss goes to zero."""
    background = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    loss = seg2cam_loss(torch.full((1, 1, 1, 1), -20.0), background, torch.ones(1, 1, 1, dtype=torch.bool))
    assert loss.item() < 1e-6


# (share of counted positions, processes); "one" counts a single position in the whole batch.
SHARES = [(0.7, 2), (0.7, 3), ("first empty", 2), ("one", 2), ("none", 2)]


def counted(rng: np.random.Generator, share: float | str, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    if share == "one":
        mask[0, 0, 0] = True
    elif share == "first empty":
        mask[shape[0] // 2 :] = True
    elif share != "none":
        mask = rng.random(shape) < share
    return mask


@pytest.mark.parametrize(("share", "processes"), SHARES)
def test_cam2seg_mean_runs_over_the_global_batch(as_processes, share, processes):
    rng = np.random.default_rng(5)
    batch = 2 * processes
    seg_logits = torch.tensor(rng.normal(size=(batch, 3, 2, 2)), dtype=torch.float32, requires_grad=True)
    ids = rng.integers(0, 3, (batch, 4, 4))
    ids[~counted(rng, share, ids.shape)] = IGNORE
    ids, weights = torch.tensor(ids), torch.tensor(rng.random(ids.shape), dtype=torch.float32)

    whole = cam2seg_loss(seg_logits, ids, weights)
    (expected,) = torch.autograd.grad(whole, seg_logits)
    shares = list(zip(seg_logits.split(2), ids.split(2), weights.split(2), strict=True))
    parts = as_processes(*(lambda mean, s=share: cam2seg_loss(*s, mean=mean) for share in shares))
    average = torch.stack(parts).mean()
    (gradient,) = torch.autograd.grad(average, seg_logits)
    torch.testing.assert_close(average, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("share", "processes"), SHARES)
def test_seg2cam_mean_runs_over_the_global_batch(as_processes, share, processes):
    rng = np.random.default_rng(6)
    batch = 2 * processes
    cam_logits = torch.tensor(rng.normal(size=(batch, 3, 2, 2)), dtype=torch.float32, requires_grad=True)
    segmentation = torch.rand(batch, 4, 2, 2).softmax(dim=1)
    valid = torch.tensor(counted(rng, share, (batch, 2, 2)))

    whole = seg2cam_loss(cam_logits, segmentation, valid)
    (expected,) = torch.autograd.grad(whole, cam_logits)
    shares = list(zip(cam_logits.split(2), segmentation.split(2), valid.split(2), strict=True))
    parts = as_processes(*(lambda mean, s=share: seg2cam_loss(*s, mean) for share in shares))
    average = torch.stack(parts).mean()
    (gradient,) = torch.autograd.grad(average, cam_logits)
    torch.testing.assert_close(average, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
