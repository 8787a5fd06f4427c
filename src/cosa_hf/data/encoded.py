"""Training items that are what an encoder's frozen part made of images, in place of views."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from cosa_hf.data.dataset import Item, TrainingDataset, mixed_seed
from cosa_hf.data.images import read_mask, undecoded, upright_size
from cosa_hf.data.tags import multi_hot

VIEWS = 2  # plain and mirrored
_VIEW = 2  # a family of random numbers beside those of order and views


def image_keys(dataset: Dataset) -> list[str]:
    """What tells the images of a dataset apart, and each from what it was before a change.

    A file is known by its path, size and time of change; an image within the dataset by its bytes.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> len(set(image_keys(load_shapes("train", num_images=3))))
        3
    """
    keys = []
    for row in undecoded(dataset.select_columns(["image"])):
        value = row["image"] or {}
        if value.get("bytes") is not None:
            identity = value["bytes"]
        else:
            path = Path(value.get("path") or "")
            stat = path.stat() if path.is_file() else None  # who reads it says what is wrong with it
            identity = f"{path.resolve()} {stat and (stat.st_size, stat.st_mtime_ns)}".encode()
        keys.append(hashlib.sha256(identity).hexdigest())
    return keys


class EncodedDataset(TrainingDataset):
    """A `TrainingDataset` whose items are maps of the image, plain or mirrored, as a store has them.

    Order and choice of view depend on (seed, position) alone, as there.

    Args:
        dataset: columns `image`, `labels`, `image_id` (and `mask`).
        read: from the key of an image to its maps, each (VIEWS, ...).
        keys: of the images, from `image_keys`.
        size: side that images are resized to, in pixels: that of `valid` and of the masks.
        length: items of the whole run.
        seed: non-negative.
        masks: also the ground truth, resized to `size`.
    """

    def __init__(
        self,
        dataset: Dataset,
        read: Callable[[str], dict[str, Tensor]],
        keys: list[str],
        size: int,
        length: int,
        seed: int,
        masks: bool = False,
    ) -> None:
        super().__init__(dataset, views=None, length=length, seed=seed, masks=masks)  # type: ignore[arg-type]
        self.read, self.keys, self.size = read, keys, size
        self._tags = self._dataset.select_columns(["labels", "image_id"])  # an item needs no image

    def _item(self, index: int, position: int) -> Item:
        mirrored = mixed_seed(self.seed, _VIEW, position) % VIEWS
        row: dict[str, Any] = self._tags[index]
        item: Item = {name: maps[mirrored].float() for name, maps in self.read(self.keys[index]).items()}
        item["valid"] = torch.ones(self.size, self.size, dtype=torch.bool)
        item["labels"] = multi_hot(row["labels"], self.num_classes)
        item["image_id"] = row["image_id"]
        if self.masks:
            example = self._dataset[index]
            mask = read_mask(example, upright_size(example), self.num_classes)
            ids = torch.from_numpy(np.array(mask.resize((self.size, self.size), Image.Resampling.NEAREST)))
            item["mask"] = (ids.flip(-1) if mirrored else ids).long()
        return item


__all__ = ["VIEWS", "EncodedDataset", "image_keys"]
