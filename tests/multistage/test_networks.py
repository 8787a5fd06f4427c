import sys

import pytest
import torch
from PIL import Image
from tiny import save_segformer
from transformers import (
    AutoModelForSemanticSegmentation,
    EomtConfig,
    Mask2FormerForUniversalSegmentation,
    OneFormerConfig,
    SwinBackbone,
    SwinConfig,
    pipeline,
)

from cosa_hf.inference import load_model, segmentation_logits
from cosa_hf.multistage import networks
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.networks import build_network, encoder_of

NAMES = ["background", "cat", "dog"]
SMALL_SWIN = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2}  # the large one takes seconds


@pytest.fixture(scope="session")
def segformer(tmp_path_factory):
    """A directory with a tiny SegFormer of 150 classes, as one downloads them."""
    return str(save_segformer(tmp_path_factory.mktemp("segformer"), num_labels=150))


def recipe(network, **fields):
    settings = {"pretrained": False, "decoder_channels": 16, "input_size": 64} | fields
    return MultistageConfig(pseudo_labels="unused", network=network, **settings)


@pytest.mark.parametrize(
    "network", ["largefov/test_resnet", "smp/deeplabv3plus/test_resnet", "smp/unet/test_resnet", "upernet/test_resnet",
                "segformer"],
)  # fmt: skip
def test_every_kind_saves_loads_and_is_taken_by_the_pipeline(network, segformer, tmp_path):
    torch.manual_seed(0)
    options = {"decoder_channels": None} if network in ("smp/unet/test_resnet", "segformer") else {}
    wanted = recipe(segformer if network == "segformer" else network, **options)
    model, processor = build_network(wanted, NAMES, ["cat"])
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    pixel_values = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        logits = model(pixel_values).logits
        torch.testing.assert_close(loaded(pixel_values).logits, logits, atol=1e-5, rtol=1e-4)
    assert logits.shape[:2] == (2, 3)
    assert loaded.config.id2label == dict(enumerate(NAMES))
    assert loaded.config.coexistence_classes == ["cat"]
    segmenter = pipeline("image-segmentation", model=str(tmp_path))
    assert segmenter.image_processor.size["height"] == 64
    segments = segmenter(Image.new("RGB", (50, 40)))
    assert {segment["mask"].size for segment in segments} == {(50, 40)}
    assert {segment["label"] for segment in segments} <= set(NAMES)


def test_the_loss_of_a_model_of_ours_leaves_ignored_pixels_out():
    model, _ = build_network(recipe("largefov/test_resnet"), NAMES)
    model.eval()
    masks = torch.full((1, 64, 64), 255)
    masks[:, :8] = 1
    pixel_values = torch.randn(1, 3, 64, 64)
    loss, logits = model(pixel_values, labels=masks, return_dict=False)
    resized = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    expected = -resized.log_softmax(1)[:, 1, :8].mean()
    torch.testing.assert_close(loss, expected)
    assert model(torch.randn(1, 3, 50, 70)).logits.shape == (1, 3, 4, 4)  # to multiples of 32


def test_without_the_package_of_an_architecture_it_is_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "segmentation_models_pytorch", None)
        with pytest.raises(ValueError, match="needs a package: pip install segmentation_models_pytorch"):
            build_network(recipe("smp/unet/test_resnet", decoder_channels=None), NAMES)
    build_network(recipe("smp/unet/test_resnet", decoder_channels=None), NAMES)


