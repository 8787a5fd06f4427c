import math

import numpy as np
import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosa_hf.objective.reliability import perplexity
from cosa_hf.objective.targets import normalized


def reliability_weights(p, valid):
    """RAW of a batch by itself, as multiples of the mean over its valid pixels."""
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    (share,) = normalized([valid / p])
    return share * valid.sum()


alphas_and_betas = st.sampled_from([(0.8, 1.0), (0.5, 2.0), (0.95, 0.5)])


@given(st.data(), strategies.thresholds(), alphas_and_betas)
def test_perplexity_equals_reference(data, threshold, constants):
    confidence = data.draw(strategies.confidences((12,), threshold))
    value = perplexity(torch.tensor(confidence), threshold, *constants).numpy()
    expected = reference.perplexity(confidence.astype(float), threshold, *constants)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@given(st.data(), st.floats(0.01, 0.99), alphas_and_betas)
def test_a_threshold_between_two_float32_values_is_rounded_to_one(data, threshold, constants):
    """The dynamic threshold is float64. Beside it the distance of float32 maps is all rounding, as this says."""
    rounded = float(np.float32(threshold))
    confidence = data.draw(strategies.confidences((12,), rounded))
    value = perplexity(torch.tensor(confidence), threshold, *constants).numpy()
    expected = reference.perplexity(confidence.astype(float), rounded, *constants)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


def test_perplexity_falls_with_the_distance_on_both_sides():
    below = perplexity(torch.linspace(0, 0.39, 40), threshold=0.4)
    above = perplexity(torch.linspace(0.41, 1, 40), threshold=0.4)
    assert (below.diff() > 0).all()
    assert (above.diff() < 0).all()
    # The least perplexity, at full distance, is -log alpha on both sides.
    least = pytest.approx(-math.log(0.8), rel=1e-5)
    assert below[0].item() == least
    assert above[-1].item() == least


@pytest.mark.parametrize("threshold", [1e-6, 0.3, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_perplexity_is_finite_and_positive_everywhere(threshold, dtype):
    confidence = torch.cat([torch.linspace(0, 1, 1001), torch.tensor([threshold])]).to(dtype)
    value = perplexity(confidence, threshold)
    assert torch.isfinite(value).all()
    assert (value > 0).all()
    assert value.max().item() <= -math.log(0.8 * 1e-4) * 1.01


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_perplexity_is_finite_with_the_threshold_at_a_bound(threshold):
    value = perplexity(torch.tensor([0.0, 0.5, 1.0]), threshold)
    assert torch.isfinite(value).all()


@given(st.data(), st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), strategies.thresholds())
def test_weights_equal_reference(data, shape, threshold):
    p = reference.perplexity(data.draw(strategies.confidences(shape, threshold)).astype(float), threshold)
    p = p.astype(np.float32)
    valid = data.draw(strategies.masks(shape))
    value = reliability_weights(torch.tensor(p), torch.tensor(valid)).numpy()
    np.testing.assert_allclose(value, reference.reliability_weights(p.astype(float), valid), rtol=1e-5)
    if valid.any():
        assert value[valid].mean() == pytest.approx(1, rel=1e-5)


def test_gradients():
    """Training takes none of these; the values keep clear of the kinks at the threshold and the clamp."""
    confidence = torch.tensor([[[0.05, 0.2, 0.38], [0.45, 0.7, 0.95]]], dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[[True, True, False], [True, True, True]]])
    assert torch.autograd.gradcheck(lambda nu: perplexity(nu, 0.42, 0.8, 1.5), confidence)
    assert torch.autograd.gradcheck(lambda nu: reliability_weights(perplexity(nu, 0.42), valid), confidence)


def test_certain_pixels_weigh_more_than_uncertain_ones():
    confidence = torch.tensor([[[0.5, 0.6, 0.8, 1.0]]])
    weights = reliability_weights(perplexity(confidence, 0.5), torch.ones(1, 1, 4, dtype=torch.bool))
    assert (weights.diff() > 0).all()


def test_equal_perplexity_weighs_one():
    weights = reliability_weights(torch.full((2, 3, 3), 7.0), torch.ones(2, 3, 3, dtype=torch.bool))
    torch.testing.assert_close(weights, torch.ones(2, 3, 3))


def test_no_valid_pixel_gives_zeros():
    weights = reliability_weights(torch.ones(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))
    assert (weights == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_a_whole_crop_stay_finite_in_half_precision(dtype):
    """448 x 448 pixels are more than float16 can count (65,504)."""
    p = perplexity(torch.linspace(0, 1, 448 * 448).view(1, 448, 448).to(dtype), 0.5)
    weights = reliability_weights(p, torch.ones(1, 448, 448, dtype=torch.bool))
    assert torch.isfinite(weights).all()
    assert weights.float().mean().item() == pytest.approx(1, abs=2e-2)
