"""The dense CRF against mean field by brute force, every pair of pixels written out."""

import numpy as np
import pytest
import torch
from PIL import Image

from cosa_hf.evaluation.crf import DenseCRF, _Gaussian

# An image of 24 x 18 pixels is smaller than DeepLab's widths.
SETTINGS = {"bilateral_sigma_xy": 8.0, "bilateral_sigma_rgb": 20.0, "min_pixels": 0}


@pytest.fixture
def case():
    """Two coloured blocks on a slope of grey; logits that know the blocks roughly, with noise."""
    generator = np.random.default_rng(0)
    pixels = np.repeat(np.linspace(100, 160, 24)[None, :, None], 18, axis=0).repeat(3, axis=2)
    ground_truth = np.zeros((18, 24), dtype=int)
    ground_truth[3:11, 3:10], ground_truth[6:16, 14:21] = 1, 2
    pixels[ground_truth == 1], pixels[ground_truth == 2] = (200, 60, 40), (40, 60, 210)
    pixels += generator.normal(scale=4, size=pixels.shape)
    logits = 1.5 * np.eye(3)[ground_truth].transpose(2, 0, 1) + generator.normal(scale=1.2, size=(3, 18, 24))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return torch.tensor(logits, dtype=torch.float32), image, ground_truth


def brute_force(logits, image, crf):
    """Mean field in float64 with exact Gaussians, normalised on both sides (Krähenbühl and Koltun, NeurIPS 2011)."""
    places = np.argwhere(np.ones(logits.shape[1:])).astype(float)
    colors = np.asarray(image, dtype=float).reshape(-1, 3)

    def kernel(*features):
        points = np.concatenate(features, axis=1)
        weights = np.exp(-((points[:, None] - points[None]) ** 2).sum(-1) / 2)
        degree = weights.sum(1)
        return weights / np.sqrt(degree[:, None] * degree[None])

    def softmax(values):
        values = np.exp(values - values.max(1, keepdims=True))
        return values / values.sum(1, keepdims=True)

    near = kernel(places / crf.spatial_sigma)
    alike = kernel(places / crf.bilateral_sigma_xy, colors / crf.bilateral_sigma_rgb)
    unary = np.log(softmax(logits.double().numpy().reshape(len(logits), -1).T))
    beliefs = softmax(unary)
    for _ in range(crf.iterations):
        beliefs = softmax(unary + crf.spatial_weight * near @ beliefs + crf.bilateral_weight * alike @ beliefs)
    return beliefs.T.reshape(logits.shape)


def test_agrees_with_brute_force(case):
    """The lattice approximates the Gaussians: probabilities to 0.03 in the mean, labels but for a pixel or two."""
    logits, image, ground_truth = case
    crf = DenseCRF(**SETTINGS, backend="torch")
    result, expected = crf(logits, image).numpy(), brute_force(logits, image, crf)
    np.testing.assert_allclose(result.sum(0), 1, atol=1e-5)
    assert np.abs(result - expected).mean() < 0.03
    assert (result.argmax(0) != expected.argmax(0)).mean() < 0.01
    # It did something, and something good.
    assert (logits.numpy().argmax(0) != ground_truth).mean() > 0.2
    assert (result.argmax(0) != ground_truth).mean() < 0.05


@pytest.mark.parametrize("change", [{"iterations": 1}, {"spatial_weight": 0.0}, {"bilateral_weight": 0.0}])
def test_every_part_is_the_brute_force_part(case, change):
    logits, image, _ = case
    crf = DenseCRF(**SETTINGS | change, backend="torch")
    result, expected = crf(logits, image).numpy(), brute_force(logits, image, crf)
    assert np.abs(result - expected).mean() < 0.03
    unchanged = DenseCRF(**SETTINGS, backend="torch")(logits, image).numpy()
    assert np.abs(result - unchanged).mean() > np.abs(result - expected).mean()


def test_the_blur_is_as_wide_as_the_gaussian():
    """On a dense grid the variance of what each point hands to the others is 1 in either direction."""
    side = torch.arange(-5, 5.01, 0.25)
    places = torch.cartesian_prod(side, side)
    centres = (places.abs() < 0.8).all(dim=1).nonzero().flatten()
    reached = _Gaussian(places)(torch.nn.functional.one_hot(centres, len(places)).T.float())
    distances = torch.cdist(places, places[centres]).square()
    assert (reached * distances).sum() / (2 * reached.sum()) == pytest.approx(1, abs=0.01)


def test_backends_differ_by_rounding_only(case):
    pytest.importorskip("pydensecrf")
    logits, image, _ = case
    for settings in ({}, SETTINGS):
        ours, compiled = (DenseCRF(**settings, backend=name)(logits, image) for name in ("torch", "pydensecrf"))
        torch.testing.assert_close(ours, compiled, atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "pydensecrf"])
def test_closeness_shrinks_with_an_image_that_is_smaller_than_photographs(case, backend):
    if backend == "pydensecrf":
        pytest.importorskip("pydensecrf")
    logits, image, _ = case
    pixels = image.width * image.height
    of_a_photo, of_it = ({**SETTINGS, "bilateral_sigma_xy": width, "backend": backend} for width in (8.0, 4.0))
    narrow = DenseCRF(**of_it)(logits, image)
    assert torch.equal(DenseCRF(**of_a_photo | {"min_pixels": 4 * pixels})(logits, image), narrow)
    wide = DenseCRF(**of_a_photo)(logits, image)
    assert not torch.equal(wide, narrow)
    assert torch.equal(DenseCRF(**of_a_photo | {"min_pixels": pixels})(logits, image), wide)


def test_one_class_is_certain(case):
    logits, image, _ = case
    assert torch.equal(DenseCRF()(logits[:1], image), torch.ones(1, 18, 24))


def test_what_cannot_be_refined_is_refused(case):
    logits, image, _ = case
    with pytest.raises(ValueError, match=r"\(3, 9, 24\) for an image of 18 x 24"):
        DenseCRF()(logits[:, ::2], image)
    with pytest.raises(ValueError, match="unknown backend 'numpy'"):
        DenseCRF(backend="numpy")
    with pytest.raises(ValueError, match="too small"):
        DenseCRF(bilateral_sigma_rgb=1e-4, bilateral_sigma_xy=1e-4, backend="torch")(logits, image)
