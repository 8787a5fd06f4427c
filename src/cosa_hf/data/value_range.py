"""The one range that all images of a dataset are scaled from, where they have more than 8 bits."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from cosa_hf.data.formats import Look, Reading, ValueRange
from cosa_hf.data.images import UnreadableImageError, from_all_over, opened, undecoded
from cosa_hf.data.options import PictureConfig
from cosa_hf.data.tags import list_some

LOOKED_AT = 2000
"""Images, evenly spread over a dataset, that its range is found over; enough for percentiles, and soon read."""
LOOKED_AT_IN_STREAM = 256
TAILS = (1, 99)  # percent of the images: a few wrong ones do not make the range


def range_of(looks: Iterable[Look]) -> ValueRange:
    """From what some images of a set are like to the range of all of them.

    None if no image has more than 8 bits; "window" if each that has brings its own; else the range that holds nearly
    all values of nearly all of these images.

    Example:
        >>> range_of([Look(3, 4000, True, None, False, (8, 8)), Look(40, 3000, True, None, False, (8, 8))])
        (3.0, 4000.0)
    """
    deep = [look for look in looks if look.deep]
    if not deep:
        return None
    if all(look.window for look in deep):
        return "window"
    low = np.percentile([look.low for look in deep], TAILS[0], method="lower")
    high = np.percentile([look.high for look in deep], TAILS[1], method="higher")
    low, high = (float(f"{value:.6g}") for value in (low, high))  # as it is shown, and can be typed
    return (low, high if low < high else low + 1.0)


def described(value_range: ValueRange) -> str:
    """A range as its flag takes it.

    Example:
        >>> described((0.0, 4095.0)), described("window")
        ('--value_range 0 4095', '--value_range window')
    """
    words = [f"{value:g}" for value in value_range] if isinstance(value_range, tuple) else [str(value_range)]
    return " ".join(["--value_range", *words])


def settled_reading(
    config: PictureConfig, dataset: Dataset | IterableDataset, num_workers: int, say: Callable[[str], Any]
) -> Reading:
    """How the images of a run are read: what the configuration says, or what is found over them.

    Args:
        config: value range and bands.
        dataset: of a stream, the first rows are looked at.
        num_workers: processes that look.
        say: takes the sentences that tell what was found.

    Raises:
        UnreadableImageError: a library is missing for some of them; says what to install.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> settled_reading(PictureConfig(), load_shapes("train", num_images=3), 0, print)
        Reading(value_range=None, bands=None)
    """
    bands = None if config.bands is None else tuple(config.bands)
    if config.asked_range != "auto":
        return Reading(config.asked_range, bands)
    looks = dict(_looks(dataset, bands, num_workers))
    if several := [image_id for image_id, look in looks.items() if look.several]:
        say(f"{len(several)} images have several pages or frames; the first of each is taken: {list_some(several)}")
    reading = Reading(range_of(looks.values()), bands)
    if reading.value_range is not None:
        deep = sum(look.deep for look in looks.values())
        say(f"values of more than 8 bits in {deep} images looked at: {described(reading.value_range)}")
    return reading


def _looks(
    dataset: Dataset | IterableDataset, bands: tuple[int, ...] | None, num_workers: int
) -> Iterator[tuple[str, Look]]:
    """What images of more than 8 bits or several pages are like; of broken ones training tells where it meets them."""
    if isinstance(dataset, Dataset):
        chosen: Any = _Looking(
            dataset.select_columns(["image", "image_id"]).select(from_all_over(len(dataset), LOOKED_AT)), bands
        )
        # A generator of its own: the loader would draw from the one that weights and order come from.
        loader = DataLoader(
            chosen, batch_size=16, collate_fn=list, num_workers=num_workers, generator=torch.Generator()
        )
        found: Iterable[tuple[str, Look | None]] = itertools.chain.from_iterable(loader)
    else:
        rows = itertools.islice(undecoded(dataset), LOOKED_AT_IN_STREAM)
        found = (_look(row, bands) for row in rows)
    yield from ((image_id, look) for image_id, look in found if look is not None)


def _look(row: dict[str, Any], bands: tuple[int, ...] | None) -> tuple[str, Look | None]:
    try:
        with opened(row, bands, lossless=True) as picture:
            return row["image_id"], picture.look(bands) if picture.deep or picture.several else None
    except UnreadableImageError as error:
        if isinstance(error.__cause__, ImportError):  # true of all its kind: better said now than image by image
            raise
        return row["image_id"], None


class _Looking(torch.utils.data.Dataset):
    def __init__(self, dataset: Dataset, bands: tuple[int, ...] | None) -> None:
        self.dataset, self.bands = undecoded(dataset), bands

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[str, Look | None]:
        return _look(self.dataset[index], self.bands)


__all__ = ["described", "range_of", "settled_reading"]
