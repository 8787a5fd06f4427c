"""What F and F† can be, and the heads for encoders that stay as they are: each against the reference, at tiny sizes."""

import math

import numpy as np
import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation
from cosa_hf.modeling_cosa import CoSABackbone, CoSADecoderInput, CoSAMLP, smooth_maximum

# Plain ViTs: with a class token, with a register and layer scale, with other norms in their blocks and none at the end
VITS = ["test_vit", "test_vit3", "test_vit4"]
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


def config(backbone="test_vit", **settings) -> CoSAConfig:
    return CoSAConfig(backbone=backbone, **{"num_labels": 4, "decoder_channels": 16} | settings)


def build(backbone="test_vit", **settings) -> CoSAForWeaklySupervisedSegmentation:
    torch.manual_seed(0)
    return CoSAForWeaklySupervisedSegmentation(config(backbone, **settings))


def photos(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def scrambled(backbone: CoSABackbone) -> CoSABackbone:
    """Fresh norms and layer scales are near the identity, and fresh attention is flat."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in backbone.named_parameters():
            if "qkv" in name:
                weight.mul_(20)
            elif weight.ndim == 1:
                weight.add_(0.5 * torch.randn(weight.shape, generator=generator))
    return backbone.eval()


def inputs_of(backbone: CoSABackbone, images: torch.Tensor) -> dict[int, torch.Tensor]:
    """What each block sees, (B, N, D), by its number from the end."""
    seen: dict[int, torch.Tensor] = {}
    blocks = backbone.model.blocks
    hooks = [
        block.register_forward_pre_hook(lambda _, args, n=number: seen.update({n - len(blocks): args[0]}))
        for number, block in enumerate(blocks)
    ]
    with torch.no_grad():
        backbone.model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return seen


def normed(norm, tokens: np.ndarray) -> np.ndarray:
    if isinstance(norm, nn.Identity):
        return tokens
    if not hasattr(norm, "bias"):  # RMS
        return tokens / np.sqrt((tokens**2).mean(axis=-1, keepdims=True) + norm.eps) * array(norm.weight)
    return reference.layer_norm(tokens, array(norm.weight), array(norm.bias), norm.eps)


def heads_of(block, tokens: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Query, key and value (N, d) of each head, for the tokens (N, D) of one image."""
    attention = block.attn
    together = normed(block.norm1, tokens) @ array(attention.qkv.weight).T
    if attention.qkv.bias is not None:
        together = together + array(attention.qkv.bias)
    query, key, value = (part.reshape(len(tokens), attention.num_heads, -1) for part in np.split(together, 3, axis=1))
    return [
        (normed(attention.q_norm, query[:, head]), normed(attention.k_norm, key[:, head]), value[:, head])
        for head in range(attention.num_heads)
    ]


def dense_reference(backbone: CoSABackbone, tokens: np.ndarray, attention: str) -> np.ndarray:
    """The map of one image, (N, D), from what its last block sees."""
    block = backbone.model.blocks[-1]
    mixed = []
    for _, _, value in heads_of(block, tokens):
        mixed.append(reference.attention_weights(value, value) @ value if attention == "value-value" else value)
    result = np.concatenate(mixed, axis=1) @ array(block.attn.proj.weight).T + array(block.attn.proj.bias)
    scale = 1.0 if isinstance(block.ls1, nn.Identity) else array(block.ls1.gamma)
    return normed(backbone.model.norm, result * scale)[backbone.model.num_prefix_tokens :]


# --- the maps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("attention", ["value", "value-value"])
def test_dense_maps_equal_reference(name, attention):
    backbone = scrambled(CoSABackbone(config(name, attention=attention)))
    images = photos(2, 3, 48, 64)
    with torch.no_grad():
        features, _ = backbone(images)
    for image, tokens in enumerate(inputs_of(backbone, images)[-1]):
        expected = dense_reference(backbone, array(tokens), attention).T.reshape(-1, 3, 4)
        np.testing.assert_allclose(features[image].numpy(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", VITS)
def test_mean_attention_equals_reference(name):
    images, blocks = photos(2, 3, 48, 64), [-5, -2]
    backbone = scrambled(CoSABackbone(config(name, affinity="attention", affinity_blocks=blocks)))
    seen = inputs_of(backbone, images)
    with torch.no_grad():
        attention = backbone(images, affinity=True)[2]
    assert attention.shape == (2, 12, 12)
    prefix = backbone.model.num_prefix_tokens
    for image in range(2):
        weights = [
            reference.attention_weights(query, key)[prefix:, prefix:]
            for block in blocks
            for query, key, _ in heads_of(backbone.model.blocks[block], array(seen[block][image]))
        ]
        np.testing.assert_allclose(attention[image].numpy(), np.mean(weights, axis=0), atol=1e-5)
    assert (attention.sum(dim=2) <= 1 + 1e-5).all()  # the rest goes to class token and registers


def test_half_precision_attention_is_summed_in_full():
    backbone = CoSABackbone(config(affinity="attention", affinity_blocks=[-1])).to(torch.bfloat16)
    assert backbone(photos(1, 3, 32, 32).bfloat16(), affinity=True)[2].dtype == torch.float32


def test_a_middle_layer_is_its_blocks_output_and_later_blocks_are_left_out():
    whole = scrambled(CoSABackbone(config(aux_layer=-5)))
    backbone = CoSABackbone(config(feature_layer=-3, aux_layer=-5, affinity="features", affinity_layer=-4)).eval()
    backbone.load_state_dict(whole.state_dict(), strict=False)
    left_out = whole.state_dict().keys() - backbone.state_dict().keys()
    assert {name.split(".")[1] for name in left_out} == {"blocks", "norm"}
    assert {name.split(".")[2] for name in left_out if "blocks" in name} == {"4", "5"}
    images = photos(1, 3, 64, 96)
    with torch.no_grad():
        features, aux_features, affinity = backbone(images, affinity=True)
    seen = inputs_of(whole, images)  # of the block after it
    for layer, found in ((-3, features), (-5, aux_features), (-4, affinity)):
        expected = seen[layer + 1][:, 1:].transpose(1, 2).unflatten(2, (4, 6))
        assert torch.equal(found, expected), layer


def test_either_map_can_be_either():
    """F of the middle with F† of the last block's values, and the other way round."""
    one = scrambled(CoSABackbone(config(feature_layer=-3, aux_layer=-1, aux_attention="value-value")))
    other = CoSABackbone(config(feature_layer=-1, attention="value-value", aux_layer=-3)).eval()
    other.load_state_dict(one.state_dict())
    images = photos(1, 3, 64, 64)
    with torch.no_grad():
        for left, right in zip(one(images), reversed(other(images)), strict=True):
            assert torch.equal(left, right)


def test_both_maps_of_the_last_block():
    both = CoSABackbone(config(aux_layer=-1, aux_attention="value")).eval()
    standard = CoSABackbone(config()).eval()
    standard.load_state_dict(both.state_dict())
    images = photos(1, 3, 64, 64)
    features, aux_features = both(images)
    assert torch.equal(features, standard(images)[0])
    assert not torch.allclose(features, aux_features)


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_an_earlier_stage_of_a_pyramid_is_on_its_own_grid(name):
    backbone = CoSABackbone(config(name, feature_layer=-2, aux_layer=-1, output_stride=32)).eval()
    deeper = CoSABackbone(config(name, aux_layer=-2, output_stride=32)).eval()
    deeper.load_state_dict(backbone.state_dict())
    assert (backbone.stride, deeper.stride) == (16, 32)
    images = photos(1, 3, 64, 96)
    (features, aux_features), (last, _) = backbone(images), deeper(images)
    assert features.shape[-2:] == aux_features.shape[-2:] == (4, 6)
    resized = nn.functional.interpolate(last, size=(4, 6), mode="bilinear", align_corners=False)
    assert torch.equal(aux_features, resized)
    assert backbone(photos(1, 3, 48, 80))[0].shape[-2:] == (3, 5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"backbone": "test_resnet", "attention": "value"}, "attention='value' needs .* 'test_resnet' lacks"),
        ({"backbone": "swin_tiny_patch4_window7_224", "attention": "value-value"}, "'swin_tiny_patch4_window7_224'"),
        ({"backbone": "eva02_tiny_patch14_224", "aux_layer": -1, "aux_attention": "value"}, "aux_attention='value'"),
        ({"backbone": "test_resnet", "affinity": "attention"}, "affinity='attention' needs"),
        ({"affinity": "attention", "affinity_blocks": [-7, -1]}, r"affinity_blocks=\[-7, -1\].* blocks -6 to -1"),
        ({"affinity": "features", "affinity_layer": -9}, "affinity_layer=-9 is not a layer of 'test_vit'"),
        ({"feature_layer": -7}, "feature_layer=-7 is not a layer of 'test_vit'"),
    ],
)
def test_what_a_backbone_lacks_is_named(settings, named):
    with pytest.raises(ValueError, match=named), torch.device("meta"):
        CoSABackbone(config(**{"aux_layer": -2} | settings))


