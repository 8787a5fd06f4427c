"""The colours of class ids: the PASCAL VOC colour map, and masks as images to save and to look at."""

import numpy as np
from PIL import Image

from cosa_hf.data.images import IGNORE_INDEX

__all__ = ["mask_image", "painted", "to_palette_image", "voc_palette"]


def voc_palette(num_colors: int = 256) -> list[tuple[int, int, int]]:
    """RGB colours of the ids 0..num_colors-1 in the PASCAL VOC devkit's colour map.

    The bits of the id are dealt to red, green and blue in turn, most significant colour bit first: 0 is
    black, 255 (ignore) is cream, and neighbouring ids differ strongly.

    Raises:
        ValueError: `num_colors` is not in 1..65536.

    Example:
        >>> voc_palette(3)
        [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    """
    if not 1 <= num_colors <= 65536:
        raise ValueError(f"there are colours for 1 to 65536 ids, got {num_colors}")
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


def mask_image(ids: np.ndarray, num_classes: int) -> Image.Image:
    """A mask to be saved as PNG: a palette image up to 254 classes, beyond that a grey one of 16 bits (`I;16`).

    Args:
        ids: (H, W) integers.
        num_classes: C, whatever this mask shows of them: all masks of a set are alike.

    Raises:
        ValueError: an id does not fit, or `ids` is not two-dimensional.

    Example:
        >>> mask_image(np.array([[0, 1]]), 20).mode, mask_image(np.array([[0, 1]]), 1000).mode
        ('P', 'I;16')
    """
    if num_classes < IGNORE_INDEX:
        return to_palette_image(ids)
    if num_classes >= 65535:
        raise ValueError(f"masks of 16 bits hold 65534 classes, got {num_classes}")
    return Image.fromarray(ids.astype(np.uint16))


def painted(ids: np.ndarray) -> Image.Image:
    """A mask in the VOC colours, as RGB.

    Args:
        ids: (H, W) integers 0..65535.

    Example:
        >>> painted(np.array([[0, 1]])).getpixel((1, 0))
        (128, 0, 0)
    """
    colors = np.array(voc_palette(int(ids.max()) + 1), dtype=np.uint8)
    return Image.fromarray(colors[ids])
