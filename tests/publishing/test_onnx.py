"""ONNX files against torch, at batches and sizes other than those of the export."""

import re

import numpy as np
import pytest
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.configuration_cosa_ms import CoSAMSConfig
from cosa_hf.modeling_cosa_ms import CoSAMSForSemanticSegmentation
from cosa_hf.publishing import onnx
from cosa_hf.publishing.onnx import export_onnx

# What recipes for frozen encoders use
FROZEN = {
    "aux_layer": -1, "aux_attention": "value-value", "pooling": "lse", "pooling_weights": "distance",
    "classifier_bias": True, "center_features": True, "standardize_features": True, "decoder": "mlp",
    "decoder_inputs": "concat", "affinity": "attention", "affinity_blocks": [-2],
}  # fmt: skip


def tiny(backbone, **options):
    torch.manual_seed(0)
    settings = {"aux_layer": -2, "decoder_channels": 16, "decoder_dilation": 1, "num_labels": 4} | options
    return CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone=backbone, **settings)).eval()


def session_of(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("test_vit", {}),
        ("test_vit", FROZEN | {"feature_layer": -3}),
        ("test_vit", FROZEN | {"attention": "value"}),
        ("test_resnet", {}),
        ("tf_efficientnet_lite0", {}),
    ],
)
def test_same_maps_at_any_batch_and_size(backbone, options, tmp_path):
    pytest.importorskip("onnxscript")
    model = tiny(backbone, **options)
    path = tmp_path / "new" / "model.onnx"
    assert export_onnx(model, path) < 1e-4
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    session = session_of(path)
    stride = model.backbone.stride
    # One of them is the ViT's own size, where timm does not resample the position embedding.
    for batch, rows, columns in ((1, 3, 7), (4, 10, 10), (2, 6, 4), (1, 1, 1)):
        images = torch.rand(batch, 3, rows * stride, columns * stride)
        logits, cam_logits = session.run(["logits", "cam_logits"], {"pixel_values": images.numpy()})
        with torch.no_grad():
            expected = model(images)
        assert logits.shape == (batch, 4, rows, columns)
        for found, wanted in ((logits, expected.logits), (cam_logits, expected.cam_logits)):
            assert np.abs(found - wanted.numpy()).max() <= 1e-4 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "encoder"), [("deeplabv3plus", "tf_efficientnet_lite0"), ("largefov", "test_resnet")]
)
def test_networks_of_cosa_ms_have_the_same_logits(architecture, encoder, tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    config = CoSAMSConfig(architecture=architecture, encoder=encoder, num_labels=4)
    model = CoSAMSForSemanticSegmentation(config).eval()
    path = tmp_path / "model.onnx"
    assert export_onnx(model, path) < 1e-4
    session = session_of(path)
    assert [output.name for output in session.get_outputs()] == ["logits"]
    for batch, height, width in ((1, 64, 96), (3, 96, 32)):
        images = torch.rand(batch, 3, height, width)
        with torch.no_grad():
            expected = model(images).logits
        (found,) = session.run(None, {"pixel_values": images.numpy()})
        assert np.abs(found - expected.numpy()).max() <= 1e-4 * expected.abs().max()


@pytest.mark.slow
def test_command_with_8_bits_in_the_format_that_the_error_names(tmp_path, cosa_hf, complaint):
    pytest.importorskip("onnxscript")
    model = tiny("test_vit")
    model.save_pretrained(tmp_path / "model")
    CoSAImageProcessor().save_pretrained(tmp_path / "model")
    command = ("export", tmp_path / "model", tmp_path / "small.onnx", "--int8")
    (advised,) = re.findall("--int8 is for (--format .*)", complaint(*command, "--format", "official", usage=True))
    printed = cosa_hf(*command, *advised.split())
    assert "pixel_values (B, 3, H, W), H and W multiples of 16 -> logits, cam_logits" in printed
    small = (tmp_path / "small.onnx").stat().st_size
    # Of a network this small, the graph itself is half of the file.
    assert small < 0.75 * (tmp_path / "model" / "model.safetensors").stat().st_size
    images = torch.rand(2, 3, 64, 96)
    logits = session_of(tmp_path / "small.onnx").run(["logits"], {"pixel_values": images.numpy()})[0]
    with torch.no_grad():
        expected = model(images).logits.numpy()
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.95


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ImportError, match=r'needs onnxscript: pip install "cosa-hf\[onnx\]"'):
        export_onnx(tiny("test_vit"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_transformers_is_left_to_others(tmp_path):
    config = SegformerConfig(hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, depths=[1] * 4, decoder_hidden_size=8)
    with pytest.raises(
        ValueError, match="SegformerForSemanticSegmentation is a network of transformers: export it with"
    ):
        export_onnx(SegformerForSemanticSegmentation(config), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_not_handed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx.torch.onnx, "export", lambda network, example, path, **options: path.touch())
    monkeypatch.setattr(onnx, "_difference", lambda path, images, expected: 1e-3)
    with pytest.raises(RuntimeError, match=r"differ by 1.0e-03 of the largest output, above 1e-04"):
        export_onnx(tiny("test_vit"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
