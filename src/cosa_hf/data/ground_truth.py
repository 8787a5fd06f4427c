"""Whether masks are there to be scored against: a score over nothing looks like a good one."""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset

from cosa_hf.data.images import IGNORE_INDEX, ignored_id, mask_ids, undecoded
from cosa_hf.data.tags import class_names, name_some

__all__ = ["nothing_to_score", "require_ground_truth"]


def require_ground_truth(dataset: Dataset, ignore_index: int | None = None, rank: int = 0, processes: int = 1) -> None:
    """Read the masks of a dataset, shared among the processes, and refuse those that no score can be had from.

    Args:
        dataset: with the columns labels, image_id and mask.
        ignore_index: default: `ignored_id` of the classes.
        rank: of this process.
        processes: how many there are.

    Raises:
        ValueError: no mask shows an object, or a class is tagged but in no mask; or a mask cannot be read, and the
            message names it.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> require_ground_truth(load_shapes("val", num_images=3, masks=True))
    """
    names, rows = class_names(dataset), undecoded(dataset.select_columns(["labels", "image_id", "mask"]))
    present = {
        int(index)
        for row in rows.select(range(rank, len(rows), processes))
        for index in np.unique(mask_ids(row, len(names), ignore_index))
    }
    if processes > 1:
        present = set().union(*gather_object([present]))
    tagged: dict[int, list[str]] = defaultdict(list)
    for image_id, labels in zip(rows["image_id"][:], rows["labels"][:], strict=True):
        for label in labels:
            tagged[label].append(image_id)
    if reasons := nothing_to_score(present, tagged, names, ignore_index):
        raise ValueError("; ".join(reasons))


def nothing_to_score(
    present: Iterable[int], tagged: dict[int, list[str]], names: Sequence[str], ignore_index: int | None = None
) -> list[str]:
    """What is wrong with the masks of a whole set, a sentence each.

    Args:
        present: ids that occur in the masks.
        tagged: class, 0..C-1, to the ids of the images that have its tag.
        names: the C classes.
        ignore_index: as above.

    Example:
        >>> nothing_to_score({0, 1}, {0: ["a"], 1: ["b", "c"]}, ["cat", "dog"])
        ["'dog' is a tag of 2 images (b, c) and in no mask: correct the masks or the tags, or score more images"]
    """
    ids, ignored = set(present), ignored_id(len(names)) if ignore_index is None else ignore_index
    if not ids - {0, ignored}:
        told = f"the masks hold nothing but {' and '.join(map(str, sorted(ids)))}"
        if ignored in ids:
            told += f", and {ignored} does not count"
        advice = f"give them the ids 1..{len(names)} of the classes"
        if ids <= {0, IGNORE_INDEX} and ignored in ids and len(names) == 1:
            named = shlex.quote(names[0])  # to be typed as it stands
            advice = f"if {IGNORE_INDEX} is {names[0]!r}, say so: --mask_values 0=background {IGNORE_INDEX}={named}"
        return [f"{told}: there is no object to score. {advice[0].upper()}{advice[1:]}"]
    return [
        f"{names[label]!r} is a tag of {name_some(images, 'image')} and in no mask: correct the masks or the tags, or "
        "score more images"
        for label, images in sorted(tagged.items())
        if label + 1 not in ids
    ]
