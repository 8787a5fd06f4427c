"""The image processors: every kind of image in, masks of any size out."""

import doctest
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor
from transformers.utils.import_utils import BACKENDS_MAPPING

import cosa_hf.image_processing_cosa
from cosa_hf import CoSAConfig, CoSAImageProcessor, CoSAImageProcessorTorchvision, CoSAOutput
from cosa_hf.image_processing_cosa import to_rgb

SIZE = {"height": 32, "width": 48}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def ramp(mode: str, top: float, dtype) -> Image.Image:
    image = Image.fromarray(np.linspace(0, top, 12).reshape(3, 4).astype(dtype))
    assert image.mode == mode
    return image


def test_pixel_values_are_resized_rescaled_and_normalised():
    grey = Image.new("RGB", (70, 20), (51, 102, 204))
    pixel_values = CoSAImageProcessor(size=SIZE, **HALF)(grey, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 32, 48)
    assert pixel_values.dtype == torch.float32
    expected = torch.tensor([51, 102, 204]) / 255 * 2 - 1
    torch.testing.assert_close(pixel_values[0].mean(dim=(1, 2)), expected)


def test_defaults_are_the_papers_input():
    processor = CoSAImageProcessor()
    assert dict(processor.size) == {"height": 448, "width": 448}
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)


def test_steps_can_be_left_out():
    image = Image.new("RGB", (7, 5), (10, 20, 30))
    processor = CoSAImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    pixel_values = processor(image, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 5, 7)
    assert pixel_values[0, :, 0, 0].tolist() == [10, 20, 30]


def test_a_batch_of_different_images():
    images = [Image.new("RGB", (9, 7)), Image.new("L", (200, 3)), Image.new("RGBA", (1, 1))]
    assert CoSAImageProcessor(size=SIZE)(images, return_tensors="pt").pixel_values.shape == (3, 3, 32, 48)


def test_arrays_and_tensors_are_taken_too():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    processor = CoSAImageProcessor(size=SIZE)
    expected = processor(Image.fromarray(array), return_tensors="pt").pixel_values
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for image in (array, tensor):
        torch.testing.assert_close(processor(image, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize(
    "image",
    [
        ramp("L", 255, np.uint8),
        ramp("I;16", 65535, np.uint16),
        ramp("I", 65535, np.int32),
        ramp("I", 255, np.int32),
        ramp("I", 10**6, np.int32),
        ramp("F", 1, np.float32),
        ramp("F", 255, np.float32),
        ramp("F", 65535, np.float32),
    ],
    ids=lambda image: f"{image.mode}-{np.asarray(image).max():g}",
)
def test_greys_of_every_depth_become_the_same_8_bit_ramp(image):
    rgb = np.asarray(to_rgb(image)).astype(int)
    expected = np.linspace(0, 255, 12).reshape(3, 4)
    assert rgb.shape == (3, 4, 3)
    assert np.abs(rgb - expected[..., None]).max() <= 1


def test_a_dark_16_bit_photo_stays_dark():
    assert to_rgb(Image.new("I;16", (1, 1), 2570)).getpixel((0, 0)) == (10, 10, 10)


def test_floats_without_a_value_are_black():
    values = np.array([[np.nan, np.inf, -np.inf, -3.0, 0.5, 1.0]], dtype=np.float32)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 0, 0, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "PA"])
def test_transparency_is_laid_over_white(mode):
    if mode == "P":
        image = Image.new("P", (2, 2), 0)
        image.info["transparency"] = 0
    elif mode == "RGB":
        image = Image.new("RGB", (2, 2), (1, 2, 3))
        image.info["transparency"] = (1, 2, 3)
    else:
        image = Image.new(mode, (2, 2), (0,) * len(mode))
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_half_transparent_red_over_white():
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_as_pillow_shows_them(mode):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8))
    source = photo.convert(mode)
    rgb = to_rgb(source)
    assert (rgb.mode, rgb.size) == ("RGB", (9, 8))
    assert np.array_equal(np.asarray(rgb), np.asarray(source.convert("RGB")))


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    image.save(tmp_path / "photo.png", exif=exif)
    rgb = to_rgb(Image.open(tmp_path / "photo.png"))
    assert rgb.size == (4, 6)
    assert rgb.getpixel((3, 0)) == (255, 255, 255)


def test_rgb_passes_unchanged():
    array = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(array))), array)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_are_the_argmax_of_upsampled_logits(dtype):
    logits = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    sizes = [(30, 41), (3, 200)]
    masks = CoSAImageProcessor().post_process_semantic_segmentation(CoSAOutput(logits=logits), sizes)
    for mask, image_logits, size in zip(masks, logits, sizes, strict=True):
        upsampled = F.interpolate(image_logits[None].float(), size=size, mode="bilinear")[0]
        assert mask.dtype == torch.int64
        assert torch.equal(mask, upsampled.argmax(dim=0))


