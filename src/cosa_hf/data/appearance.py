"""The photometric operations of the strong view: Table 10, "TransAppearance"."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from cosa_hf.settings import Settings, setting


@dataclass(kw_only=True)
class AppearanceConfig(Settings):
    """The colours that the networks see. The defaults are the paper's (Tab. 10)."""

    _argument_group_name = "Colours (Tab. 10)"

    normalization: Literal["backbone", "imagenet"] = setting(
        "backbone", "mean and deviation of colours: those of the backbone's weights, or ImageNet's (release)"
    )
    enhancement_factors: list[float] = setting(
        [0.05, 0.95],
        "least and greatest factor of the strong view's color, contrast, brightness and sharpness; 1 changes nothing "
        "(release: 0.28 1.72)",
        least=0,
    )
    posterize_bits: list[int] = setting(
        [4, 8], "fewest and most bits that posterize leaves of the strong view (release: 1 4)", least=1, most=8
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("enhancement_factors", "posterize_bits"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise ValueError(f"{name} must be two numbers, the least first, got {bounds}")


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _none(_: AppearanceConfig) -> float:
    return 0.0


def _factor(config: AppearanceConfig) -> float:
    return _uniform(*config.enhancement_factors)


def _threshold(_: AppearanceConfig) -> float:
    return 255 * _uniform(0.0, 1.0)


def _bits(config: AppearanceConfig) -> float:
    low, high = config.posterize_bits
    return torch.randint(low, high + 1, ()).item()


# name -> (draw a strength, apply it). Factors are enhancement factors: 1 would return the image.
_OPERATIONS: dict[str, tuple[Callable[[AppearanceConfig], float], Callable[[Image.Image, float], Image.Image]]] = {
    "identity": (_none, lambda image, _: image),
    "autocontrast": (_none, lambda image, _: F.autocontrast(image)),
    "equalize": (_none, lambda image, _: F.equalize(image)),
    "solarize": (_threshold, F.solarize),
    "color": (_factor, F.adjust_saturation),
    "contrast": (_factor, F.adjust_contrast),
    "brightness": (_factor, F.adjust_brightness),
    "sharpness": (_factor, F.adjust_sharpness),
    "posterize": (_bits, lambda image, bits: F.posterize(image, int(bits))),
}

APPEARANCES = tuple(_OPERATIONS)


def draw_appearance(config: AppearanceConfig) -> tuple[str, float]:
    """One of the nine operations, all equally likely, and its strength (Tab. 10). Uses torch's global RNG.

    The strength is a factor for color, contrast, brightness and sharpness, and a number of bits for posterize, both
    from the config's ranges; a threshold on the 0..255 scale for solarize (the paper's U(0, 1) times 255); 0 (unused)
    otherwise.

    Example:
        >>> name, strength = draw_appearance(AppearanceConfig(enhancement_factors=[0.5, 1.5]))
        >>> name in APPEARANCES
        True
    """
    name = APPEARANCES[int(torch.randint(len(APPEARANCES), ()))]
    return name, _OPERATIONS[name][0](config)


def apply_appearance(image: Image.Image, name: str, strength: float) -> Image.Image:
    """One operation of Tab. 10 on an RGB image.

    Example:
        >>> apply_appearance(Image.new("RGB", (2, 2), (200, 0, 0)), "solarize", 128.0).getpixel((0, 0))
        (55, 0, 0)
    """
    return _OPERATIONS[name][1](image, strength)
