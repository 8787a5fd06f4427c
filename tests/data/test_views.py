import numpy as np
import pytest
import torch
from images_of import image_of
from PIL import Image, ImageFilter

from cosa_hf.data import views as views_module
from cosa_hf.data.appearance import AppearanceConfig, apply_appearance
from cosa_hf.data.views import Views
from cosa_hf.image_processing_cosa import to_rgb

HALF = (0.5, 0.5, 0.5)


def _draw(views: Views, seed: int, image: Image.Image, mask: Image.Image | None = None):
    torch.manual_seed(seed)
    return views(image, mask)


def _pixels(view: torch.Tensor, valid: torch.Tensor) -> np.ndarray:
    """Undo Views(mean .5, std .5) inside the valid rectangle."""
    rows, columns = valid.any(1), valid.any(0)
    return ((view[:, rows][:, :, columns] + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)


@pytest.fixture
def fixed_appearance(monkeypatch):
    def fix(name: str, strength: float = 0.0):
        monkeypatch.setattr(views_module, "draw_appearance", lambda _: (name, strength))

    return fix


@pytest.fixture
def no_blur(monkeypatch):
    monkeypatch.setattr(views_module, "BLUR_PROBABILITY", 0.0)


def _ramp(width: int, height: int) -> np.ndarray:
    """Red tells the column, green the row."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)


def test_shapes_types_and_normalisation(no_blur, fixed_appearance):
    fixed_appearance("identity")
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    views = Views(32, mean, std, scale_range=(2.0, 2.0))
    item = _draw(views, 0, Image.new("RGB", (40, 40), (255, 51, 0)), Image.new("L", (40, 40), 3))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == {
        "weak": (torch.float32, (3, 32, 32)),
        "strong": (torch.float32, (3, 32, 32)),
        "valid": (torch.bool, (32, 32)),
        "mask": (torch.int64, (32, 32)),
    }
    assert item["valid"].all()
    assert (item["mask"] == 3).all()
    expected = (torch.tensor([1.0, 0.2, 0.0]) - torch.tensor(mean)) / torch.tensor(std)
    assert torch.allclose(item["weak"].amax((1, 2)), expected, atol=1e-6)
    assert torch.allclose(item["weak"].amin((1, 2)), expected, atol=1e-6)


def test_identity_leaves_the_strong_view_equal_to_the_weak(fixed_appearance):
    fixed_appearance("identity")
    for seed in range(20):
        item = _draw(Views(48, HALF, HALF), seed, image_of(50, 30))
        assert torch.equal(item["weak"], item["strong"])


def test_strong_is_weak_plus_exactly_one_operation(monkeypatch):
    drawn, original = [], views_module.draw_appearance
    monkeypatch.setattr(views_module, "draw_appearance", lambda config: drawn.append(original(config)) or drawn[-1])
    for seed in range(60):
        drawn.clear()
        item = _draw(Views(48, HALF, HALF), seed, image_of(40, 30))
        assert len(drawn) == 1
        weak, strong = (_pixels(item[name], item["valid"]) for name in ("weak", "strong"))
        assert np.array_equal(strong, apply_appearance(Image.fromarray(weak), *drawn[0])), drawn


def test_the_strong_view_is_as_strong_as_asked_for(monkeypatch):
    drawn, original = [], views_module.draw_appearance
    monkeypatch.setattr(views_module, "draw_appearance", lambda config: drawn.append(original(config)) or drawn[-1])
    views = Views(48, HALF, HALF, appearance=AppearanceConfig(enhancement_factors=[1, 1], posterize_bits=[8, 8]))
    for seed in range(60):
        item = _draw(views, seed, image_of(40, 30))
        if drawn[-1][1] in (1, 8):
            assert torch.equal(item["strong"], item["weak"]), drawn[-1]
    assert {"color", "contrast", "brightness", "sharpness", "posterize"} <= {name for name, _ in drawn}


def test_valid_marks_exactly_the_image():
    """A white image is 1 after normalisation and padding is 0, so the padding shows."""
    for seed in range(60):
        torch.manual_seed(seed)
        item = Views(64, HALF, HALF)(Image.new("RGB", (50, 36), "white"))
        assert torch.equal(item["valid"], item["weak"][0] > 0.999)
        assert torch.equal(~item["valid"], item["weak"].abs().sum(0) == 0)
        assert torch.equal(~item["valid"], item["strong"].abs().sum(0) == 0)
        height, width = int(item["valid"].any(1).sum()), int(item["valid"].any(0).sum())
        assert item["valid"].sum() == height * width, "one rectangle"
        torch.manual_seed(seed)
        scale = 0.5 + 1.5 * torch.rand(()).item()
        assert (width, height) == (min(64, round(50 * scale)), min(64, round(36 * scale)))


def test_crop_equals_resizing_the_whole_image(no_blur, fixed_appearance):
    """Slow reference: resize everything, then look for the crop in it."""
    fixed_appearance("identity")
    image = Image.fromarray(_ramp(120, 90)).convert("RGB")
    noisy = image_of(120, 90)
    for seed in range(20):
        torch.manual_seed(seed)
        scale = 0.5 + 1.5 * torch.rand(()).item()
        size = (round(120 * scale), round(90 * scale))
        torch.manual_seed(seed)
        geometry = Views(64, HALF, HALF).draw_geometry(image.size)
        left, upper = (round(geometry.box[axis] * size[axis] / image.size[axis]) for axis in (0, 1))
        box = (left, upper, left + geometry.size[0], upper + geometry.size[1])
        for source in (image, noisy):
            reference = source.resize(size, Image.Resampling.BILINEAR).crop(box)
            if geometry.flip:
                reference = reference.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            item = _draw(Views(64, HALF, HALF), seed, source)
            difference = _pixels(item["weak"], item["valid"]).astype(int) - np.asarray(reference)
            # Ties round differently, once per pass (columns, rows).
            assert np.abs(difference).max() <= 2
            assert np.abs(difference).mean() < 0.2


def test_scale_flip_and_position_are_spread_as_documented(no_blur, fixed_appearance):
    fixed_appearance("identity")
    views = Views(100, HALF, HALF)
    image = Image.fromarray(_ramp(40, 40))
    scales, flips, lefts, uppers = [], [], [], []
    for seed in range(400):
        item = _draw(views, seed, image)
        pixels = _pixels(item["weak"], item["valid"])
        spare = 100 - pixels.shape[0]
        scales.append(pixels.shape[0] / 40)
        flips.append(pixels[0, 0, 0] > pixels[0, -1, 0])
        lefts.append(int(item["valid"].any(0).int().argmax()) / spare)
        uppers.append(int(item["valid"].any(1).int().argmax()) / spare)
    assert 0.5 <= min(scales) < 0.55
    assert 1.95 < max(scales) <= 2
    assert abs(np.mean(scales) - 1.25) < 0.07
    assert abs(np.mean(flips) - 0.5) < 0.1
    for place in (lefts, uppers):
        assert min(place) < 0.03
        assert max(place) > 0.97
        assert abs(np.mean(place) - 0.5) < 0.06
    assert abs(np.corrcoef(lefts, uppers)[0, 1]) < 0.2


def test_crop_reaches_every_part_of_a_large_image(no_blur, fixed_appearance):
    fixed_appearance("identity")
    views = Views(50, HALF, HALF, scale_range=(1.0, 1.0))
    seen = np.zeros((80, 80), dtype=bool)
    for seed in range(200):
        item = _draw(views, seed, Image.fromarray(_ramp(80, 80)))
        assert item["valid"].all()
        pixels = _pixels(item["weak"], item["valid"])
        seen[pixels[..., 1], pixels[..., 0]] = True
    assert seen.any(axis=0).all()
    assert seen.any(axis=1).all()
    assert seen.mean() > 0.95


def test_blur_is_shared_and_happens_half_of_the_time(fixed_appearance):
    fixed_appearance("identity")
    image = image_of(224, 224)
    sharp = np.asarray(image)
    blurred = []
    for seed in range(100):
        item = _draw(Views(224, HALF, HALF, scale_range=(1.0, 1.0)), seed, image)
        pixels = _pixels(item["weak"], item["valid"])
        unflipped = np.array_equal(pixels, sharp) or np.array_equal(pixels, sharp[:, ::-1])
        blurred.append(not unflipped)
        assert pixels.std() <= sharp.std() + 1e-9
    # sigma close to .1 rounds back to the very image: a little less than half is seen
    assert 0.33 < np.mean(blurred) < 0.6


@pytest.mark.parametrize(("crop_size", "sigma"), [(448, 2.0), (112, 0.5)])
def test_blur_scales_with_the_crop(fixed_appearance, monkeypatch, crop_size, sigma):
    fixed_appearance("identity")
    monkeypatch.setattr(views_module, "BLUR_PROBABILITY", 1.0)
    monkeypatch.setattr(views_module, "BLUR_SIGMA", (2.0, 2.0))
    image = image_of(crop_size, crop_size)
    item = _draw(Views(crop_size, HALF, HALF, scale_range=(1.0, 1.0)), 0, image)
    seen = _pixels(item["weak"], item["valid"])
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)))
    assert np.array_equal(seen, blurred) or np.array_equal(seen, blurred[:, ::-1])


def test_photometry_does_not_see_the_padding(no_blur, fixed_appearance):
    """Were the padding part of the histogram, the image's darkest pixel would not become black."""
    fixed_appearance("autocontrast")
    image = Image.fromarray((100 + np.arange(32 * 32 * 3) % 50).reshape(32, 32, 3).astype(np.uint8))
    item = _draw(Views(64, HALF, HALF, scale_range=(1.0, 1.0)), 0, image)
    assert not item["valid"].all()
    inside = item["strong"][:, item["valid"]]
    assert torch.allclose(inside.amin(1), torch.tensor(-1.0))
    assert torch.allclose(inside.amax(1), torch.tensor(1.0))


@pytest.mark.parametrize("axis", ["column", "row"])
def test_mask_goes_where_the_image_goes(fixed_appearance, axis):
    """The mask repeats the image's red (column) or green (row) value; afterwards they must still agree."""
    fixed_appearance("identity")
    channel = 0 if axis == "column" else 1
    ramp = _ramp(200, 150)
    compared = 0
    for seed in range(30):
        item = _draw(Views(96, HALF, HALF), seed, Image.fromarray(ramp), Image.fromarray(ramp[..., channel].copy()))
        assert torch.equal(item["mask"] == 255, ~item["valid"])
        rows, columns = item["valid"].any(1), item["valid"].any(0)
        mask = item["mask"][rows][:, columns].numpy()[8:-8, 8:-8]  # blur bends the ramp at the border
        pixels = _pixels(item["weak"], item["valid"])[8:-8, 8:-8, channel].astype(int)
        assert np.abs(mask - pixels).max() <= 2
        assert np.abs((mask - pixels).mean()) < 0.6, "no systematic shift"
        compared += mask.size
    assert compared > 100_000


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (1, 300), (2000, 3)])
def test_tiny_and_thin_images(size):
    for seed in range(30):
        item = _draw(Views(32, HALF, HALF), seed, image_of(*size), Image.new("L", size, 1))
        assert item["valid"].any()
        assert torch.isfinite(item["weak"]).all()
        assert torch.isfinite(item["strong"]).all()
        assert (item["mask"][item["valid"]] == 1).all()


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="crop_size"):
        Views(0, HALF, HALF)
    with pytest.raises(ValueError, match="mean and std"):
        Views(8, HALF, (0.5, 0.0, 0.5))
    with pytest.raises(ValueError, match="mean and std"):
        Views(8, (0.5,), (0.5,))
    with pytest.raises(ValueError, match="scale_range"):
        Views(8, HALF, HALF, scale_range=(2.0, 0.5))
    with pytest.raises(ValueError, match="mode 'L': convert it with to_rgb first"):
        Views(8, HALF, HALF)(Image.new("L", (8, 8)))
    Views(8, HALF, HALF)(to_rgb(Image.new("L", (8, 8))))
    with pytest.raises(ValueError, match=r"mask is \(8, 7\)"):
        Views(8, HALF, HALF)(Image.new("RGB", (8, 8)), Image.new("L", (8, 7)))


def test_confidence_takes_the_geometry_of_its_mask():
    ids = np.arange(40 * 30, dtype=np.uint32).reshape(30, 40) % 251
    twin = Image.fromarray(ids.astype(np.uint8))
    torch.manual_seed(0)
    item = Views(64, (0.5,) * 3, (0.5,) * 3)(Image.new("RGB", (40, 30)), twin, twin)
    inside = item["valid"]
    torch.testing.assert_close(item["confidence"][inside] * 255, item["mask"][inside].float())
    assert not item["confidence"][~inside].any()
    assert item["confidence"].shape == (64, 64)
