"""Masks whose values are not the ids of their classes, such as 0 and 255 of a binary one."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature

from cosa_hf.data.images import UnreadableImageError, ignored_id, raw_mask, undecoded
from cosa_hf.data.palette import mask_image
from cosa_hf.data.tags import class_names, list_some

__all__ = ["with_mask_values"]


def with_mask_values(dataset: Dataset, mask_values: Sequence[str]) -> Dataset:
    """The same dataset with masks of class ids, from masks of other values.

    Args:
        dataset: with the columns image_id and mask; all masks are read.
        mask_values: "VALUE=NAME" each, the name that of a class, or background, or ignore.

    Raises:
        ValueError: a text of another form, a name that is none of these, a value named twice, or a mask that cannot be
            read or holds a value that is not named; names it.

    Example:
        >>> from PIL import Image
        >>> from cosa_hf.data.tags import tag_features
        >>> binary = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
        >>> rows = {"image": [binary], "labels": [[0]], "image_id": ["a"], "mask": [binary]}
        >>> dataset = Dataset.from_dict(rows, features=tag_features(["cat"], masks=True))
        >>> np.asarray(with_mask_values(dataset, ["0=background", "255=cat"])[0]["mask"]).tolist()
        [[0, 1]]
    """
    names = class_names(dataset)
    ids = _parse(mask_values, names)
    table = np.full(max(ids) + 1, -1)
    table[list(ids)] = list(ids.values())

    def to_ids(row: dict[str, Any]) -> dict[str, Any]:
        values = raw_mask(row)
        present = np.unique(values)
        if unnamed := [str(value) for value in present if int(value) not in ids]:
            raise UnreadableImageError(
                f"mask of image {row['image_id']!r} holds the values {list_some(unnamed)}, mask_values names "
                f"{', '.join(map(str, ids))}: name these too, =ignore those that do not count"
            )
        buffer = io.BytesIO()
        mask_image(table[values], len(names)).save(buffer, "PNG")
        return {"mask": {"bytes": buffer.getvalue(), "path": row["mask"]["path"]}}

    rows = undecoded(dataset.select_columns(["image_id", "mask"]))
    masks = [to_ids(row)["mask"] for row in rows]
    return dataset.remove_columns("mask").add_column("mask", masks, feature=ImageFeature())


def _parse(mask_values: Sequence[str], names: Sequence[str]) -> dict[int, int]:
    known = {"background": 0, "ignore": ignored_id(len(names))} | {name: n for n, name in enumerate(names, 1)}
    ids: dict[int, int] = {}
    for text in mask_values:
        value, _, name = text.partition("=")
        if not value.isdecimal() or int(value) > 65535 or name not in known:
            raise ValueError(
                f"mask_values {text!r} is not VALUE=NAME, a number up to 65535 and one of {', '.join(known)}"
            )
        if int(value) in ids:
            raise ValueError(f"mask_values names {value} twice")
        ids[int(value)] = known[name]
    return ids
