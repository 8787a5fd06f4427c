import numpy as np
import pytest
import torch

from cosa_hf.objective.pseudo_labels import (
    cam_pseudo_labels,
    normalize_cams,
    restrict_to_labels,
    segmentation_pseudo_labels,
)

IGNORE = 255


def reference_normalize(cam_logits: np.ndarray, labels: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Sec. 3.3: relu, absent classes zero, min-max over the valid tokens of one image and class."""
    result = np.zeros(cam_logits.shape)
    valid = np.ones((len(cam_logits), *cam_logits.shape[2:]), bool) if valid is None else valid
    for image, c in np.ndindex(cam_logits.shape[:2]):
        inside = valid[image]
        if not labels[image, c] or not inside.any():
            continue
        cam = np.maximum(cam_logits[image, c].astype(np.float64), 0)
        low, high = cam[inside].min(), cam[inside].max()
        if high == 0:
            continue
        scaled = (cam - low) / (high - low) if high > low else np.ones_like(cam)
        result[image, c][inside] = scaled[inside]
    return result


def reference_labels(cams: np.ndarray, threshold: float, valid: np.ndarray | None = None) -> np.ndarray:
    """Eq. 3, pixel by pixel."""
    ids = np.zeros((cams.shape[0], *cams.shape[2:]), int)
    for image, y, x in np.ndindex(ids.shape):
        vector = cams[image, :, y, x]
        if vector.max() >= threshold:
            ids[image, y, x] = vector.argmax() + 1
        if valid is not None and not valid[image, y, x]:
            ids[image, y, x] = IGNORE
    return ids


def reference_spl(seg_logits: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """Eq. 7, pixel by pixel."""
    result = np.zeros(seg_logits.shape)
    for image, y, x in np.ndindex(seg_logits.shape[0], *seg_logits.shape[2:]):
        present = [0] + [c + 1 for c in range(labels.shape[1]) if labels[image, c]]
        scores = seg_logits[image, present, y, x].astype(np.float64) / temperature
        exponentials = np.exp(scores - scores.max())
        result[image, present, y, x] = exponentials / exponentials.sum()
    return result


@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (3, 1, 7, 2), (1, 20, 3, 3)])
def test_normalize_equals_reference(shape, with_valid):
    rng = np.random.default_rng(0)
    cam_logits = rng.normal(scale=5, size=shape).astype(np.float32)
    labels = rng.integers(0, 2, shape[:2])
    valid = rng.random((shape[0], *shape[2:])) > 0.4 if with_valid else None
    value = normalize_cams(
        torch.tensor(cam_logits), torch.tensor(labels), None if valid is None else torch.tensor(valid)
    )
    np.testing.assert_allclose(value.numpy(), reference_normalize(cam_logits, labels, valid), atol=1e-5)


CAMS = {
    "all zero": np.zeros((1, 2, 2, 2)),
    "all negative": np.full((1, 2, 2, 2), -3.0),
    "constant": np.full((1, 2, 2, 2), 0.7),
    "one spike": np.array([[[[-1.0, 0], [0, 9]], [[0, 0], [0, 1e-3]]]]),
    "no zero": np.array([[[[1.0, 2], [3, 4]], [[5, 5], [5, 6]]]]),
    "tiny": np.array([[[[0.0, 1e-30], [0, 5e-31]], [[1e-36, 0], [0, 0]]]]),
    "huge": np.array([[[[6e4, -6e4], [0, 3e4]], [[1, 2], [3, 6e4]]]]),
}
MASKS = {
    "all": np.ones((1, 2, 2), bool),
    "none": np.zeros((1, 2, 2), bool),
    "one token": np.array([[[False, False], [False, True]]]),
    "without the last": np.array([[[True, True], [True, False]]]),
}


@pytest.mark.parametrize("cams", CAMS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("labels", [[0, 0], [1, 0], [1, 1]])
def test_normalize_degenerate(cams, mask, labels):
    cam_logits, labels = CAMS[cams].astype(np.float32), np.array([labels])
    value = normalize_cams(torch.tensor(cam_logits), torch.tensor(labels), torch.tensor(MASKS[mask])).numpy()
    np.testing.assert_allclose(value, reference_normalize(cam_logits, labels, MASKS[mask]), atol=1e-5)
    assert (value >= 0).all()
    assert (value <= 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalize_computes_half_precision_in_full(dtype):
    cam_logits = torch.tensor(CAMS["huge"]).to(dtype)
    value = normalize_cams(cam_logits, torch.ones(1, 2, dtype=dtype))
    assert value.dtype == torch.float32
    expected = reference_normalize(cam_logits.double().numpy(), np.ones((1, 2)))
    np.testing.assert_allclose(value.numpy(), expected, atol=1e-5)


def test_padding_does_not_change_what_the_image_says():
    rng = np.random.default_rng(2)
    inside = torch.tensor(rng.normal(size=(1, 3, 4, 3)), dtype=torch.float32)
    padded = torch.cat([inside, torch.full((1, 3, 4, 2), 100.0)], dim=-1)
    valid = torch.zeros(1, 4, 5, dtype=torch.bool)
    valid[..., :3] = True
    value = normalize_cams(padded, torch.ones(1, 3), valid)
    torch.testing.assert_close(value[..., :3], normalize_cams(inside, torch.ones(1, 3)), atol=0, rtol=0)
    assert (value[..., 3:] == 0).all()


@pytest.mark.parametrize("threshold", [1e-6, 0.1, 0.3, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("with_valid", [False, True])
def test_cam_pseudo_labels_equal_reference(threshold, with_valid):
    rng = np.random.default_rng(3)
    cams = rng.random((2, 3, 6, 5)).astype(np.float32)
    # Values at the threshold to the last bit, all-zero pixels, and full confidence.
    cams[0, :, 0] = np.float32(threshold)
    cams[0, 1:, 0] *= np.float32(0.5)
    cams[1, :, 0] = 0
    cams[1, 2, 1] = 1
    valid = rng.random((2, 6, 5)) > 0.3 if with_valid else None
    ids = cam_pseudo_labels(torch.tensor(cams), threshold, None if valid is None else torch.tensor(valid))
    assert ids.dtype == torch.long
    np.testing.assert_array_equal(ids.numpy(), reference_labels(cams, np.float32(threshold), valid))


def test_confidence_at_the_threshold_is_foreground():
    for threshold in (0.1, 0.3, 0.5, 0.7):
        assert cam_pseudo_labels(torch.full((1, 1, 1, 1), threshold), threshold).item() == 1
        below = np.nextafter(np.float32(threshold), np.float32(0))
        assert cam_pseudo_labels(torch.full((1, 1, 1, 1), float(below)), threshold).item() == 0


def test_tied_classes_give_one_of_them():
    cams = torch.tensor([0.2, 0.8, 0.8]).view(1, 3, 1, 1)
    assert cam_pseudo_labels(cams, 0.5).item() in (2, 3)


def test_between_two_thresholds_nothing_is_known():
    confidence = torch.tensor([[[[0.0, 0.19, 0.2, 0.5, 0.69, 0.7, 1.0]]]])
    ids = cam_pseudo_labels(confidence, threshold=0.7, background_threshold=0.2)
    assert ids.flatten().tolist() == [0, 0, 255, 255, 255, 1, 1]
    padded = cam_pseudo_labels(confidence, 0.7, torch.tensor([[[False] + [True] * 6]]), -1, background_threshold=0.2)
    assert padded.flatten().tolist() == [-1, 0, -1, -1, -1, 1, 1]


def test_padding_gets_the_ignore_index():
    cams, valid = torch.ones(1, 1, 1, 2), torch.tensor([[[True, False]]])
    assert cam_pseudo_labels(cams, 0.5, valid).tolist() == [[[1, 255]]]
    assert cam_pseudo_labels(cams, 0.5, valid, ignore_index=-100).tolist() == [[[1, -100]]]
    assert (cam_pseudo_labels(cams, 0.5, torch.zeros_like(valid)) == 255).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_restriction_keeps_background_and_tagged_classes(dtype):
    rng = np.random.default_rng(4)
    seg_logits = torch.tensor(rng.normal(size=(3, 4, 2, 3)), dtype=torch.float32)
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).to(dtype)
    before = seg_logits.clone()
    restricted = restrict_to_labels(seg_logits, labels)
    for image in range(3):
        assert torch.equal(restricted[image, 0], before[image, 0])
        for c in range(3):
            expected = before[image, c + 1] if labels[image, c] else torch.full((2, 3), -torch.inf)
            assert torch.equal(restricted[image, c + 1], expected)
    assert torch.equal(seg_logits, before)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0])
def test_spl_equals_reference(temperature):
    rng = np.random.default_rng(5)
    seg_logits = rng.normal(scale=0.05, size=(3, 4, 3, 2)).astype(np.float32)
    seg_logits[0, :, 0] = 0.25  # a tie of all classes
    labels = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    value = segmentation_pseudo_labels(torch.tensor(seg_logits), torch.tensor(labels), temperature).numpy()
    np.testing.assert_allclose(value, reference_spl(seg_logits, labels, temperature), atol=1e-5)
    np.testing.assert_allclose(value.sum(axis=1), 1, atol=1e-6)
    assert (value[1, 0] == 1).all()  # without a tag there is only background
    assert (value[0, 2] == 0).all()  # absent: exactly zero


def test_spl_temperature_is_the_papers_by_default():
    seg_logits, labels = torch.tensor([0.0, 0.01, 0.03]).view(1, 3, 1, 1), torch.ones(1, 2)
    expected = segmentation_pseudo_labels(seg_logits, labels, 0.01)
    assert torch.equal(segmentation_pseudo_labels(seg_logits, labels), expected)
    assert expected[0, 2, 0, 0].item() == pytest.approx(np.exp(3) / (1 + np.exp(1) + np.exp(3)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spl_survives_logits_that_overflow_half_precision_once_sharpened(dtype):
    seg_logits = torch.tensor([-6e4, 6e4, 6e4, -6e4]).view(1, 4, 1, 1).to(dtype)
    value = segmentation_pseudo_labels(seg_logits, torch.tensor([[1, 1, 0]]))
    assert value.flatten().tolist() == [0.0, 0.5, 0.5, 0.0]
