"""One pass over scaled and mirrored copies against one for each of them."""

import math

import pytest
import torch
from tiny import save_segformer, tiny_model
from torch.nn import functional as F

from cosa_hf.inference import forward_multiscale, has_cams, load_model

# Name of a fused field, and of what it is made from in one output of the model.
MAPS = {"cam_logits": "cam_logits", "aux_cam_logits": "aux_cam_logits", "seg_logits": "logits"}


def images(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def nearest(length, stride):
    """The multiple of the stride next to a length, at least one, halves upwards as in the model."""
    return max(math.floor(length / stride + 0.5), 1) * stride


@torch.no_grad()
def reference(model, pixel_values, scales, flip, cam_fusion="max"):
    """One pass for each image, scale and mirror image; nothing fused before the end."""
    stride = model.backbone.stride
    height, width = pixel_values.shape[-2:]
    grid = [nearest(side, stride) // stride for side in (height, width)]
    fused = {name: [] for name in ("cls_logits", *MAPS)}
    for image in pixel_values.split(1):
        seen = {name: [] for name in fused}
        for scale in scales:
            size = [nearest(side * scale, stride) for side in (height, width)]
            scaled = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
            for mirrored in (False, True) if flip else (False,):
                outputs = model(scaled.flip(-1) if mirrored else scaled)
                seen["cls_logits"].append(outputs.cls_logits)
                for name, source in MAPS.items():
                    maps = outputs[source].flip(-1) if mirrored else outputs[source]
                    seen[name].append(F.interpolate(maps, size=grid, mode="bilinear", align_corners=False))
        for name, copies in seen.items():
            stacked = torch.stack(copies)
            if "cam" in name and cam_fusion == "sum":
                twins = 2 if flip else 1
                fused[name].append(sum(pair.amax(dim=0).clamp_min(0) for pair in stacked.split(twins)))
            else:
                fused[name].append(stacked.amax(dim=0) if "cam" in name else stacked.mean(dim=0))
    return {name: torch.cat(values) for name, values in fused.items()}


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5, 1.5), (0.5, 1.5, 1.0), (0.75, 1.25)])
@pytest.mark.parametrize("size", [(64, 64), (64, 128), (70, 45), (33, 95), (9, 7)])
def test_equals_one_pass_for_each_copy(model, size, scales, flip):
    pixel_values = images(*size)
    with torch.no_grad():
        fused = forward_multiscale(model, pixel_values, scales, flip)
    for name, expected in reference(model, pixel_values, scales, flip).items():
        torch.testing.assert_close(
            getattr(fused, name), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5, 1.5)])
def test_cams_can_be_summed_over_scales(model, scales, flip):
    """As in the released code: the maximum over flips, of it what is positive, and of that the sum."""
    pixel_values = images(64, 96)
    with torch.no_grad():
        fused = forward_multiscale(model, pixel_values, scales, flip, cam_fusion="sum")
    for name, expected in reference(model, pixel_values, scales, flip, "sum").items():
        torch.testing.assert_close(
            getattr(fused, name), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("size", [(64, 64), (70, 45), (40, 72), (8, 24), (5, 64)])
def test_one_plain_scale_is_the_model_itself(model, size):
    """Also where a side lies halfway between two multiples of the stride."""
    pixel_values = images(*size)
    with torch.no_grad():
        fused, outputs = (
            forward_multiscale(model, pixel_values, scales=(1.0,), flip=False),
            model(pixel_values),
        )
    torch.testing.assert_close(fused.cls_logits, outputs.cls_logits)
    for name, source in MAPS.items():
        torch.testing.assert_close(getattr(fused, name), outputs[source])


@pytest.mark.parametrize("size", [(64, 64), (78, 45), (40, 72), (7, 100)])
def test_the_grid_is_that_of_scale_one_whether_or_not_it_is_among_the_scales(model, size):
    pixel_values = images(*size, batch=1)
    with torch.no_grad():
        grid = model(pixel_values).logits.shape[-2:]
        for scales in ((0.5,), (1.5, 0.5), (0.5, 1.0)):
            fused = forward_multiscale(model, pixel_values, scales)
            for name in MAPS:
                assert getattr(fused, name).shape[-2:] == grid, (name, scales)


@pytest.mark.parametrize("size", [(64, 64), (64, 45)])
def test_a_mirrored_image_gives_mirrored_maps(model, size):
    pixel_values = images(*size)
    with torch.no_grad():
        plain = forward_multiscale(model, pixel_values, (1.0, 0.5, 1.5))
        mirrored = forward_multiscale(model, pixel_values.flip(-1), (1.0, 0.5, 1.5))
        unflipped = forward_multiscale(model, pixel_values.flip(-1), (1.0, 0.5, 1.5), flip=False)
    torch.testing.assert_close(mirrored.cls_logits, plain.cls_logits, rtol=1e-4, atol=1e-4)
    for name in MAPS:
        torch.testing.assert_close(getattr(mirrored, name).flip(-1), getattr(plain, name), rtol=1e-4, atol=1e-4)
        # The network alone has no such symmetry, or this test would say nothing.
        assert not torch.allclose(getattr(unflipped, name).flip(-1), getattr(plain, name), atol=1e-3)


def test_images_of_a_batch_do_not_see_each_other(model):
    pixel_values = images(64, 48, batch=3)
    with torch.no_grad():
        together = forward_multiscale(model, pixel_values)
        alone = forward_multiscale(model, pixel_values[1:2])
    for name in ("cls_logits", *MAPS):
        torch.testing.assert_close(getattr(together, name)[1:2], getattr(alone, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [None, 4])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5)])
