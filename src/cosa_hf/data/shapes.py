"""The embedded demo set: textured objects on textured grounds, generated from a seed.

Eight classes, each with a shape, a texture and a typical colour of its own, stand on muted, textured grounds. Two of
them, boat and train, always come with the same surroundings, water and rails, which are background in the masks and
appear nowhere else: the coexistence problem in miniature (paper, Sec. 3.4 and Fig. 8).
"""

import io
import zlib

import numpy as np
from datasets import Dataset
from PIL import Image

from cosa_hf.data.shape_scenes import SHAPES_CLASSES, SHAPES_COEXISTENCE, draw_scene
from cosa_hf.data.tags import tag_features

SHAPES_SPLITS = {"train": 2000, "val": 200, "test": 200}


def load_shapes(
    split: str, num_images: int | None = None, image_size: int = 96, seed: int = 0, masks: bool = False
) -> Dataset:
    """Generate a split of the demo set, in memory.

    Image i of a split depends on (seed, split, i) alone: splits are independent, and a larger `num_images`
    begins with the same images. `image_size` renders the same scenes at another resolution.

    Args:
        split: "train" (2000 images), "val" (200) or "test" (200).
        num_images: another number of images.
        image_size: side in pixels, at least 16.
        seed: non-negative.
        masks: add the column `mask` (0 background, 1..8 classes, nothing ignored); drawn only if asked for.

    Returns:
        Dataset with `image` (PNG), `labels` (1 to 3 ids into `SHAPES_CLASSES`, sorted), `image_id` and, if
        asked for, `mask`.

    Raises:
        ValueError: unknown split, or a number out of range.

    Example:
        >>> dataset = load_shapes("train", num_images=2)
        >>> dataset[0]["image"].size, dataset[0]["image_id"]
        ((96, 96), 'train-00000')
    """
    if split not in SHAPES_SPLITS:
        raise ValueError(f"unknown split {split!r} of the shapes; known: {', '.join(SHAPES_SPLITS)}")
    count = SHAPES_SPLITS[split] if num_images is None else num_images
    if count < 1 or image_size < 16 or seed < 0:
        raise ValueError(
            "need num_images >= 1, image_size >= 16 and seed >= 0; "
            f"got num_images={count}, image_size={image_size}, seed={seed}"
        )
    columns: dict[str, list] = {"image": [], "labels": [], "image_id": []}
    if masks:
        columns["mask"] = []
    for index in range(count):
        image_id = f"{split}-{index:05d}"
        scene = draw_scene(np.random.default_rng([seed, zlib.crc32(split.encode()), index]))
        columns["image"].append(_png(scene.render(image_size), f"{image_id}.png"))
        columns["labels"].append(scene.class_ids)
        columns["image_id"].append(image_id)
        if masks:
            columns["mask"].append(_png(scene.render_mask(image_size), f"{image_id}_mask.png"))
    return Dataset.from_dict(columns, features=tag_features(list(SHAPES_CLASSES), masks))


def _png(image: Image.Image, path: str) -> dict[str, bytes | str]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": path}


__all__ = ["SHAPES_CLASSES", "SHAPES_COEXISTENCE", "SHAPES_SPLITS", "load_shapes"]