def test_biases_start_where_most_classes_are_absent():
    model = build(pooling="lse", classifier_bias=True)
    assert torch.cat([model.classifier.bias, model.aux_classifier.bias]).eq(-2).all()


def test_an_affinity_that_the_config_lacks_is_refused():
    with pytest.raises(ValueError, match="affinity is not 'none'"):
        build()(photos(1, 3, 32, 32), output_affinity=True)


# --- a frozen part, and what follows it ------------------------------------------------------------------


ALL_BUT_TWO = [  # what the maps are, and what of them all blocks but the last two make
    ({}, {"tokens", "prefix"}),
    ({"aux_layer": -3}, {"aux_features", "tokens", "prefix"}),
    ({"attention": "value-value", "aux_layer": -4}, {"aux_features", "tokens", "prefix"}),
    ({"feature_layer": -3, "aux_layer": -4}, {"features", "aux_features"}),
    ({"affinity": "features", "affinity_layer": -4}, {"affinity", "tokens", "prefix"}),
    ({"affinity": "features", "affinity_layer": -2}, {"tokens", "prefix"}),
    ({"affinity": "attention", "affinity_blocks": [-4, -3]}, {"affinity", "tokens", "prefix"}),
    ({"affinity": "attention", "affinity_blocks": [-4, -2]}, {"affinity", "tokens", "prefix"}),
    ({"affinity": "attention", "affinity_blocks": [-2, -1]}, {"tokens", "prefix"}),
]


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize(("settings", "made"), ALL_BUT_TWO)
def test_the_frozen_part_and_the_rest_are_the_whole(name, settings, made):
    backbone = scrambled(CoSABackbone(config(name, **{"aux_layer": -2} | settings)))
    backbone.freeze(len(backbone.model.blocks) - 2)
    images = photos(2, 3, 48, 64)
    encoded = backbone.encode(images, affinity=True)
    assert set(encoded) == made
    assert not any(each.requires_grad for each in encoded.values())
    for affinity in (False, True):
        completed, expected = backbone.complete(encoded, affinity), backbone(images, affinity)
        for found, each in zip(completed, expected, strict=True):
            torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_of_a_frozen_encoder_all_maps_are_made_beforehand(name):
    backbone = CoSABackbone(config(name, aux_layer=-2, affinity="features", affinity_layer=-2)).eval()
    backbone.freeze()
    images = photos(1, 3, 64, 64)
    encoded = backbone.encode(images, affinity=True)
    assert list(encoded) == ["features", "aux_features", "affinity"]
    for found, each in zip(backbone.complete(encoded, affinity=True), backbone(images, affinity=True), strict=True):
        assert torch.equal(found, each)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # as in test_modeling_cosa
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_rest_learns_from_tokens_as_from_images(checkpointing):
    model = build(aux_layer=-2).train()
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