def test_what_the_encoder_made_of_scale_one_takes_the_place_of_that_pass(scales, flip, frozen):
    model, pixel_values = tiny_model(affinity="features").eval(), images(64, 48)
    model.backbone.freeze(frozen)
    with torch.no_grad():
        views = [model.backbone.encode(view, affinity=True) for view in (pixel_values, pixel_values.flip(-1))]
        encoded = {name: torch.stack([view[name] for view in views], dim=1) for name in views[0]}
        expected = forward_multiscale(model, pixel_values, scales, flip)
        fused = forward_multiscale(model, pixel_values, scales, flip, encoded=encoded)
        others = {name: maps.flip(0) for name, maps in encoded.items()}
        changed = forward_multiscale(model, pixel_values, scales, flip, encoded=others)
    for name in ("cls_logits", "affinity", *MAPS):
        torch.testing.assert_close(getattr(fused, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed.seg_logits, expected.seg_logits, atol=1e-3)


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -0.5)])
def test_bad_scales_are_refused(model, scales):
    with pytest.raises(ValueError, match="scales"):
        forward_multiscale(model, images(32, 32), scales)


def test_mode_and_gradients_are_left_to_the_caller(model):
    model.train()
    try:
        fused = forward_multiscale(model, images(32, 32), (1.0, 0.5))
        assert model.training
        fused.seg_logits.sum().backward()
        assert model.decoder.conv8.weight.grad is not None
    finally:
        model.zero_grad()
        model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_maps_are_fused_in_full_precision(model, dtype):
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        fused = forward_multiscale(model, images(64, 64))
    for name in ("cls_logits", *MAPS):
        assert getattr(fused, name).dtype == torch.float32


def test_a_network_without_cams_is_fused_on_a_grid_of_its_own(tmp_path):
    model, processor = load_model(str(save_segformer(tmp_path)), "cpu")
    assert processor.size["height"] == 512
    assert not has_cams(model)
    pixel_values = images(64, 96)
    with torch.no_grad():
        one = forward_multiscale(model, pixel_values, (1.0,), flip=False)
        fused = forward_multiscale(model, pixel_values, (1.0, 0.5))
        mirrored = forward_multiscale(model, pixel_values.flip(-1), (1.0, 0.5))
    torch.testing.assert_close(one.seg_logits, model(pixel_values).logits)
    assert fused.seg_logits.shape[-2:] == (16, 24)
    torch.testing.assert_close(fused.seg_logits, mirrored.seg_logits.flip(-1), atol=1e-5, rtol=1e-4)
    assert fused.cls_logits is fused.cam_logits is fused.aux_cam_logits is None


@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((0.5, 1.0), True), ((0.5,), True)])
def test_the_affinity_is_that_of_the_plain_image_at_scale_one(spreading, scales, flip):
    pixel_values = images(64, 96)
    with torch.no_grad():
        fused = forward_multiscale(spreading, pixel_values, scales, flip)
        expected = spreading.backbone(pixel_values, affinity=True)[2]
    torch.testing.assert_close(fused.affinity, expected, rtol=1e-4, atol=1e-5)