def test_without_a_download_the_ways_out_are_named_and_are_some(tmp_path, monkeypatch):
    import timm

    create_model = timm.create_model
    torch.save(create_model("test_resnet").state_dict(), tmp_path / "encoder.pth")

    def offline(name, pretrained=False, pretrained_cfg_overlay=None, **options):
        if pretrained and not pretrained_cfg_overlay:
            raise FileNotFoundError("no connection")
        return create_model(name, pretrained=pretrained, pretrained_cfg_overlay=pretrained_cfg_overlay, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    said = r"Name a file of them \(--backbone_weights FILE\), or start from random ones \(--pretrained false\)"
    with pytest.raises(ValueError, match=said):
        build_network(recipe("largefov/test_resnet", pretrained=True), NAMES)
    weights = str(tmp_path / "encoder.pth")
    build_network(recipe("largefov/test_resnet", pretrained=True, backbone_weights=weights), NAMES)
    build_network(recipe("largefov/test_resnet", pretrained=False), NAMES)


def test_swin_comes_from_a_directory_or_random_weights_as_the_error_advises(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "SWIN_B_SHAPE", SMALL_SWIN)
    monkeypatch.setattr(networks, "SWIN_B", str(tmp_path / "nowhere"))
    source = SwinBackbone(SwinConfig(**SMALL_SWIN))
    source.save_pretrained(tmp_path / "swin")
    said = r"Name a directory of them \(--backbone_weights DIR\), or start from random ones \(--pretrained false\)"
    with pytest.raises(ValueError, match=said):
        build_network(recipe("upernet-swin-b", pretrained=True), NAMES)
    model, _ = build_network(recipe("upernet-swin-b", pretrained=True, backbone_weights=str(tmp_path / "swin")), NAMES)
    weights = source.state_dict()
    name = next(name for name in weights if name.endswith("patch_embeddings.projection.weight"))
    assert torch.equal(model.backbone.state_dict()[name], weights[name])
    build_network(recipe("upernet-swin-b", pretrained=False), NAMES)


def test_the_encoder_is_what_is_pretrained():
    model, _ = build_network(recipe("largefov/test_resnet"), NAMES)
    assert encoder_of(model) is model.encoder
    model, _ = build_network(recipe("upernet/test_resnet"), NAMES)
    assert encoder_of(model) is model.backbone


def test_encoder_weights_come_from_a_file(tmp_path):
    import timm

    source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "encoder.pth")
    for network in ("largefov/test_resnet", "upernet/test_resnet"):
        model, _ = build_network(
            recipe(network, pretrained=True, backbone_weights=str(tmp_path / "encoder.pth")), NAMES
        )
        assert torch.equal(encoder_of(model).state_dict()[next(iter(encoder_of(model).state_dict()))],
                           source.conv1[0].weight)  # fmt: skip
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of backbone 'test_resnet'"):
        build_network(
            recipe("largefov/test_resnet", pretrained=True, backbone_weights=str(tmp_path / "other.pth")), NAMES
        )


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("nothing-of-the-kind", "known by name are deeplabv3plus-r101, largefov-wr38, upernet-swin-b, smp/ARCH"),
        ("largefov/resnet1000", "'resnet1000' is not a model of timm"),
        ("upernet/resnet1000", "'resnet1000' is not a model of timm"),
    ],
)
def test_a_network_that_does_not_exist_is_named(network, message):
    with pytest.raises(ValueError, match=message):
        build_network(recipe(network), NAMES)


def test_a_network_that_answers_with_a_set_of_masks_saves_and_loads(mask2former, tmp_path):
    model, processor = build_network(recipe(mask2former, pretrained=True, decoder_channels=None), NAMES, ["cat"])
    pretrained = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former)
    for name, weights in pretrained.model.state_dict().items():
        torch.testing.assert_close(encoder_of(model).state_dict()[name], weights)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, processor = load_model(str(tmp_path), "cpu")
    pixel_values = processor(Image.new("RGB", (50, 40)), return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 64, 64)
    with torch.no_grad():
        logits = segmentation_logits(loaded(pixel_values))
        torch.testing.assert_close(segmentation_logits(model(pixel_values)), logits)
    assert logits.shape[:2] == (1, 3)
    segments = pipeline("image-segmentation", model=str(tmp_path))(Image.new("RGB", (50, 40)), subtask="semantic")
    assert {segment["label"] for segment in segments} <= set(NAMES)


