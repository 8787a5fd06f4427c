"""Images for the tests of this directory."""

import numpy as np
from PIL import Image


def image_of(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A different value in every place, so that nothing is equal by accident."""
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
