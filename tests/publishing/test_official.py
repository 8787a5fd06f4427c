"""Checkpoints of the authors' layout, made at random: there and back, and what is refused."""

import argparse
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from cosa_hf import CoSAForWeaklySupervisedSegmentation
from cosa_hf.data import VOC_CLASSES, VOC_COEXISTENCE
from cosa_hf.data.coco import COCO_CLASSES
from cosa_hf.publishing.official import from_official, to_official

WIDTH, CHANNELS = 64, 24


def state_dict(classes):
    """What the authors' trainer saves under `model`, for timm's tiny ViT."""
    torch.manual_seed(0)
    shapes = {f"encoder.{name}": tensor.shape for name, tensor in timm.create_model("test_vit").state_dict().items()}
    assert "encoder.head.weight" in shapes
    shapes |= {
        "classifier.weight": (classes, WIDTH, 1, 1),
        "aux_classifier.weight": (classes, WIDTH, 1, 1),
        "decoder.conv6.weight": (CHANNELS, WIDTH, 3, 3),
        "decoder.conv7.weight": (CHANNELS, CHANNELS, 3, 3),
        "decoder.conv8.weight": (classes + 1, CHANNELS, 1, 1),
    }
    return {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}


def save(folder, weights, **extra):
    path = folder / "weights.pth"
    torch.save({"model": weights, **extra}, path)
    return path


@pytest.mark.parametrize(("dataset", "classes"), [("voc", VOC_CLASSES), ("coco", COCO_CLASSES)])
def test_there_and_back_bit_for_bit(dataset, classes, tmp_path):
    weights = state_dict(len(classes))
    model, processor = from_official(save(tmp_path, weights), dataset, backbone="test_vit")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")

    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model")
    back = to_official(loaded)["model"]
    assert back.keys() == weights.keys()
    unused = {"encoder.head.weight", "encoder.head.bias"}
    for name, tensor in weights.items():
        assert back[name].shape == tensor.shape, name
        assert name in unused or torch.equal(back[name], tensor), name
    assert list(loaded.config.id2label.values()) == ["background", *classes]
    assert loaded.config.aux_layer == -3
    assert loaded.config.coexistence_classes == (list(VOC_COEXISTENCE) if dataset == "voc" else [])

    settings = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert dict(settings.size) == {"height": 448, "width": 448}
    assert list(settings.image_mean) == pytest.approx([0.485, 0.456, 0.406])
    assert list(settings.image_std) == pytest.approx([0.229, 0.224, 0.225])


