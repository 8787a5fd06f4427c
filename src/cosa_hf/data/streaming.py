"""Training on a dataset that is read from its source as it goes, and is never stored on this machine."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler

from cosa_hf.data.dataset import UNREADABLE_IN_A_ROW, Item, training_item
from cosa_hf.data.images import PHOTOS, Reading, UnreadableImageError, read_image, undecoded
from cosa_hf.data.negatives import teaches
from cosa_hf.data.tags import class_names
from cosa_hf.data.views import Views

Row = dict[str, Any]


def streaming_loader(
    dataset: IterableDataset,
    views: Views,
    length: int,
    seed: int,
    batch_size: int,
    shuffle_buffer: int = 1000,
    untagged: list[str] | None = None,
    process: tuple[int, int] = (0, 1),
    reading: Reading = PHOTOS,
    **loader_options: Any,
) -> DataLoader:
    """Batches of the items that `TrainingDataset` makes, from a stream instead of a dataset on disk.

    The process itself reads the rows, undecoded, and distributes them to the loader's workers, which decode and
    augment. So the order depends on (seed, process, shuffle_buffer) and the dataset alone, not on the number of
    workers, and skipping the first batches of the loader, as a resumed run does, reads rows but decodes nothing.

    Every epoch shuffles the shards and, within `shuffle_buffer` rows, the rows anew. Processes have shards of their
    own where there are enough of them; otherwise each reads all rows and keeps its share. Rows that have no tag
    and are not true negatives are left out. An image that cannot be read is replaced by the stream's first readable
    one, and the item's `unreadable` says what was wrong.

    Args:
        dataset: columns `image`, `labels` and `image_id`, e.g. from `stream_hub`.
        views: draws the views of one image.
        length: items of the whole run for this process, e.g. iterations x batch size.
        seed: non-negative.
        batch_size: items of a batch.
        shuffle_buffer: rows held to draw the next one from.
        untagged: takes in the ids of the rows left out, as they are met.
        process: (index, count) of the processes that share the stream.
        reading: what values and bands of the images become colours.
        loader_options: of `DataLoader`, e.g. num_workers.

    Raises:
        ValueError: none of the first hundred rows has a tag and a readable image, or an epoch has no tagged row.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> rows = load_shapes("train", num_images=5).to_iterable_dataset()
        >>> loader = streaming_loader(rows, Views(32, (0.5,) * 3, (0.5,) * 3), length=6, seed=0, batch_size=2)
        >>> [tuple(batch["weak"].shape) for batch in loader]
        [(2, 3, 32, 32), (2, 3, 32, 32), (2, 3, 32, 32)]
    """
    rows = undecoded(dataset)
    order = _Order(rows, length, seed, shuffle_buffer, [] if untagged is None else untagged, process)
    items = _Items(_first_readable(rows, reading), views, len(class_names(dataset)), seed, reading)
    return DataLoader(items, batch_size=batch_size, sampler=order, **loader_options)


class _Order(Sampler):
    """The rows of this process in the order of training, each with its position: what a loader takes as indices."""

    def __init__(
        self,
        rows: IterableDataset,
        length: int,
        seed: int,
        shuffle_buffer: int,
        untagged: list[str],
        process: tuple[int, int],
    ):
        self.index, self.count = process
        shuffled = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.rows = split_dataset_by_node(shuffled, rank=self.index, world_size=self.count)
        self.length = length
        self.untagged = untagged

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        self.untagged.clear()
        given = 0
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            before = given
            for row in self.rows:
                if not teaches(row):
                    if epoch == 0:
                        self.untagged.append(row["image_id"])
                    continue
                yield given * self.count + self.index, row
                given += 1
                if given == self.length:
                    return
            if given == before:
                raise ValueError(f"process {self.index} of {self.count} met no tagged image in the whole stream")


class _Items(torch.utils.data.Dataset):
    """Makes a training item of a (position, row) that `_Order` gives."""

    def __init__(self, substitute: Row, views: Views, num_classes: int, seed: int, reading: Reading):
        self.substitute, self.views, self.num_classes, self.seed = substitute, views, num_classes, seed
        self.reading = reading

    def __getitem__(self, key: tuple[int, Row]) -> Item:
        position, row = key
        try:
            return self._item(row, position) | {"unreadable": ""}
        except UnreadableImageError as error:
            return self._item(self.substitute, position) | {"unreadable": str(error)}

    def _item(self, row: Row, position: int) -> Item:
        return training_item(row, self.views, self.num_classes, self.seed, position, reading=self.reading)


def _first_readable(rows: IterableDataset, reading: Reading) -> Row:
    problem = "it has no rows"
    for row in itertools.islice(rows, UNREADABLE_IN_A_ROW):
        try:
            read_image(row, reading)
        except UnreadableImageError as error:
            problem = str(error)
        else:
            if teaches(row):
                return row
            problem = f"image {row['image_id']!r} has no tag"
    raise ValueError(f"none of the first {UNREADABLE_IN_A_ROW} rows of the stream can be trained on: {problem}")


__all__ = ["streaming_loader"]
