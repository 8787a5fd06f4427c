"""True negatives: images that somebody looked at, and that show none of the classes."""

from collections.abc import Mapping, Sequence
from typing import Any

from cosa_hf.data.tag_text import NONE_OF_THE_CLASSES
from cosa_hf.data.tags import name_some

NEGATIVE = "negative"
"""The column that says so of a dataset's rows, bool; where it is not there, of none."""


def split_negatives(tags: Sequence[list[str]], image_ids: Sequence[str]) -> tuple[list[list[str]], list[bool]]:
    """Tags without the mark, and which of the images had it.

    Raises:
        ValueError: the mark stands beside tags; names the images.

    Example:
        >>> split_negatives([["cat"], ["-"], []], ["a", "b", "c"])
        ([['cat'], [], []], [False, True, False])
    """
    marked = [NONE_OF_THE_CLASSES in names for names in tags]
    both = [image_id for image_id, names in zip(image_ids, tags, strict=True) if {NONE_OF_THE_CLASSES} < set(names)]
    if both:
        raise ValueError(
            f"{name_some(both, 'image')}: {NONE_OF_THE_CLASSES!r} says that an image shows none of the classes, and "
            "stands beside tags: remove one of them"
        )
    return [[] if mark else names for mark, names in zip(marked, tags, strict=True)], marked


def teaches(row: Mapping[str, Any]) -> bool:
    """Whether training learns from a row: it has tags, or is a true negative.

    Example:
        >>> [teaches(row) for row in ({"labels": [0]}, {"labels": [], "negative": True}, {"labels": []})]
        [True, True, False]
    """
    return bool(row["labels"] or row.get(NEGATIVE))


__all__ = ["NEGATIVE", "split_negatives", "teaches"]
