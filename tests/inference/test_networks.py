"""Networks loaded, and their output read."""

import math
import os

import numpy as np
import pytest
import torch
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.inference import forward_multiscale, load_model, segmentation_logits


def test_a_set_of_masks_is_read_as_mask2former_reads_it(mask2former):
    model, _ = load_model(mask2former, "cpu")
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = model(images)
    logits = segmentation_logits(outputs)
    classes = outputs.class_queries_logits.double().numpy()
    masks = outputs.masks_queries_logits.double().numpy()
    for image in range(len(logits)):
        scores = np.zeros(logits.shape[1:])
        for answer, mask in zip(classes[image], masks[image], strict=True):
            chances = np.exp(answer) / np.exp(answer).sum()
            for label in range(len(scores)):
                scores[label] += chances[label] / (1 + np.exp(-mask))
        np.testing.assert_allclose(logits[image].softmax(0), scores / scores.sum(0), rtol=1e-4)
    fused = forward_multiscale(model, images, (1.0, 0.5))
    assert fused.seg_logits.shape == (len(logits), 150, 16, 24)


def test_a_query_that_is_sure_of_no_object_says_nothing():
    """Both masks cover the pixel: the first is of class 1, three to one, the second of none."""
    outputs = Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=torch.tensor([[[0.0, math.log(3), -50.0], [5.0, 0.0, 50.0]]]),
        masks_queries_logits=torch.full((1, 2, 1, 1), 50.0),
    )
    torch.testing.assert_close(segmentation_logits(outputs).exp().flatten(), torch.tensor([0.25, 0.75]))


def test_a_set_of_masks_that_is_sure_has_finite_logits():
    outputs = Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=torch.tensor([[[0.0, 200.0, 0.0]]], requires_grad=True),
        masks_queries_logits=torch.full((1, 1, 2, 2), -200.0, requires_grad=True),
    )
    segmentation_logits(outputs).sum().backward()
    for logits in outputs.values():
        assert logits.grad.isfinite().all()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model at .*nothing"):
        load_model(str(tmp_path / "nothing"), "cpu")
    CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit", decoder_channels=8)).save_pretrained(tmp_path)
    said = r"has no image processor: save one beside it \(processor.save_pretrained\), or copy the preprocessor_config"
    with pytest.raises(FileNotFoundError, match=said):
        load_model(str(tmp_path), "cpu")
    CoSAImageProcessor().save_pretrained(tmp_path)
    load_model(str(tmp_path), "cpu")
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for length in (len(whole) - 1, 1000, 0):
        os.truncate(weights, length)
        with pytest.raises(ValueError, match=f"^{weights} is damaged .*: copy or download it again"):
            load_model(str(tmp_path), "cpu")
    weights.write_bytes(whole)
    load_model(str(tmp_path), "cpu")
