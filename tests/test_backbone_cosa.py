"""Encoders of several families at tiny sizes: their maps, and a part that is frozen."""

import copy

import numpy as np
import pytest
import reference
import torch
from tiny import BACKBONES, FAMILIES, array, photos, scramble_batch_norm, tiny_config, tiny_model
from torch import nn

from cosa_hf import CoSAForWeaklySupervisedSegmentation
from cosa_hf.backbone_cosa import CoSABackbone


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


def test_position_embedding_is_frozen_in_memory_and_after_loading(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for each in (model, CoSAForWeaklySupervisedSegmentation.from_pretrained(tmp_path)):
        frozen = [name for name, weight in each.named_parameters() if not weight.requires_grad]
        assert frozen == ["backbone.model.pos_embed"]


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


# Plain ViTs: with a class token, with a register and layer scale, with other norms in their blocks and none at the end
VITS = ["test_vit", "test_vit3", "test_vit4"]


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


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("attention", ["value", "value-value"])
def test_dense_maps_equal_reference(name, attention):
    backbone = scrambled(CoSABackbone(tiny_config(name, attention=attention)))
    images = photos(2, 3, 48, 64)
    with torch.no_grad():
        features, _ = backbone(images)
    for image, tokens in enumerate(inputs_of(backbone, images)[-1]):
        expected = dense_reference(backbone, array(tokens), attention).T.reshape(-1, 3, 4)
        np.testing.assert_allclose(features[image].numpy(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", VITS)
def test_mean_attention_equals_reference(name):
    images, blocks = photos(2, 3, 48, 64), [-5, -2]
    backbone = scrambled(CoSABackbone(tiny_config(name, affinity="attention", affinity_blocks=blocks)))
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
    backbone = CoSABackbone(tiny_config(affinity="attention", affinity_blocks=[-1])).to(torch.bfloat16)
    assert backbone(photos(1, 3, 32, 32).bfloat16(), affinity=True)[2].dtype == torch.float32


def test_a_middle_layer_is_its_blocks_output_and_later_blocks_are_left_out():
    whole = scrambled(CoSABackbone(tiny_config(aux_layer=-5)))
    backbone = CoSABackbone(tiny_config(feature_layer=-3, aux_layer=-5, affinity="features", affinity_layer=-4)).eval()
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
    one = scrambled(CoSABackbone(tiny_config(feature_layer=-3, aux_layer=-1, aux_attention="value-value")))
    other = CoSABackbone(tiny_config(feature_layer=-1, attention="value-value", aux_layer=-3)).eval()
    other.load_state_dict(one.state_dict())
    images = photos(1, 3, 64, 64)
    with torch.no_grad():
        for left, right in zip(one(images), reversed(other(images)), strict=True):
            assert torch.equal(left, right)


def test_both_maps_of_the_last_block():
    both = CoSABackbone(tiny_config(aux_layer=-1, aux_attention="value")).eval()
    standard = CoSABackbone(tiny_config()).eval()
    standard.load_state_dict(both.state_dict())
    images = photos(1, 3, 64, 64)
    features, aux_features = both(images)
    assert torch.equal(features, standard(images)[0])
    assert not torch.allclose(features, aux_features)


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_an_earlier_stage_of_a_pyramid_is_on_its_own_grid(name):
    backbone = CoSABackbone(tiny_config(name, feature_layer=-2, aux_layer=-1, output_stride=32)).eval()
    deeper = CoSABackbone(tiny_config(name, aux_layer=-2, output_stride=32)).eval()
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
        CoSABackbone(tiny_config(**{"aux_layer": -2} | settings))


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
    backbone = scrambled(CoSABackbone(tiny_config(name, **{"aux_layer": -2} | settings)))
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
    backbone = CoSABackbone(tiny_config(name, aux_layer=-2, affinity="features", affinity_layer=-2)).eval()
    backbone.freeze()
    images = photos(1, 3, 64, 64)
    encoded = backbone.encode(images, affinity=True)
    assert list(encoded) == ["features", "aux_features", "affinity"]
    for found, each in zip(backbone.complete(encoded, affinity=True), backbone(images, affinity=True), strict=True):
        assert torch.equal(found, each)


def test_what_comes_before_the_blocks_is_frozen_whatever_timm_counts_it_to(monkeypatch):
    from timm.models.vision_transformer import VisionTransformer

    earlier = {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}
    monkeypatch.setattr(VisionTransformer, "group_matcher", lambda self, coarse=False: earlier)
    backbone = CoSABackbone(tiny_config("test_vit3"))
    backbone.freeze(2)
    assert not backbone.model.reg_token.requires_grad
    assert backbone.model.norm.weight.requires_grad
