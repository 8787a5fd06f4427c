"""Reading one image, or one mask, of a dataset example, with errors that name the file."""

from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError

from cosa_hf.image_processing_cosa import to_rgb

T = TypeVar("T", Dataset, IterableDataset)

IGNORE_INDEX = 255
"""The id of mask pixels that no loss and no metric counts, where masks have 8 bits."""
WIDE_IGNORE_INDEX = 65535
"""The same where they have 16."""


class UnreadableImageError(ValueError):
    """An image or mask that cannot be used as it is; the message names it and says why."""


def undecoded(dataset: T) -> T:
    """The same dataset with its image columns left as files, for `read_image` and `read_mask` to decode.

    Left to itself, a `datasets.Dataset` decodes a row as soon as it is indexed, and what it raises for a
    broken file does not say which row it was.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> undecoded(load_shapes("train", num_images=1))[0]["image"]["path"]
        'train-00000.png'
    """
    dataset = dataset.with_format(None)
    for column in ("image", "mask", "confidence"):
        if column in dataset.column_names:
            dataset = dataset.cast_column(column, ImageFeature(decode=False))
    return dataset


def read_image(example: dict[str, Any]) -> Image.Image:
    """The image of an example, as RGB, upright.

    Args:
        example: a row of an `undecoded` dataset (of a decoded one, only the conversion is left to do).

    Raises:
        UnreadableImageError: the file is truncated, corrupt, empty or gone; names the image.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> read_image(undecoded(load_shapes("train", num_images=1))[0]).size
        (96, 96)
    """
    image = _decode(example, "image")
    try:
        return to_rgb(image)
    except Exception as error:  # EXIF can be as broken as pixels
        raise _unreadable(example, "image", error) from error


def ignored_id(num_classes: int) -> int:
    """The id of mask pixels that no loss and no metric counts: 255, and 65535 where 8 bits do not hold all classes.

    Example:
        >>> ignored_id(254), ignored_id(255)
        (255, 65535)
    """
    return IGNORE_INDEX if num_classes < IGNORE_INDEX else WIDE_IGNORE_INDEX


def read_mask(
    example: dict[str, Any], image_size: tuple[int, int], num_classes: int, ignore_index: int | None = None
) -> Image.Image:
    """The mask of an example as class ids, in a mode "L" image up to 254 classes and a mode "I" image beyond.

    Ids: 0 background, 1..C classes, `ignore_index` ignore. Palette files give their indices; the
    palette's colours mean nothing.

    Args:
        example: a row of an `undecoded` dataset with a `mask` column.
        image_size: (width, height) of the image as `read_image` returns it, after any EXIF rotation.
        num_classes: C, foreground classes.
        ignore_index: default: `ignored_id` of the classes.

    Raises:
        UnreadableImageError: as `mask_ids`, or the mask has another size than the image; names the image.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> example = undecoded(load_shapes("train", num_images=1, masks=True))[0]
        >>> mask = read_mask(example, image_size=(96, 96), num_classes=8)
        >>> mask.mode, mask.size
        ('L', (96, 96))
    """
    ids = mask_ids(example, num_classes, ignore_index)
    if ids.shape != image_size[::-1]:
        raise UnreadableImageError(
            f"mask of image {example['image_id']!r} is {ids.shape[1]}x{ids.shape[0]} (width x height), "
            f"its image is {image_size[0]}x{image_size[1]}"
        )
    return Image.fromarray(ids)


def mask_ids(example: dict[str, Any], num_classes: int, ignore_index: int | None = None) -> np.ndarray:
    """The class ids of `read_mask` without a look at the image, (H, W), uint8 or int32.

    Raises:
        UnreadableImageError: the file cannot be read, is not a single-channel image of integers, or holds ids outside
            0..C and `ignore_index`; names the image.
    """
    ids = raw_mask(example)
    ignored = ignored_id(num_classes) if ignore_index is None else ignore_index
    eight_bits = ids.dtype == np.uint8
    if not eight_bits:
        ids = np.where(ids == WIDE_IGNORE_INDEX, ignored, ids)
    present = np.unique(ids)
    unknown = [int(i) for i in present if not 0 <= i <= num_classes and i != ignored]
    if unknown:
        raise UnreadableImageError(
            f"mask of image {example['image_id']!r} holds the ids {unknown[:8]}: "
            f"expected 0 (background), 1..{num_classes} (classes) or {ignored} (ignore). If they stand for classes, "
            f"say which: --mask_values 0=background {unknown[0]}=CLASS"
        )
    if eight_bits and num_classes >= IGNORE_INDEX and IGNORE_INDEX in present:
        raise UnreadableImageError(
            f"mask of image {example['image_id']!r} holds {IGNORE_INDEX} in 8 bits, which of {num_classes} classes is "
            f"one, and elsewhere means ignore: save it in 16 bits, where {WIDE_IGNORE_INDEX} means ignore"
        )
    return ids.astype(np.uint8 if max(num_classes, ignored) <= IGNORE_INDEX else np.int32)


def raw_mask(example: dict[str, Any]) -> np.ndarray:
    """The values of a mask as its file has them, (H, W), uint8 or, of a file with more bits, int32.

    Raises:
        UnreadableImageError: the file cannot be read, or is not a single-channel image of integers; names the image.
    """
    mask = _decode(example, "mask")
    eight_bits = mask.mode in ("L", "P")
    if not eight_bits and mask.mode != "I" and not mask.mode.startswith("I;16"):
        raise UnreadableImageError(
            f"mask of image {example['image_id']!r} has mode {mask.mode!r}: "
            "expected class ids in a grayscale or palette PNG of 8 bits, or a grayscale one of 16"
        )
    return np.asarray(mask, dtype=np.uint8 if eight_bits else np.int32)


def read_confidence(example: dict[str, Any], image_size: tuple[int, int]) -> Image.Image:
    """How sure an exported mask is of each pixel, as a mode "L" image, 255 for certain.

    Args:
        example: a row of an `undecoded` dataset with a `confidence` column, as exports in parquet have one.
        image_size: (width, height) of the image as `read_image` returns it.

    Raises:
        UnreadableImageError: the file cannot be read, is not a grey image or has another size; names the image.
    """
    confidence = _decode(example, "confidence")
    if confidence.mode != "L" or confidence.size != image_size:
        raise UnreadableImageError(
            f"confidence of image {example['image_id']!r} has mode {confidence.mode!r} and size {confidence.size}: "
            f"expected a grey image of {image_size}"
        )
    return confidence


def _decode(example: dict[str, Any], column: str) -> Image.Image:
    value = example[column]
    if isinstance(value, Image.Image):
        return value
    try:
        if value is None:
            raise ValueError("the row is empty")
        return ImageFeature().decode_example(value)
    except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, zlib and struct errors
        raise _unreadable(example, column, error) from error


def _unreadable(example: dict[str, Any], column: str, error: Exception) -> UnreadableImageError:
    value = example[column]
    where = (value.get("path") if isinstance(value, dict) else None) or "bytes in the dataset"
    # Pillow's own words for it hold a memory address, different every time.
    reason = "no image, or of an unknown format" if isinstance(error, UnidentifiedImageError) else error
    return UnreadableImageError(
        f"cannot read the {column} of image {example['image_id']!r} ({where}): {reason}; "
        "replace the file, or take the image off the split's list"
    )
