"""The colours of class ids: the PASCAL VOC colour map and masks saved as palette PNGs."""

import numpy as np
from PIL import Image

__all__ = ["to_palette_image", "voc_palette"]


def voc_palette(num_colors: int = 256) -> list[tuple[int, int, int]]:
    """RGB colours of the ids 0..num_colors-1 in the PASCAL VOC devkit's colour map.

    The bits of the id are dealt to red, green and blue in turn, most significant colour bit first: 0 is
    black, 255 (ignore) is cream, and neighbouring ids differ strongly.

    Raises:
        ValueError: `num_colors` is not in 1..256.

    Example:
        >>> voc_palette(3)
        [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    """
    if not 1 <= num_colors <= 256:
        raise ValueError(f"a palette has 1 to 256 colours, got {num_colors}")
    ids = np.arange(num_colors)
    colors = np.zeros((num_colors, 3), dtype=int)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (ids >> (3 * bit + channel) & 1) << (7 - bit)
    return [(int(red), int(green), int(blue)) for red, green, blue in colors]


def to_palette_image(ids: np.ndarray) -> Image.Image:
    """A mask as a mode P image that stores the ids themselves and shows the VOC colours.

    Args:
        ids: (H, W) integers 0..255.

    Raises:
        ValueError: an id is outside 0..255, or `ids` is not two-dimensional.

    Example:
        >>> image = to_palette_image(np.array([[0, 1], [2, 255]]))
        >>> image.mode, image.getpixel((1, 0)), image.convert("RGB").getpixel((1, 0))
        ('P', 1, (128, 0, 0))
    """
    if ids.ndim != 2:
        raise ValueError(f"a mask is (H, W), got shape {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() > 255):
        raise ValueError(f"palette images hold ids 0..255, got {ids.min()}..{ids.max()}")
    image = Image.fromarray(ids.astype(np.uint8))  # mode L; the palette turns it into P and keeps the ids
    image.putpalette([value for color in voc_palette() for value in color])
    return image
