"""Heads for encoders that stay as they are, each against the reference."""

import math

import numpy as np
import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import array, photos, tiny_config, tiny_model
from torch import nn

from cosa_hf import CoSAForWeaklySupervisedSegmentation
from cosa_hf.modeling_cosa import CoSADecoderInput, CoSAMLP, smooth_maximum

FROZEN = {
    "feature_layer": -3,
    "aux_layer": -1,
    "aux_attention": "value-value",
    "pooling": "lse",
    "pooling_weights": "distance",
    "classifier_bias": True,
    "center_features": True,
    "standardize_features": True,
    "decoder": "mlp",
    "decoder_inputs": "concat",
    "decoder_dropout": 0.1,
    "affinity": "attention",
    "affinity_blocks": [-4, -3],
}


def test_biases_start_where_most_classes_are_absent():
    model = tiny_model(pooling="lse", classifier_bias=True)
    assert torch.cat([model.classifier.bias, model.aux_classifier.bias]).eq(-2).all()


def test_an_affinity_that_the_config_lacks_is_refused():
    with pytest.raises(ValueError, match="affinity is not 'none'"):
        tiny_model()(photos(1, 3, 32, 32), output_affinity=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # as in test_modeling_cosa
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_rest_learns_from_tokens_as_from_images(checkpointing):
    model = tiny_model(aux_layer=-2).train()
    model.backbone.freeze(4)
    if checkpointing:
        model.gradient_checkpointing_enable()
    images, gradients = photos(2, 3, 48, 64), []
    for inputs in ({"pixel_values": images}, {"encoded": model.backbone.encode(images)}):
        model.zero_grad()
        outputs = model(**inputs, labels=torch.eye(3)[:2])
        (outputs.loss + outputs.logits.square().mean()).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("blocks.4.attn" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


@given(st.data(), strategies.map_shapes, st.sampled_from([0.1, 4.0, 50.0]))
def test_smooth_maximum_equals_reference(data, shape, sharpness):
    logits = data.draw(strategies.logits(shape))
    flat = torch.tensor(logits).flatten(2)
    expected = reference.smooth_maximum(array(flat), sharpness)
    size = max(1.0, float(flat.abs().max()))
    np.testing.assert_allclose(smooth_maximum(flat, sharpness).numpy(), expected, rtol=1e-5, atol=1e-5 * size)


@given(st.data(), strategies.map_shapes, st.sampled_from([0.1, 4.0]))
def test_weighted_smooth_maximum_equals_reference(data, shape, sharpness):
    flat = torch.tensor(data.draw(strategies.logits(shape))).flatten(2).double().clamp(-50, 50)
    weights = torch.rand(len(flat), 1, flat.shape[2], dtype=torch.float64) + 0.01
    expected = reference.smooth_maximum(array(flat), sharpness, array(weights[:, 0]))
    np.testing.assert_allclose(array(smooth_maximum(flat, sharpness, weights)), expected, rtol=1e-9, atol=1e-9)
    equal = smooth_maximum(flat, sharpness, torch.ones_like(weights))
    torch.testing.assert_close(equal, smooth_maximum(flat, sharpness))


@pytest.mark.parametrize("pooling", ["max", "lse", "token-max"])
@pytest.mark.parametrize("bias", [False, True])
def test_heads_equal_reference(pooling, bias):
    model = tiny_model(pooling=pooling, classifier_bias=bias, pooling_sharpness=3.0).eval()
    if bias:
        nn.init.normal_(model.classifier.bias)
    features, aux_features = photos(2, 2, 64, 3, 4)
    outputs = model.forward_heads(features, aux_features)
    weight = array(model.classifier.weight)[:, :, 0, 0]
    offset = array(model.classifier.bias) if bias else np.zeros(3)
    maps = reference.activation_maps(array(features), weight) + offset[:, None, None]
    np.testing.assert_allclose(array(outputs.cam_logits), maps, atol=1e-5)
    tokens = maps.reshape(2, 3, -1)
    expected = {
        "max": reference.class_logits(array(features), weight) + offset,
        "lse": reference.smooth_maximum(tokens, 3.0),
        "token-max": tokens.max(axis=2),
    }
    np.testing.assert_allclose(array(outputs.cls_logits), expected[pooling], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooled_logits_in_half_precision_stay_finite(dtype):
    model = tiny_model(pooling="lse", classifier_bias=True).to(dtype)
    outputs = model(photos(2, 3, 64, 64), labels=torch.ones(2, 3))
    assert outputs.cls_logits.dtype == dtype
    assert outputs.loss.isfinite()
    assert smooth_maximum(torch.full((1, 1, 9), 6e4, dtype=torch.float16), 4.0).isfinite().all()


def test_feature_statistics_are_those_of_all_tokens():
    model = tiny_model(standardize_features=True, aux_layer=-2).eval()
    batches = [(photos(2, 64, 2, 3) * 5 + 3, photos(2, 64, 2, 3)), (photos(1, 64, 4, 4) - 7, photos(1, 64, 4, 4))]
    batches[0][0][:, 5], batches[1][0][:, 5] = 2.0, 2.0  # a channel that says nothing
    model.set_feature_statistics(batches)
    for name, index in (("feature", 0), ("aux_feature", 1)):
        values = np.concatenate([array(maps[index].transpose(0, 1).flatten(1)) for maps in batches], axis=1)
        np.testing.assert_allclose(array(getattr(model, f"{name}_mean")), values.mean(axis=1), atol=1e-6)
        expected = np.maximum(values.std(axis=1), 1e-6)
        np.testing.assert_allclose(array(getattr(model, f"{name}_std")), expected, rtol=1e-4, atol=1e-6)
    features, aux_features = batches[0]
    outputs = model.forward_heads(features, aux_features, output_hidden_states=True)
    plain = tiny_model(aux_layer=-2).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    mean, std = model.feature_mean[:, None, None], model.feature_std[:, None, None]
    torch.testing.assert_close(outputs.hidden_states[1], (features - mean) / std)
    expected = plain.forward_heads(outputs.hidden_states[1], outputs.hidden_states[0])
    torch.testing.assert_close(outputs.cam_logits, expected.cam_logits)
    torch.testing.assert_close(outputs.logits, expected.logits)


def test_centered_heads_see_what_stands_out_and_count_it_by_its_distance():
    settings = {"center_features": True, "pooling": "lse", "pooling_weights": "distance", "aux_layer": -2}
    model = tiny_model(**settings, standardize_features=True, pooling_sharpness=2.0).double().eval()
    nn.init.normal_(model.classifier.weight)
    features, aux_features = photos(3, 64, 2, 3).double() * 5 + 3, photos(3, 64, 2, 3).double()
    model.set_feature_statistics([(features, aux_features)])
    outputs = model.forward_heads(features, aux_features, output_hidden_states=True)
    apart = array(features) - array(features).mean(axis=(2, 3), keepdims=True)
    seen = apart / apart.std(axis=(0, 2, 3))[:, None, None]  # the mean over all tokens is 0
    np.testing.assert_allclose(array(outputs.hidden_states[1]), seen, atol=1e-9)
    maps = reference.activation_maps(seen, array(model.classifier.weight)[:, :, 0, 0])
    np.testing.assert_allclose(array(outputs.cam_logits), maps, atol=1e-9)
    lengths = np.linalg.norm(seen, axis=1).reshape(3, -1)
    expected = reference.smooth_maximum(maps.reshape(3, 3, -1), 2.0, lengths)
    np.testing.assert_allclose(array(outputs.cls_logits), expected, atol=1e-9)
    # A look that fills the image is no evidence.
    shifted = model.forward_heads(features + photos(3, 64, 1, 1).double(), aux_features)
    torch.testing.assert_close(shifted.cls_logits, outputs.cls_logits)


def test_centered_classifiers_start_at_zero_and_first_move_to_what_stands_out(tmp_path):
    settings = {"center_features": True, "pooling": "lse", "pooling_weights": "distance", "classifier_bias": True}
    model = tiny_model(**settings)
    assert not model.classifier.weight.any()
    assert not model.aux_classifier.weight.any()
    assert tiny_model(pooling="lse", classifier_bias=True).classifier.weight.any()
    # One token in twelve is far from the others, which are all alike.
    features = torch.zeros(1, 64, 3, 4)
    features[0, :, 1, 2] = photos(64)
    model.forward_heads(features, features, labels=torch.tensor([[1.0, 0.0, 0.0]])).loss.backward()
    step = -model.classifier.weight.grad[:, :, 0, 0]
    evidence = step @ (features - features.mean(dim=(2, 3), keepdim=True))[0].flatten(1)  # (classes, tokens)
    assert evidence[0].argmax() == 6
    assert (evidence[0] > 0).sum() == 1
    assert (evidence[1:, 6] < 0).all()
    # What has learned keeps its weights.
    nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    loaded = CoSAForWeaklySupervisedSegmentation.from_pretrained(tmp_path)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_image_of_one_colour_has_logits_and_gradients(dtype):
    settings = {"center_features": True, "pooling": "lse", "pooling_weights": "distance", "classifier_bias": True}
    model = tiny_model(**settings).to(dtype)
    features = torch.ones(1, 64, 2, 2, dtype=dtype, requires_grad=True)
    outputs = model.forward_heads(features, features, labels=torch.ones(1, 3))
    torch.testing.assert_close(outputs.cls_logits, model.classifier.bias[None].detach(), check_dtype=False)
    outputs.loss.backward()
    assert all(each.isfinite().all() for each in (features.grad, model.classifier.bias.grad))


def test_without_statistics_nothing_is_standardised(tmp_path):
    plain = tiny_model().eval()
    assert not any("feature_" in name for name in plain.state_dict())
    model = tiny_model(standardize_features=True).eval()
    assert torch.equal(plain(photos(1, 3, 32, 32)).logits, model(photos(1, 3, 32, 32)).logits)
    # A checkpoint from before knows none.
    plain.save_pretrained(tmp_path)
    loaded = CoSAForWeaklySupervisedSegmentation.from_pretrained(tmp_path, standardize_features=True)
    assert (loaded.feature_mean == 0).all()
    assert (loaded.aux_feature_std == 1).all()


def test_statistics_of_nothing_or_of_a_model_without_are_refused():
    with pytest.raises(ValueError, match="standardize_features=True"):
        tiny_model().set_feature_statistics([])
    with pytest.raises(ValueError, match="one image"):
        tiny_model(standardize_features=True).set_feature_statistics(iter(()))


def test_mlp_equals_reference():
    torch.manual_seed(0)
    decoder = CoSAMLP(tiny_config(decoder_channels=5), in_channels=3).double()
    features = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    layers = [(array(layer.weight)[:, :, 0, 0], array(layer.bias)) for layer in (decoder.hidden, decoder.output)]
    np.testing.assert_allclose(array(decoder(features)), reference.mlp(features.numpy(), *layers), atol=1e-12)


@pytest.mark.parametrize("inputs", ["last", "concat"])
def test_the_decoder_sees_what_it_is_told(inputs):
    settings = tiny_config(decoder_inputs=inputs, decoder_dropout=0.5)
    module = CoSADecoderInput(settings, 3, 2).double().eval()
    features, aux_features = photos(4, 3, 2, 3).double(), photos(4, 2, 2, 3).double()
    expected = array(features)
    if inputs == "concat":
        nn.init.normal_(module.norm.weight)
        tokens = np.moveaxis(np.concatenate([array(features), array(aux_features)], axis=1), 1, -1)
        tokens = reference.layer_norm(tokens, array(module.norm.weight), array(module.norm.bias), module.norm.eps)
        expected = np.moveaxis(tokens, -1, 1)
    np.testing.assert_allclose(array(module(features, aux_features)), expected, atol=1e-12)
    dropped = array(module.train()(features, aux_features))
    kept = (dropped != 0).any(axis=(2, 3))
    assert 0 < kept.sum() < kept.size  # whole channels, image by image
    np.testing.assert_allclose(dropped, 2 * expected * kept[:, :, None, None], atol=1e-12)


def test_state_dict_of_a_frozen_recipe():
    names = {
        name: tuple(value.shape) for name, value in tiny_model(**FROZEN).state_dict().items() if "backbone" not in name
    }
    assert names == {
        "feature_mean": (64,), "feature_std": (64,), "aux_feature_mean": (64,), "aux_feature_std": (64,),
        "classifier.weight": (3, 64, 1, 1), "classifier.bias": (3,),
        "aux_classifier.weight": (3, 64, 1, 1), "aux_classifier.bias": (3,),
        "decoder_input.norm.weight": (128,), "decoder_input.norm.bias": (128,),
        "decoder.hidden.weight": (16, 128, 1, 1), "decoder.hidden.bias": (16,),
        "decoder.output.weight": (4, 16, 1, 1), "decoder.output.bias": (4,),
    }  # fmt: skip


def test_saved_and_loaded_again(tmp_path):
    model = tiny_model(**FROZEN).eval()
    model.set_feature_statistics([model.backbone(photos(2, 3, 64, 64))])
    model.save_pretrained(tmp_path)
    loaded, report = CoSAForWeaklySupervisedSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, value in FROZEN.items():
        assert getattr(loaded.config, name) == value
    expected, found = (each(photos(2, 3, 48, 64), output_affinity=True) for each in (model, loaded))
    assert found.affinity.shape == (2, 12, 12)
    for left, right in zip(expected.to_tuple(), found.to_tuple(), strict=True):
        assert torch.equal(left, right)


def test_initial_values_of_the_heads():
    model = tiny_model(**FROZEN | {"decoder_channels": 64})
    assert model.decoder.hidden.weight.std().item() == pytest.approx(0.02, rel=0.2)
    for bias in (model.decoder.hidden.bias, model.decoder.output.bias, model.decoder_input.norm.bias):
        assert (bias == 0).all()
    assert (model.decoder_input.norm.weight == 1).all()


def test_heads_learn_and_are_told_apart():
    model = tiny_model(**FROZEN).train()
    outputs = model(photos(2, 3, 64, 64), labels=torch.eye(3)[:2])
    (outputs.loss + outputs.logits.square().mean()).backward()
    heads = [name for name, _ in model.named_parameters() if not name.startswith("backbone")]
    assert all(model.get_parameter(name).grad is not None for name in heads)
    assert {id(weight) for weight in model.head_parameters()} == {id(model.get_parameter(name)) for name in heads}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # as in test_modeling_cosa
def test_gradient_checkpointing_changes_nothing():
    model = tiny_model(**FROZEN | {"decoder_dropout": 0.0}).train()

    def gradients():
        model.zero_grad()
        outputs = model(photos(2, 3, 64, 64), labels=torch.eye(3)[:2])
        (outputs.loss + outputs.logits.square().mean()).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_compiles_as_one_graph():
    model = tiny_model(**FROZEN).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = photos(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits)


def test_limits_of_the_smooth_maximum():
    logits = photos(1, 2, 50)
    torch.testing.assert_close(smooth_maximum(logits, 1e-2), logits.mean(2), atol=1e-2, rtol=0)
    highest = logits.amax(2)
    assert ((highest - smooth_maximum(logits, 4.0)) <= math.log(50) / 4).all()
    torch.testing.assert_close(smooth_maximum(logits, 1e4), highest, atol=1e-3, rtol=0)
