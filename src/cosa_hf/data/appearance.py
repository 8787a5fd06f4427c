"""The photometric operations of the strong view: Table 10, "TransAppearance"."""

from collections.abc import Callable

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _none() -> float:
    return 0.0


def _factor() -> float:
    return _uniform(0.05, 0.95)


def _threshold() -> float:
    return 255 * _uniform(0.0, 1.0)


def _bits() -> float:
    return torch.randint(4, 9, ()).item()


# name -> (draw a strength, apply it). Factors are enhancement factors: 1 would return the image.
_OPERATIONS: dict[str, tuple[Callable[[], float], Callable[[Image.Image, float], Image.Image]]] = {
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


def draw_appearance() -> tuple[str, float]:
    """One of the nine operations, all equally likely, and its strength (Tab. 10). Uses torch's global RNG.

    The strength is a factor in U(.05, .95) for color, contrast, brightness and sharpness, a threshold on the
    0..255 scale for solarize (the paper's U(0, 1) times 255), 4..8 bits for posterize, and 0 (unused)
    otherwise.

    Example:
        >>> name, strength = draw_appearance()
        >>> name in APPEARANCES
        True
    """
    name = APPEARANCES[int(torch.randint(len(APPEARANCES), ()))]
    return name, _OPERATIONS[name][0]()


def apply_appearance(image: Image.Image, name: str, strength: float) -> Image.Image:
    """One operation of Tab. 10 on an RGB image.

    Example:
        >>> apply_appearance(Image.new("RGB", (2, 2), (200, 0, 0)), "solarize", 128.0).getpixel((0, 0))
        (55, 0, 0)
    """
    return _OPERATIONS[name][1](image, strength)
