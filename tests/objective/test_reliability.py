import math

import numpy as np
import pytest
import torch

from cosa_hf.objective.reliability import perplexity, reliability_weights


def reference_perplexity(
    confidence: np.ndarray, threshold: float, alpha: float = 0.8, beta: float = 1.0, eps: float = 1e-4
) -> np.ndarray:
    """Eq. 4, value by value, the normalised distance clamped to [eps, 1]."""
    result = np.zeros(confidence.shape)
    for index in np.ndindex(confidence.shape):
        nu = confidence[index]
        distance = (nu - threshold) / (1 - threshold) if nu >= threshold else (threshold - nu) / threshold
        result[index] = (-math.log(alpha * min(max(distance, eps), 1.0))) ** beta
    return result


def reference_weights(p: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """w = (1/P) / mean(1/P), the mean over valid pixels."""
    result = np.zeros(p.shape)
    if valid.any():
        result[valid] = (1 / p[valid]) / (1 / p[valid]).mean()
    return result


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 1.0), (0.5, 2.0), (0.99, 0.5)])
def test_perplexity_equals_reference(threshold, alpha, beta):
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.random(200), [0.0, 1.0, threshold]])
    # Next to the threshold the distance is all rounding error in float32; the clamp has its own test.
    near = np.abs(confidence - threshold) < 1e-2
    confidence[near & (confidence != threshold)] = 1.0
    confidence = confidence.astype(np.float32)
    value = perplexity(torch.tensor(confidence), threshold, alpha, beta).numpy()
    expected = reference_perplexity(confidence.astype(np.float64), float(np.float32(threshold)), alpha, beta)
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-5)


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


@pytest.mark.parametrize("share", [1.0, 0.5, 0.02])
def test_weights_equal_reference(share):
    rng = np.random.default_rng(1)
    confidence, valid = rng.random((2, 6, 7)), rng.random((2, 6, 7)) < share
    valid[0, 0, 0] = True
    confidence[:, 0] = 0.5  # exactly at the threshold
    p = reference_perplexity(confidence, 0.5)
    value = reliability_weights(torch.tensor(p, dtype=torch.float32), torch.tensor(valid)).numpy()
    np.testing.assert_allclose(value, reference_weights(p, valid), rtol=1e-5, atol=1e-6)
    assert value[valid].mean() == pytest.approx(1, rel=1e-5)
    assert (value[~valid] == 0).all()


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


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("empty", [False, True], ids=["", "one all padding"])
def test_mean_runs_over_the_global_batch(as_processes, processes, empty):
    rng = np.random.default_rng(2)
    p = torch.tensor(rng.random((2 * processes, 3, 4)) + 0.2, dtype=torch.float32)
    valid = torch.tensor(rng.random((2 * processes, 3, 4)) < 0.7)
    if empty:
        valid[:2] = False
    shares = list(zip(p.split(2), valid.split(2), strict=True))
    parts = as_processes(*(lambda mean, s=share: reliability_weights(*s, mean) for share in shares))
    torch.testing.assert_close(torch.cat(parts), reliability_weights(p, valid), rtol=1e-5, atol=1e-6)