def test_the_network_computes_what_the_tensors_say(tmp_path):
    """The heads on timm's own encoder, written out."""
    weights = state_dict(20)
    model, _ = from_official(save(tmp_path, weights), "voc", backbone="test_vit", aux_layer=-2)
    encoder = timm.create_model("test_vit").eval()
    encoder.load_state_dict(
        {name.removeprefix("encoder."): tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    )
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        outputs = model(images)
        features, blocks = encoder.forward_intermediates(images)
        features = features[:, 1:].transpose(1, 2).unflatten(2, (10, 10))
        cams = torch.nn.functional.conv2d(features, weights["classifier.weight"])
        aux_cams = torch.nn.functional.conv2d(blocks[-2], weights["aux_classifier.weight"])
        hidden = torch.nn.functional.conv2d(features, weights["decoder.conv6.weight"], padding=5, dilation=5).relu()
        hidden = torch.nn.functional.conv2d(hidden, weights["decoder.conv7.weight"], padding=5, dilation=5).relu()
        logits = torch.nn.functional.conv2d(hidden, weights["decoder.conv8.weight"])
    torch.testing.assert_close(outputs.cam_logits, cams)
    torch.testing.assert_close(outputs.aux_cam_logits, aux_cams)
    torch.testing.assert_close(outputs.logits, logits)


def test_settings_saved_along_are_no_obstacle(tmp_path):
    """The authors' trainer saves its arguments, paths among them, and its score, a number of numpy."""
    arguments = argparse.Namespace(lr=6e-5, output_dir=Path("runs/voc"), scales=[1.0, 0.5])
    path = save(tmp_path, state_dict(20), args=arguments, result=np.float64(76.2), epoch=32000, s_or_t="t")
    model, _ = from_official(path, "voc", backbone="test_vit")
    assert model.config.num_classes == 20


def change(weights, **changes):
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    return weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder__norm__bias": None}, "missing: encoder.norm.bias"),
        ({"decoder__conv6__weight": None}, "missing: decoder.conv6.weight"),
        ({"encoder__blocks__9__norm1__bias": torch.zeros(64)}, "not expected: encoder.blocks.9.norm1.bias"),
        ({"decoder__conv8__bias": torch.zeros(21)}, "not expected: decoder.conv8.bias"),
        (
            {"classifier__weight": torch.zeros(80, 64, 1, 1)},
            r"of another shape: classifier.weight \(80, 64, 1, 1\) instead of \(20, 64, 1, 1\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, message, tmp_path):
    path = save(tmp_path, change(state_dict(20), **changes))
    with pytest.raises(ValueError, match=message):
        from_official(path, "voc", backbone="test_vit")


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruded",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, state_dict(20), args=Intruder())
    with pytest.raises(ValueError, match=r"weights.pth is refused: .*mkdir.*code that loading would run") as refused:
        from_official(path, "voc", backbone="test_vit")
    assert not Path("intruded").exists()
    assert 'save {"model": torch.load(..., weights_only=False)["model"]} and convert that' in str(refused.value)
    torch.save({"model": torch.load(path, weights_only=False)["model"]}, "trusted.pth")
    from_official("trusted.pth", "voc", backbone="test_vit")


def test_other_files_are_refused(tmp_path):
    torch.save(state_dict(20), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare\.pth has no entry 'model'.*; found \['[^']+'(, '[^']+'){4}\]$"):
        from_official(tmp_path / "bare.pth", "voc", backbone="test_vit")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nowhere\.pth"):
        from_official(tmp_path / "nowhere.pth", "voc")
    with pytest.raises(ValueError, match="unknown data set 'ade'; known: voc, coco"):
        from_official(tmp_path / "bare.pth", "ade")
    (tmp_path / "text.pth").write_text("<html>download failed</html>")
    with pytest.raises(ValueError, match=r"text\.pth is refused: .*operand"):
        from_official(tmp_path / "text.pth", "voc")


def test_files_cut_short_are_named(tmp_path):
    path = save(tmp_path, state_dict(20))
    whole = path.read_bytes()
    torch.save({"model": state_dict(20)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    for part in (b"", whole[: len(whole) // 2], old[:1], old[:18], old[:-1]):
        (tmp_path / "part.pth").write_bytes(part)
        with pytest.raises(ValueError, match=r"part\.pth is empty or cut short \(.+\): download or copy it again$"):
            from_official(tmp_path / "part.pth", "voc", backbone="test_vit")
    for content in (whole, old):
        (tmp_path / "part.pth").write_bytes(content)
        from_official(tmp_path / "part.pth", "voc", backbone="test_vit")


def test_what_is_no_tensor_is_named(tmp_path):
    path = save(tmp_path, change(state_dict(20), decoder__conv6__weight=5, classifier__weight=[0.5]))
    with pytest.raises(
        ValueError, match=r"weights\.pth has more than tensors .*: classifier.weight, decoder.conv6.weight"
    ):
        from_official(path, "voc", backbone="test_vit")
    path = save(tmp_path, change(state_dict(20), step=5, scores=[0.5]))
    with pytest.raises(ValueError, match=r"more than tensors in its entry 'model': .*; take these out of it"):
        from_official(path, "voc", backbone="test_vit")
    from_official(save(tmp_path, state_dict(20)), "voc", backbone="test_vit")


def test_command_both_ways(tmp_path, cosa_hf):
    weights = state_dict(20)
    options = ("--dataset", "voc", "--backbone", "test_vit", "--aux_layer", -4)
    printed = cosa_hf("convert", "checkpoint", save(tmp_path, weights), tmp_path / "model", *options)
    assert "scales and flips are flags of `cosa-hf evaluate`" in printed
    assert CoSAForWeaklySupervisedSegmentation.from_pretrained(tmp_path / "model").config.aux_layer == -4
    cosa_hf("export", tmp_path / "model", tmp_path / "new" / "back.pth", "--format", "official")
    back = torch.load(tmp_path / "new" / "back.pth", weights_only=True)["model"]
    assert torch.equal(back["encoder.pos_embed"], weights["encoder.pos_embed"])


def test_commands_replace_nothing(tmp_path, complaint):
    (tmp_path / "model").mkdir()
    for name in ("model/model.safetensors", "back.pth", "model.onnx"):
        (tmp_path / name).write_text("mine")
    said = complaint("convert", "checkpoint", "nowhere.pth", tmp_path / "model", "--dataset", "voc")
    assert re.match(r"error: \S*model/model\.safetensors is there already: choose another name, or remove", said)
    for name, format in (("back.pth", "official"), ("model.onnx", "onnx")):
        said = complaint("export", "nowhere", tmp_path / name, "--format", format)
        assert re.match(rf"error: \S*{name} is there already: choose another name, or remove", said)
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"mine"}


def test_command_takes_no_network_without_cams(segmentation_only, tmp_path, complaint):
    said = complaint("export", segmentation_only, tmp_path / "back.pth", "--format", "official")
    assert re.match(r"error: a \w+ only segments and has no CAMs; give a model that CoSA trained\n$", said)
    assert not (tmp_path / "back.pth").exists()


def test_command_reports_in_one_line(tmp_path, complaint):
    words = ("convert", "checkpoint", tmp_path / "nowhere.pth", tmp_path / "model")
    said = complaint(*words, "--dataset", "voc")
    assert said.startswith("error: no checkpoint")
    assert said.count("\n") == 1
    assert "required: --dataset" in complaint(*words, usage=True)
    assert "--int8 is for" in complaint("export", "x", "y", "--format", "official", "--int8", usage=True)
    assert not (tmp_path / "model").exists()