@pytest.mark.parametrize("config", [OneFormerConfig, EomtConfig])
def test_a_network_that_wants_other_than_images_of_any_size_is_refused(config, tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"must be a transformers model (.|\n)*{config.__name__}"):
        build_network(recipe(str(tmp_path)), NAMES)


def test_an_architecture_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"unknown architecture 'nonet'; known: largefov, deeplabv3, deeplabv3plus"):
        build_network(recipe("smp/nonet/test_resnet"), NAMES)


@pytest.mark.parametrize(
    ("network", "fields"),
    [
        ("segformer", {"backbone_weights": "mit.pth", "pretrained": True}),
        ("segformer", {"decoder_channels": 16}),
        ("segformer", {"output_stride": 8}),
        ("upernet/test_resnet", {"output_stride": 16}),
        ("upernet-swin-b", {"output_stride": 8}),
        ("smp/unet/test_resnet", {"output_stride": 8}),
        ("smp/unet/test_resnet", {"decoder_channels": 16}),
        ("smp/linknet/test_resnet", {"decoder_channels": 16}),
    ],
)
def test_a_field_that_the_network_does_not_follow_is_named(network, fields, segformer, monkeypatch):
    name, value = next(iter(fields.items()))
    network = segformer if network == "segformer" else network
    monkeypatch.setattr(networks, "SWIN_B_SHAPE", SMALL_SWIN)
    with pytest.raises(ValueError, match=rf"{name}={value!r} has no effect on network {network!r}: leave it out"):
        build_network(recipe(network, **{"decoder_channels": None} | fields), NAMES)
    build_network(recipe(network, **{"decoder_channels": None} | fields | {name: None}), NAMES)


@pytest.mark.parametrize("network", ["largefov/test_resnet", "smp/deeplabv3plus/test_resnet"])
def test_the_stride_is_followed_where_it_can_be(network):
    for stride, sides in ((None, (4, 6)), (8, (8, 12))):
        model, _ = build_network(recipe(network, output_stride=stride), NAMES)
        with torch.no_grad():
            last = model.eval().encoder(torch.zeros(1, 3, 64, 96))[-1]
        assert last.shape[-2:] == sides


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_channels": 0}, "decoder_channels must be at least 1, got 0"),
        ({"backbone_weights": "r101.pth"}, "backbone_weights r101.pth need pretrained: true"),
    ],
)
def test_a_setting_that_would_pass_for_another_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        recipe("largefov/test_resnet", **fields)


def test_a_stride_that_no_encoder_has_is_named():
    with pytest.raises(ValueError, match="output_stride=5 must be 8, 16 or 32"):
        build_network(recipe("largefov/test_resnet", output_stride=5), NAMES)


@pytest.mark.parametrize(
    ("network", "millions", "side"),
    [("deeplabv3plus-r101", 45.67, 128), ("largefov-wr38", 126.32, 64), ("upernet-swin-b", 120.13, 512)],
)
def test_the_papers_networks_at_512_pixels(network, millions, side):
    names = [f"class {index}" for index in range(21)]
    settings = MultistageConfig.values_of(network) | {"pseudo_labels": "unused", "pretrained": False}
    with torch.no_grad(), torch.device("meta"):  # shapes alone, no values
        model, _ = build_network(MultistageConfig.from_mapping(settings), names)
        logits = model.eval()(torch.zeros(1, 3, 512, 512)).logits
    assert logits.shape == (1, 21, side, side)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_an_encoder_that_cannot_be_dilated_is_named():
    recipe = MultistageConfig(pseudo_labels="labels", network="largefov/pvt_v2_b0", pretrained=False)
    message = r"architecture 'largefov' cannot be made with encoder 'pvt_v2_b0': .*output_stride"
    with pytest.raises(ValueError, match=message):
        build_network(recipe, ["background", "cat"])
