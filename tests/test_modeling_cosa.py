"""CoSAForWeaklySupervisedSegmentation over several families of backbones, at tiny sizes."""

import copy
import functools
import math

import numpy as np
import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, photos, scramble_batch_norm, tiny_config, tiny_model
from torch import nn

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAOutput
from cosa_hf.modeling_cosa import CoSALargeFOV


def all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


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
