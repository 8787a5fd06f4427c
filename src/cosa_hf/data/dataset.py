"""The endless, resumable order in which training meets the images and their views."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset

from cosa_hf.data.images import PHOTOS, Reading, UnreadableImageError, read_confidence, read_image, read_mask, undecoded
from cosa_hf.data.tags import class_names, multi_hot
from cosa_hf.data.views import Views

UNREADABLE_IN_A_ROW = 100
"""As many unreadable images one after the other are not an accident: training stops."""

_ORDER, _VIEWS = 0, 1  # two independent families of random numbers under one seed

Item = dict[str, torch.Tensor | str]


class TrainingDataset(torch.utils.data.Dataset):
    """Map-style dataset of `length` training items over a dataset of n images.

    Item p is image ``permutation[p % n]`` of epoch ``p // n``, with views drawn from a generator of its own.
    Both depend on (seed, p) alone: not on the number of workers or processes, nor on where a run was resumed.
    Every image comes once an epoch. The global random state is left as it was.

    An image that cannot be read must not end a run at its third hour: the next one of the order takes its place, and
    the item's `unreadable`, otherwise "", says what was wrong with it.

    Args:
        dataset: columns `image`, `labels`, `image_id` (and `mask`).
        views: draws the views of one image.
        length: items of the whole run, e.g. iterations x batch size.
        seed: non-negative.
        masks: pass the masks through the same geometry, for a supervised bound. Otherwise a `mask` column, if
            there is one, is never opened.
        confidence: pass the masks' confidences through it too.
        reading: what values and bands of the images become colours.

    Raises:
        ValueError: the dataset is empty, lacks a column, or an argument is out of range; at indexing, a hundred
            images in a row cannot be read (or all, of fewer). Every other error says which image it was.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> views = Views(crop_size=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> stream = TrainingDataset(load_shapes("train", num_images=3), views, length=10, seed=0)
        >>> len(stream), sorted(stream[4])
        (10, ['image_id', 'labels', 'strong', 'unreadable', 'valid', 'weak'])
    """

    def __init__(
        self,
        dataset: Dataset,
        views: Views,
        length: int,
        seed: int,
        masks: bool = False,
        confidence: bool = False,
        reading: Reading = PHOTOS,
    ):
        extra = [name for name, wanted in (("mask", masks), ("confidence", confidence)) if wanted]
        columns = ["image", "labels", "image_id", *extra]
        missing = [column for column in columns if column not in dataset.column_names]
        if missing:
            raise ValueError(f"the dataset lacks the columns {missing}; it has {dataset.column_names}")
        if len(dataset) == 0:
            raise ValueError("the dataset has no images")
        if length < 1 or seed < 0:
            raise ValueError(f"length must be at least 1 and seed non-negative, got {length} and {seed}")
        self.num_classes = len(class_names(dataset))
        self.views = views
        self.length = length
        self.seed = seed
        self.masks, self.confidence, self.reading = masks, confidence, reading
        self._dataset = undecoded(dataset.select_columns(columns))
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Item:
        """The views of item `position`, with labels (C,) float32 multi-hot, image_id and unreadable."""
        if not 0 <= position < self.length:
            raise IndexError(f"item {position} of a stream of {self.length}")
        unreadable = ""
        for following in range(min(len(self._dataset), UNREADABLE_IN_A_ROW)):
            try:
                item = self._item(self._index(position + following), position)
            except UnreadableImageError as error:
                unreadable = unreadable or str(error)
            else:
                return item | {"unreadable": unreadable}
        raise ValueError(f"{following + 1} images in a row cannot be read. The first: {unreadable}")

    def _item(self, index: int, position: int) -> Item:
        """What row `index` gives to item `position`."""
        example = self._dataset[index]
        wanted = (self.masks, self.confidence, self.reading)
        return training_item(example, self.views, self.num_classes, self.seed, position, *wanted)

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self._dataset))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, _ORDER, epoch))
            self._permutation = torch.randperm(len(self._dataset), generator=generator)
            self._epoch = epoch
        return int(self._permutation[place])


def training_item(
    example: dict[str, Any],
    views: Views,
    num_classes: int,
    seed: int,
    position: int,
    masks: bool = False,
    confidence: bool = False,
    reading: Reading = PHOTOS,
) -> Item:
    """What training sees of one row of an `undecoded` dataset at one position of its order.

    Returns:
        What `views` returns, labels (C,) float32 multi-hot, and image_id.

    Raises:
        UnreadableImageError: the image or its mask; every other error gets a note that names the image.
    """
    try:
        image = read_image(example, reading)
        mask = read_mask(example, image.size, num_classes) if masks else None
        sure = read_confidence(example, image.size) if confidence else None
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that reseeds the accelerator too, which the fork does not restore.
            torch.default_generator.manual_seed(mixed_seed(seed, _VIEWS, position))
            item: Item = {**views(image, mask, sure)}
    except UnreadableImageError:
        raise
    except Exception as error:
        error.add_note(f"at item {position} of the training stream, image {example['image_id']!r}")
        raise
    item["labels"] = multi_hot(example["labels"], num_classes)
    item["image_id"] = example["image_id"]
    return item


def mixed_seed(*numbers: int) -> int:
    """One well-mixed 32-bit seed from several numbers: neighbouring items get unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
