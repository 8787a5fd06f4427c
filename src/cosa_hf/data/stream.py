"""The endless, resumable order in which training meets the images and their views."""

import numpy as np
import torch
from datasets import Dataset

from cosa_hf.data.images import read_image, read_mask, undecoded
from cosa_hf.data.tags import class_names, multi_hot
from cosa_hf.data.views import Views

_ORDER, _VIEWS = 0, 1  # two independent families of random numbers under one seed


class TrainingStream(torch.utils.data.Dataset):
    """Map-style dataset of `length` training items over a dataset of n images.

    Item p is image ``permutation[p % n]`` of epoch ``p // n``, with views drawn from a generator of its own.
    Both depend on (seed, p) alone: not on the number of workers or processes, nor on where a run was resumed.
    Every image comes once an epoch. The global random state is left as it was.

    Args:
        dataset: columns `image`, `labels`, `image_id` (and `mask`).
        views: draws the views of one image.
        length: items of the whole run, e.g. iterations x batch size.
        seed: non-negative.
        masks: pass the masks through the same geometry, for a supervised bound. Otherwise a `mask` column, if
            there is one, is never opened.

    Raises:
        ValueError: the dataset is empty, lacks a column, or an argument is out of range; at indexing, a file
            cannot be read (every error says which image it was).

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> views = Views(crop_size=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> stream = TrainingStream(load_shapes("train", num_images=3), views, length=10, seed=0)
        >>> len(stream), sorted(stream[4])
        (10, ['image_id', 'labels', 'strong', 'valid', 'weak'])
    """

    def __init__(self, dataset: Dataset, views: Views, length: int, seed: int, masks: bool = False):
        columns = ["image", "labels", "image_id"] + (["mask"] if masks else [])
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
        self.masks = masks
        self._dataset = undecoded(dataset.select_columns(columns))
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, torch.Tensor | str]:
        """The views of item `position`, with labels (C,) float32 multi-hot and image_id."""
        if not 0 <= position < self.length:
            raise IndexError(f"item {position} of a stream of {self.length}")
        example = self._dataset[self._index(position)]
        try:
            image = read_image(example)
            mask = read_mask(example, image.size, self.num_classes) if self.masks else None
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed: that reseeds the accelerator too, which the fork does not restore.
                torch.default_generator.manual_seed(_mix(self.seed, _VIEWS, position))
                item: dict[str, torch.Tensor | str] = {**self.views(image, mask)}
        except Exception as error:
            error.add_note(f"at item {position} of the training stream, image {example['image_id']!r}")
            raise
        item["labels"] = multi_hot(example["labels"], self.num_classes)
        item["image_id"] = example["image_id"]
        return item

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self._dataset))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, _ORDER, epoch))
            self._permutation = torch.randperm(len(self._dataset), generator=generator)
            self._epoch = epoch
        return int(self._permutation[place])


def _mix(*numbers: int) -> int:
    """One well-mixed 32-bit seed from several numbers: neighbouring items get unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
