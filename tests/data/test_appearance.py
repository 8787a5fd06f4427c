from collections import Counter

import numpy as np
import pytest
import torch
from images_of import image_of
from PIL import Image, ImageFilter

from cosa_hf.data.appearance import APPEARANCES, AppearanceConfig, apply_appearance, draw_appearance

FACTORS = ("color", "contrast", "brightness", "sharpness")
RANGES = {
    "identity": (0, 0),
    "autocontrast": (0, 0),
    "equalize": (0, 0),
    "solarize": (0, 255),
    "posterize": (4, 8),
} | dict.fromkeys(FACTORS, (0.05, 0.95))


@pytest.mark.parametrize(
    ("factors", "bits"), [(None, None), ([0.28, 1.72], [1, 4]), ([1.0, 1.0], [8, 8])], ids=["paper", "release", "none"]
)
def test_nine_operations_equally_likely_and_strengths_as_configured(factors, bits):
    config = AppearanceConfig(enhancement_factors=factors, posterize_bits=bits) if factors else AppearanceConfig()
    ranges = RANGES | (dict.fromkeys(FACTORS, factors) | {"posterize": bits} if factors else {})
    torch.manual_seed(0)
    draws = [draw_appearance(config) for _ in range(4500)]
    counts = Counter(name for name, _ in draws)
    assert set(counts) == set(ranges) == set(APPEARANCES)
    assert all(abs(count - 500) < 5 * np.sqrt(500) for count in counts.values())
    for name, (low, high) in ranges.items():
        strengths = [strength for drawn, strength in draws if drawn == name]
        assert min(strengths) >= low
        assert max(strengths) <= high
        if low < high:  # the whole range is used
            assert min(strengths) < low + 0.05 * (high - low)
            assert max(strengths) > high - 0.05 * (high - low)
    fewest, most = ranges["posterize"]
    assert {strength for name, strength in draws if name == "posterize"} == set(range(fewest, most + 1))


@pytest.mark.parametrize("name", ["enhancement_factors", "posterize_bits"])
@pytest.mark.parametrize("bounds", [[1], [2, 1], [1, 2, 3]])
def test_a_range_is_two_numbers_in_order(name, bounds):
    with pytest.raises(ValueError, match=f"{name} must be two numbers, the least first"):
        AppearanceConfig(**{name: bounds})


def _reference(pixels: np.ndarray, name: str, strength: float) -> np.ndarray:
    """Table 10 in plain numpy, in floating point."""
    x = pixels.astype(float)
    gray = (x @ [0.299, 0.587, 0.114])[..., None]
    smooth = Image.fromarray(pixels).filter(ImageFilter.SMOOTH)
    low, high = x.min(axis=(0, 1)), x.max(axis=(0, 1))
    return {
        "identity": lambda: x,
        "autocontrast": lambda: (x - low) * 255 / (high - low),
        "solarize": lambda: np.where(x >= strength, 255 - x, x),
        "color": lambda: gray + strength * (x - gray),
        "contrast": lambda: gray.mean() + strength * (x - gray.mean()),
        "brightness": lambda: strength * x,
        "sharpness": lambda: np.asarray(smooth) + strength * (x - np.asarray(smooth)),
        "posterize": lambda: x - x % 2 ** (8 - strength),
    }[name]()


@pytest.mark.parametrize("name", [name for name in APPEARANCES if name != "equalize"])
def test_against_plain_formulas(name):
    pixels = np.asarray(image_of(40, 30)) // 2 + 40
    low, high = RANGES[name]
    strength = round(low + 0.3 * (high - low)) if name == "posterize" else low + 0.3 * (high - low)
    result = np.asarray(apply_appearance(Image.fromarray(pixels), name, strength))
    assert np.abs(result - _reference(pixels, name, strength)).max() <= 1.5


def test_equalize_flattens_the_histogram():
    rng = np.random.default_rng(0)
    dark = (255 * rng.uniform(size=(64, 64, 3)) ** 3).astype(np.uint8)
    result = np.asarray(apply_appearance(Image.fromarray(dark), "equalize", 0.0))
    assert dark.mean() < 70
    assert abs(result.mean() - 127.5) < 8
    order = np.argsort(dark[..., 0].ravel(), kind="stable")
    assert (np.diff(result[..., 0].ravel()[order].astype(int)) >= 0).all(), "brightness order is kept"


@pytest.mark.parametrize("name", APPEARANCES)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2)])
def test_tiny_images(name, size):
    result = apply_appearance(image_of(*size), name, 4)
    assert (result.mode, result.size) == ("RGB", size)
