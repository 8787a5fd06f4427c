import numpy as np
import pytest
import reference
import strategies
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cosa_hf.objective.pseudo_labels import (
    cam_pseudo_labels,
    normalize_cams,
    present_classes,
    resize_cams,
    restrict_to_labels,
    segmentation_pseudo_labels,
)


@given(st.data(), strategies.map_shapes, st.booleans())
def test_normalize_equals_reference(data, shape, padded):
    cam_logits, labels = data.draw(strategies.logits(shape)), data.draw(strategies.tags(shape[:2]))
    valid = data.draw(strategies.masks((shape[0], *shape[2:]))) if padded else None
    value = normalize_cams(
        torch.tensor(cam_logits), torch.tensor(labels), None if valid is None else torch.tensor(valid)
    )
    expected = reference.normalize_cams(cam_logits.astype(float), labels, valid)
    np.testing.assert_allclose(value.numpy(), expected, atol=1e-5)
    assert (value >= 0).all()
    assert (value <= 1).all()


def test_normalize_stretches_the_faintest_and_the_strongest_map():
    cam_logits = torch.tensor([[[[0.0, 1e-30], [0, 5e-31]], [[6e4, -6e4], [0, 3e4]], [[0.7, 0.7], [0.7, 0.7]]]])
    expected = [[[0, 1], [0, 0.5]], [[1, 0], [0, 0.5]], [[1, 1], [1, 1]]]
    np.testing.assert_allclose(normalize_cams(cam_logits, torch.ones(1, 3))[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalize_computes_half_precision_in_full(dtype):
    cam_logits = torch.tensor([[[[6e4, -6e4], [0, 3e4]], [[1, 2], [3, 6e4]]]]).to(dtype)
    value = normalize_cams(cam_logits, torch.ones(1, 2, dtype=dtype))
    assert value.dtype == torch.float32
    expected = reference.normalize_cams(cam_logits.double().numpy(), np.ones((1, 2)))
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


@given(st.data(), strategies.map_shapes, st.tuples(st.integers(1, 13), st.integers(1, 13)))
def test_resizing_from_valid_tokens_equals_reference(data, shape, size):
    cams, tokens = (
        data.draw(strategies.confidences(shape, 0.5)),
        data.draw(strategies.masks((shape[0], *shape[2:]))),
    )
    value, reached = resize_cams(torch.tensor(cams), torch.tensor(tokens), size)
    expected, expected_reached = reference.upsample_valid(cams.astype(float), tokens, size)
    np.testing.assert_array_equal(reached.numpy(), expected_reached)
    # In float32 a share of a few millionths, which no pixel inside an image has, is known to one percent.
    np.testing.assert_allclose(value.numpy(), expected, atol=1e-4)


def test_without_padding_resizing_is_bilinear_bit_for_bit():
    cams = torch.rand(3, 4, 7, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.ones(3, 7, 5, dtype=torch.bool)
    tokens[1, :, 3:] = False
    for maps in (cams, cams.to(memory_format=torch.channels_last), cams.double()):
        value, reached = resize_cams(maps, tokens, (112, 80))
        expected = F.interpolate(maps, size=(112, 80), mode="bilinear", align_corners=False)
        assert torch.equal(value[[0, 2]], expected[[0, 2]])
        assert torch.equal(value[1, :, :, : 3 * 16 - 8], expected[1, :, :, : 3 * 16 - 8])  # beyond the padding's reach
        assert reached[[0, 2]].all()


@pytest.mark.parametrize("inside", [(slice(0, 71), slice(13, 96)), (slice(9, 96), slice(0, 57)), (slice(36, 56),) * 2])
@pytest.mark.parametrize("confidence", [1.0, 0.5])
def test_pixels_beside_padding_are_as_sure_as_the_tokens_that_they_lie_in(inside, confidence):
    valid = torch.zeros(1, 96, 96, dtype=torch.bool)
    valid[0, inside[0], inside[1]] = True
    tokens = torch.tensor(reference.valid_tokens(valid.numpy(), (6, 6)))
    cams = torch.full((1, 1, 6, 6), confidence).masked_fill(~tokens, 0)
    resized, reached = resize_cams(cams, tokens, (96, 96))
    torch.testing.assert_close(resized[0, 0][valid[0] & reached[0]].unique(), torch.tensor([confidence]))
    assert (valid & ~reached).sum() <= 4 * 7 * 7  # behind rounded corners: half a token at most


def test_an_image_too_narrow_to_fill_half_a_token_is_unknown_and_not_background():
    tokens, cams = torch.zeros(1, 3, 3, dtype=torch.bool), torch.zeros(1, 1, 3, 3)
    assert not resize_cams(cams, tokens, (48, 48))[1].any()


@given(st.data(), strategies.map_shapes, strategies.thresholds(), st.booleans())
def test_cam_pseudo_labels_equal_reference(data, shape, threshold, padded):
    cams = data.draw(strategies.confidences(shape, threshold))
    valid = data.draw(strategies.masks((shape[0], *shape[2:]))) if padded else None
    ids = cam_pseudo_labels(torch.tensor(cams), threshold, None if valid is None else torch.tensor(valid))
    assert ids.dtype == torch.long
    np.testing.assert_array_equal(ids.numpy(), reference.cam_pseudo_labels(cams.astype(float), threshold, valid))


def test_confidence_at_the_threshold_is_foreground():
    for threshold in (0.1, 0.3, 0.5, 0.7):
        assert cam_pseudo_labels(torch.full((1, 1, 1, 1), threshold), threshold).item() == 1
        below = np.nextafter(np.float32(threshold), np.float32(0))
        assert cam_pseudo_labels(torch.full((1, 1, 1, 1), float(below)), threshold).item() == 0


def test_of_tied_classes_the_first_wins():
    cams = torch.tensor([0.2, 0.8, 0.8]).view(1, 3, 1, 1)
    assert cam_pseudo_labels(cams, 0.5).item() == 2


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


@given(st.data(), strategies.map_shapes, st.sampled_from([0.01, 0.5, 1.0]))
def test_spl_equals_reference(data, shape, temperature):
    batch, classes, *grid = shape
    seg_logits = data.draw(strategies.logits((batch, classes + 1, *grid)))
    labels = data.draw(strategies.tags((batch, classes)))
    value = segmentation_pseudo_labels(torch.tensor(seg_logits), torch.tensor(labels), temperature).numpy()
    expected = reference.segmentation_pseudo_labels(seg_logits.astype(float), labels, temperature)
    # A score divided by the temperature is known to 6e-8 of its size, and so is the logarithm of a probability.
    np.testing.assert_allclose(value, expected, atol=max(1e-5, 1.2e-7 * np.abs(seg_logits).max() / temperature))
    np.testing.assert_allclose(value.sum(axis=1), 1, atol=1e-6)
    assert (value[:, 1:][labels == 0] == 0).all()  # absent: exactly zero
    assert (value[:, 0][labels.sum(axis=1) == 0] == 1).all()  # without a tag there is only background


def test_gradients():
    """Training takes none of these, but who distils from soft labels may."""
    rng = np.random.default_rng(6)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    maps = torch.tensor(rng.normal(size=(2, 3, 2, 3)), requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: normalize_cams(m, labels), maps)
    scores = torch.tensor(rng.normal(size=(2, 4, 2, 2)), requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: segmentation_pseudo_labels(s, labels, 0.5), scores)


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


@pytest.mark.parametrize("tags", [[1, 1, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
def test_labels_of_present_classes_are_the_labels_of_all(tags):
    torch.manual_seed(0)
    cams = torch.rand(2, 5, 6, 6).mul(4).round().div(4)  # with ties
    cams = cams * torch.tensor([tags, [0, 0, 0, 1, 0]])[:, :, None, None]
    few, classes = present_classes(cams)
    assert few.shape[1] == max(1, sum(tags))
    expected = cam_pseudo_labels(cams, 0.5, background_threshold=0.2)
    assert torch.equal(cam_pseudo_labels(few, 0.5, background_threshold=0.2, classes=classes), expected)
    assert torch.equal(few.amax(dim=1), cams.amax(dim=1))