def test_what_comes_before_the_blocks_is_frozen_whatever_timm_counts_it_to(monkeypatch):
    from timm.models.vision_transformer import VisionTransformer

    earlier = {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}
    monkeypatch.setattr(VisionTransformer, "group_matcher", lambda self, coarse=False: earlier)
    backbone = CoSABackbone(config("test_vit3"))
    backbone.freeze(2)
    assert not backbone.model.reg_token.requires_grad
    assert backbone.model.norm.weight.requires_grad


# --- the heads --------------------------------------------------------------------------------------------


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
    model = build(pooling=pooling, classifier_bias=bias, pooling_sharpness=3.0).eval()
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
    model = build(pooling="lse", classifier_bias=True).to(dtype)
    outputs = model(photos(2, 3, 64, 64), labels=torch.ones(2, 3))
    assert outputs.cls_logits.dtype == dtype
    assert outputs.loss.isfinite()
    assert smooth_maximum(torch.full((1, 1, 9), 6e4, dtype=torch.float16), 4.0).isfinite().all()


def test_feature_statistics_are_those_of_all_tokens():
    model = build(standardize_features=True, aux_layer=-2).eval()
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
    plain = build(aux_layer=-2).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    mean, std = model.feature_mean[:, None, None], model.feature_std[:, None, None]
    torch.testing.assert_close(outputs.hidden_states[1], (features - mean) / std)
    expected = plain.forward_heads(outputs.hidden_states[1], outputs.hidden_states[0])
    torch.testing.assert_close(outputs.cam_logits, expected.cam_logits)
    torch.testing.assert_close(outputs.logits, expected.logits)