def test_masks_without_target_sizes_keep_the_grid():
    logits = torch.randn(2, 3, 4, 6)
    masks = CoSAImageProcessor().post_process_semantic_segmentation(CoSAOutput(logits=logits))
    assert torch.equal(torch.stack(masks), logits.argmax(dim=1))


def test_target_sizes_as_a_tensor():
    outputs = CoSAOutput(logits=torch.randn(2, 3, 4, 6))
    sizes = torch.tensor([[8, 9], [10, 11]])
    masks = CoSAImageProcessor().post_process_semantic_segmentation(outputs, sizes)
    assert [tuple(mask.shape) for mask in masks] == [(8, 9), (10, 11)]


def test_a_missing_target_size_is_an_error():
    outputs = CoSAOutput(logits=torch.randn(2, 3, 4, 6))
    with pytest.raises(ValueError, match="1 target sizes for 2 images"):
        CoSAImageProcessor().post_process_semantic_segmentation(outputs, [(4, 4)])


def test_saved_and_loaded_again(tmp_path):
    processor = CoSAImageProcessor(size=SIZE, resample=Image.Resampling.BICUBIC, **HALF)
    processor.save_pretrained(tmp_path)
    loaded = CoSAImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    assert torch.equal(
        loaded(image, return_tensors="pt").pixel_values, processor(image, return_tensors="pt").pixel_values
    )


@pytest.mark.parametrize("value_range", [[-160, 240], [0.0, 1.02]])
def test_the_range_of_training_is_kept_and_used(tmp_path, value_range):
    low, high = value_range
    CoSAImageProcessor(size=SIZE, value_range=value_range, bands=[4, 3, 2]).save_pretrained(tmp_path)
    loaded = CoSAImageProcessor.from_pretrained(tmp_path)
    assert (loaded.value_range, loaded.bands) == (value_range, [4, 3, 2])
    values = np.linspace(low - 1, high + 1, 32 * 48, dtype=np.float32).reshape(32, 48)
    eight_bits = np.rint((values.astype(float).clip(low, high) - low) / (high - low) * 255).astype(np.uint8)
    expected = loaded(Image.fromarray(eight_bits), return_tensors="pt").pixel_values
    for given in (Image.fromarray(values), np.stack([values] * 3), np.stack([values] * 3, -1)):
        assert torch.equal(loaded(given, return_tensors="pt").pixel_values, expected)


def test_processors_of_before_read_as_before_and_say_that_they_guess(tmp_path, caplog, monkeypatch):
    processor = CoSAImageProcessor(size=SIZE)
    assert {"value_range", "bands"}.isdisjoint(processor.to_dict())
    said = []
    monkeypatch.setattr(cosa_hf.image_processing_cosa.logger, "warning_once", said.append)
    values = np.linspace(0, 1.02, 12, dtype=np.float32).reshape(3, 4)
    assert np.asarray(to_rgb(Image.fromarray(values))).max() == 1, "of 0..255, which holds 1.02"
    assert "give the model's image processor the range of your images (value_range)" in said.pop()
    CoSAImageProcessor(size=SIZE, value_range=[0, 1.02])(Image.fromarray(values))
    assert not said, "as advised"


@pytest.mark.parametrize("value_range", ["window", [5, 5], [3]])
def test_what_is_no_range_is_refused(value_range):
    with pytest.raises(ValueError, match="value_range must be two numbers, low < high, got"):
        CoSAImageProcessor(value_range=value_range)(Image.new("I;16", (2, 2)))


def test_large_images_are_scaled_in_strips(monkeypatch):
    image = ramp("F", 300.0, np.float32)
    whole = np.asarray(to_rgb(image, (10, 250)))
    monkeypatch.setattr(cosa_hf.image_processing_cosa, "STRIP", 4)
    assert np.array_equal(to_rgb(image, (10, 250)), whole)


def photo(width=448, height=298) -> Image.Image:
    with Image.open(files("cosa_hf") / "demo" / "examples" / "cat.jpg") as image:
        return image.resize((width, height))


def deep(mode: str) -> Image.Image:
    values = np.asarray(photo().convert("L"))
    return Image.fromarray({"I;16": values.astype(np.uint16) * 257, "F": values / np.float32(255)}[mode])


def transparent() -> Image.Image:
    image = photo()
    image.putalpha(image.convert("L"))
    return image


