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


def known_of(ids, weights=None):
    """Ids and weights whose weighted sum is a mean over the known pixels."""
    known = ids != IGNORE
    share = known * (1.0 if weights is None else weights) / max(known.sum(), 1)
    return torch.tensor(np.where(known, ids, 0)), torch.tensor(share.astype(np.float32))


def mean_over(valid):
    return torch.tensor(valid / max(valid.sum(), 1), dtype=torch.float32)


@given(st.data(), strategies.map_shapes, st.tuples(st.integers(1, 7), st.integers(1, 7)), st.booleans())
def test_cam2seg_equals_reference(data, shape, size, weighted):
    batch, classes, *grid = shape
    seg_logits = data.draw(strategies.logits((batch, classes + 1, *grid)))
    known = st.sampled_from([*range(classes + 1), IGNORE])
    ids = data.draw(hnp.arrays(np.int64, (batch, *size), elements=known))
    weights = data.draw(hnp.arrays(np.float32, ids.shape, elements=st.floats(0, 8, width=32))) if weighted else None
    value = cam2seg_loss(torch.tensor(seg_logits), *known_of(ids, weights))
    expected = reference.cam2seg_loss(seg_logits.astype(float), ids, weights)
    largest = 1.0 if weights is None else max(1.0, float(weights.max()))
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=largest * reference.tolerance(seg_logits))


def test_cam2seg_gradient():
    rng = np.random.default_rng(1)
    seg_logits = torch.tensor(rng.normal(size=(2, 3, 2, 2)), requires_grad=True)
    ids, weights = torch.tensor(rng.choice([0, 1, 2], size=(2, 4, 5))), torch.tensor(rng.random((2, 4, 5)))
    weights[0, 1:3] = 0
    assert torch.autograd.gradcheck(lambda s: cam2seg_loss(s, ids, weights), seg_logits)


@given(st.data(), strategies.map_shapes)
def test_seg2cam_equals_reference(data, shape):
    batch, classes, *grid = shape
    cam_logits = data.draw(strategies.logits(shape))
    segmentation = data.draw(strategies.probabilities((batch, classes + 1, *grid)))
    valid = data.draw(strategies.masks((batch, *grid)))
    value = seg2cam_loss(torch.tensor(cam_logits), torch.tensor(segmentation), mean_over(valid))
    expected = reference.seg2cam_loss(cam_logits.astype(float), segmentation.astype(float), valid)
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=reference.tolerance(cam_logits))


def test_seg2cam_gradient():
    rng = np.random.default_rng(4)
    cam_logits = torch.tensor(rng.normal(size=(2, 2, 2, 2)), requires_grad=True)
    segmentation = torch.tensor(rng.dirichlet(np.ones(3), size=(2, 2, 2)).transpose(0, 3, 1, 2))
    valid = torch.tensor([[[True, True], [False, True]], [[False, False], [True, False]]])
    assert torch.autograd.gradcheck(lambda m: seg2cam_loss(m, segmentation, valid.double()), cam_logits)
    (gradient,) = torch.autograd.grad(seg2cam_loss(cam_logits, segmentation, valid.double()), cam_logits)
    assert (gradient.transpose(0, 1)[:, ~valid] == 0).all()


def test_seg2cam_takes_the_sigmoid_of_raw_maps():
    """By a relu the loss of the released code is at least ln 2; the paper's loss goes to zero."""
    background = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    loss = seg2cam_loss(torch.full((1, 1, 1, 1), -20.0), background, torch.ones(1, 1, 1))
    assert loss.item() < 1e-6