def test_centered_heads_see_what_stands_out_and_count_it_by_its_distance():
    settings = {"center_features": True, "pooling": "lse", "pooling_weights": "distance", "aux_layer": -2}
    model = build(**settings, standardize_features=True, pooling_sharpness=2.0).double().eval()
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
    model = build(**settings)
    assert not model.classifier.weight.any()
    assert not model.aux_classifier.weight.any()
    assert build(pooling="lse", classifier_bias=True).classifier.weight.any()
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
    model = build(**settings).to(dtype)
    features = torch.ones(1, 64, 2, 2, dtype=dtype, requires_grad=True)
    outputs = model.forward_heads(features, features, labels=torch.ones(1, 3))
    torch.testing.assert_close(outputs.cls_logits, model.classifier.bias[None].detach(), check_dtype=False)
    outputs.loss.backward()
    assert all(each.isfinite().all() for each in (features.grad, model.classifier.bias.grad))


def test_without_statistics_nothing_is_standardised(tmp_path):
    plain = build().eval()
    assert not any("feature_" in name for name in plain.state_dict())
    model = build(standardize_features=True).eval()
    assert torch.equal(plain(photos(1, 3, 32, 32)).logits, model(photos(1, 3, 32, 32)).logits)
    # A checkpoint from before knows none.
    plain.save_pretrained(tmp_path)
    loaded = CoSAForWeaklySupervisedSegmentation.from_pretrained(tmp_path, standardize_features=True)
    assert (loaded.feature_mean == 0).all()
    assert (loaded.aux_feature_std == 1).all()


def test_statistics_of_nothing_or_of_a_model_without_are_refused():
    with pytest.raises(ValueError, match="standardize_features=True"):
        build().set_feature_statistics([])
    with pytest.raises(ValueError, match="one image"):
        build(standardize_features=True).set_feature_statistics(iter(()))


def test_mlp_equals_reference():
    torch.manual_seed(0)
    decoder = CoSAMLP(config(decoder_channels=5), in_channels=3).double()
    features = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    layers = [(array(layer.weight)[:, :, 0, 0], array(layer.bias)) for layer in (decoder.hidden, decoder.output)]
    np.testing.assert_allclose(array(decoder(features)), reference.mlp(features.numpy(), *layers), atol=1e-12)


@pytest.mark.parametrize("inputs", ["last", "concat"])
def test_the_decoder_sees_what_it_is_told(inputs):
    settings = config(decoder_inputs=inputs, decoder_dropout=0.5)
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


# --- everything that a model must be able to do, for one that uses all of this ---------------------------


def test_state_dict_of_a_frozen_recipe():
    names = {name: tuple(value.shape) for name, value in build(**FROZEN).state_dict().items() if "backbone" not in name}
    assert names == {
        "feature_mean": (64,), "feature_std": (64,), "aux_feature_mean": (64,), "aux_feature_std": (64,),
        "classifier.weight": (3, 64, 1, 1), "classifier.bias": (3,),
        "aux_classifier.weight": (3, 64, 1, 1), "aux_classifier.bias": (3,),
        "decoder_input.norm.weight": (128,), "decoder_input.norm.bias": (128,),
        "decoder.hidden.weight": (16, 128, 1, 1), "decoder.hidden.bias": (16,),
        "decoder.output.weight": (4, 16, 1, 1), "decoder.output.bias": (4,),
    }  # fmt: skip


def test_saved_and_loaded_again(tmp_path):
    model = build(**FROZEN).eval()
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
    model = build(**FROZEN | {"decoder_channels": 64})
    assert model.decoder.hidden.weight.std().item() == pytest.approx(0.02, rel=0.2)
    for bias in (model.decoder.hidden.bias, model.decoder.output.bias, model.decoder_input.norm.bias):
        assert (bias == 0).all()
    assert (model.decoder_input.norm.weight == 1).all()


def test_heads_learn_and_are_told_apart():
    model = build(**FROZEN).train()
    outputs = model(photos(2, 3, 64, 64), labels=torch.eye(3)[:2])
    (outputs.loss + outputs.logits.square().mean()).backward()
    heads = [name for name, _ in model.named_parameters() if not name.startswith("backbone")]
    assert all(model.get_parameter(name).grad is not None for name in heads)
    assert {id(weight) for weight in model.head_parameters()} == {id(model.get_parameter(name)) for name in heads}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # as in test_modeling_cosa
def test_gradient_checkpointing_changes_nothing():
    model = build(**FROZEN | {"decoder_dropout": 0.0}).train()

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
    model = build(**FROZEN).eval()
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