def turned(tmp_path) -> Image.Image:
    image = photo()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    return Image.open(tmp_path / "turned.png")


def both(images, **settings):
    """Pixel values by Pillow and by torchvision, in 255ths."""
    settings = {"size": SIZE, "do_normalize": False, "do_rescale": False} | settings
    return [
        processor(images, return_tensors="pt", **settings).pixel_values.float()
        for processor in (CoSAImageProcessor(), CoSAImageProcessorTorchvision())
    ]


@pytest.mark.parametrize("size", [(32, 48), (448, 448), (500, 100), (298, 448)])
@pytest.mark.parametrize("given", [(448, 298), (61, 200), (3, 5)])
def test_torchvision_resizes_as_pillow_does(given, size):
    pillow, torchvision = both(photo(*given), size={"height": size[0], "width": size[1]})
    assert pillow.shape == torchvision.shape == (1, 3, *size)
    assert (pillow - torchvision).abs().max() <= 1


@pytest.mark.parametrize(
    "image",
    [
        *(photo().convert(mode) for mode in ("1", "L", "P", "CMYK", "YCbCr")),
        transparent(), transparent().convert("LA"), deep("I;16"), deep("F"),
    ],
    ids=lambda image: image.mode,
)  # fmt: skip
def test_torchvision_reads_every_mode_as_pillow_does(image):
    pillow, torchvision = both(image)
    assert (pillow - torchvision).abs().max() <= 1


def test_torchvision_follows_exif_and_opens_files_as_pillow_does(tmp_path):
    for image in (turned(tmp_path), str(tmp_path / "turned.png")):
        pillow, torchvision = both(image)
        upright, _ = both(photo().transpose(Image.Transpose.ROTATE_270))
        assert torch.equal(pillow, upright)
        assert (pillow - torchvision).abs().max() <= 1


def test_torchvision_takes_a_batch_of_all_kinds():
    array = np.array(photo())
    images = [photo(), photo(61, 200), transparent(), array, torch.from_numpy(array).permute(2, 0, 1)]
    pillow, torchvision = both(images[:3])
    assert (pillow - torchvision).abs().max() <= 1
    _, same = both(images[3:])
    assert torch.equal(same, torchvision[:1].expand(2, -1, -1, -1))


def test_torchvision_scales_from_the_range_of_training():
    values = np.linspace(-200, 300, 32 * 48, dtype=np.float32).reshape(32, 48)
    settings = {"size": SIZE, "value_range": [-160, 240]}
    for given in (Image.fromarray(values), np.stack([values] * 3)):
        expected, found = (
            processor(**settings)(given, return_tensors="pt").pixel_values
            for processor in (CoSAImageProcessor, CoSAImageProcessorTorchvision)
        )
        torch.testing.assert_close(found, expected)


def test_torchvision_has_the_same_settings_and_masks():
    processors = CoSAImageProcessor(size=SIZE, **HALF), CoSAImageProcessorTorchvision(size=SIZE, **HALF)
    assert processors[0].to_dict() == processors[1].to_dict()
    outputs = CoSAOutput(logits=torch.randn(1, 5, 4, 6, generator=torch.Generator().manual_seed(0)))
    masks = [processor.post_process_semantic_segmentation(outputs, [(30, 41)])[0] for processor in processors]
    assert torch.equal(*masks)


@pytest.mark.parametrize("saved_by", [CoSAImageProcessor, CoSAImageProcessorTorchvision])
def test_pillow_loads_unless_torchvision_is_asked_for(saved_by, tmp_path):
    """Whatever saved it: the files do not differ."""
    CoSAConfig(num_labels=2).save_pretrained(tmp_path)
    processor = saved_by(size=SIZE, value_range=[0, 4095], **HALF)
    processor.save_pretrained(tmp_path)
    for options, expected in (
        ({}, CoSAImageProcessor),
        ({"backend": "pil"}, CoSAImageProcessor),
        ({"backend": "torchvision"}, CoSAImageProcessorTorchvision),
    ):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, **options)
        assert type(loaded) is expected
        assert loaded.to_dict() == processor.to_dict()


def test_without_torchvision_its_processor_says_so(monkeypatch):
    _, message = BACKENDS_MAPPING["torchvision"]
    monkeypatch.setitem(BACKENDS_MAPPING, "torchvision", (lambda: False, message))
    with pytest.raises(ImportError, match="CoSAImageProcessorTorchvision requires the Torchvision library"):
        CoSAImageProcessorTorchvision()
    CoSAImageProcessor()


def test_examples():
    results = doctest.testmod(cosa_hf.image_processing_cosa)
    assert results.attempted
    assert not results.failed
