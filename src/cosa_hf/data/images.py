"""Reading one image, or one mask, of a dataset example, with errors that name the file."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from datasets.utils.file_utils import is_local_path, xopen
from PIL import Image, UnidentifiedImageError

from cosa_hf.data.formats import Look, Picture, Reading, ReadingError, open_picture

logger = logging.getLogger(__name__)

T = TypeVar("T", Dataset, IterableDataset)

PHOTOS = Reading()
"""How photos are read: no range, the bands that they have."""

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


def from_all_over(count: int, most: int) -> list[int]:
    """Which of `count` images to look at, at most `most`, from beginning to end: tables are often sorted by class.

    Example:
        >>> from_all_over(3, most=4), from_all_over(10, most=4)
        ([0, 1, 2], [0, 2, 5, 7])
    """
    return list(range(count)) if count <= most else [place * count // most for place in range(most)]


def read_image(example: dict[str, Any], reading: Reading = PHOTOS) -> Image.Image:
    """The image of an example, as RGB, upright.

    Args:
        example: a row of an `undecoded` dataset (of a decoded one, only the conversion is left to do).
        reading: what values and bands become colours.

    Raises:
        UnreadableImageError: the file is truncated, corrupt, empty or gone, is of a format whose library is not
            installed, or does not fit `reading`; names the image.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> read_image(undecoded(load_shapes("train", num_images=1))[0]).size
        (96, 96)
    """
    with opened(example, reading.bands, reading.lossless) as picture:
        return picture.rgb(reading)


def open_image(source: str | Path | Image.Image, reading: Reading = PHOTOS) -> Image.Image:
    """An image from a file of its own, as RGB, upright; of several pages or frames the first, with a warning.

    Args:
        source: path; of an image that was opened already, which has the bands it has, only the conversion is left.
        reading: what values and bands become colours.

    Raises:
        UnreadableImageError: as `read_image`; names the file.

    Example:
        >>> Image.new("L", (4, 3)).save("photo.png")
        >>> open_image("photo.png").mode
        'RGB'
    """
    try:
        if isinstance(source, Image.Image):
            return Picture(source).rgb(Reading(reading.value_range))
        with open_picture(source, reading.bands, reading.lossless) as picture:
            if picture.several:
                logger.warning("%s has several pages or frames: the first is taken", source)
            return picture.rgb(reading)
    except Exception as error:  # as below
        raise UnreadableImageError(f"cannot read {source}: {error}") from error


def upright_size(example: dict[str, Any]) -> tuple[int, int]:
    """(width, height) of the image of an example, which is decoded, or a broken one would pass.

    Raises:
        UnreadableImageError: as `read_image`.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> upright_size(undecoded(load_shapes("train", num_images=1))[0])
        (96, 96)
    """
    with opened(example, None, lossless=False) as picture:
        return picture.size


def look_at(example: dict[str, Any], bands: tuple[int, ...] | None) -> Look:
    """What the values of the image of an example are like, before any range is known.

    Args:
        example: a row of an `undecoded` dataset.
        bands: of the file that are looked at.

    Raises:
        UnreadableImageError: as `read_image`.

    Example:
        >>> look_at({"image_id": "a", "image": Image.new("I;16", (2, 2), 900)}, bands=None).high
        900.0
    """
    with opened(example, bands, lossless=True) as picture:
        return picture.look(bands)


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


@contextmanager
def opened(example: dict[str, Any], bands: tuple[int, ...] | None, lossless: bool) -> Iterator[Picture]:
    """`open_picture` of an example.

    Raises:
        UnreadableImageError: as `read_image`, also for what goes wrong with the picture while it is open.
    """
    value = example["image"]
    try:
        if isinstance(value, Image.Image):
            yield Picture(value)
            return
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ValueError("the row is empty")
        source = value["path"] if value["bytes"] is None else value["bytes"]
        if isinstance(source, str) and not is_local_path(source):
            with xopen(source, "rb") as file:
                source = file.read()
        with open_picture(source, bands, lossless) as picture:
            yield picture
    except Exception as error:  # also of who decodes: EXIF can be as broken as pixels
        raise _unreadable(example, "image", error) from error


def _unreadable(example: dict[str, Any], column: str, error: Exception) -> UnreadableImageError:
    value = example[column]
    where = (value.get("path") if isinstance(value, dict) else None) or "bytes in the dataset"
    # Pillow's own words for it hold a memory address, different every time.
    reason = "no image, or of an unknown format" if isinstance(error, UnidentifiedImageError) else error
    name = f"the {column} of image {example['image_id']!r} ({where})"
    if isinstance(error, ImportError | ReadingError):  # the file is in order, and the error says what to do
        return UnreadableImageError(f"cannot read {name}: {error}")
    return UnreadableImageError(
        f"cannot read {name}: {reason}; replace the file, or take the image off the split's list"
    )
