"""Images and tags in: every reader returns a `datasets.Dataset` with the columns of `tag_features`."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from cosa_hf.data.images import read_image, read_mask, undecoded
from cosa_hf.data.shapes import SHAPES_CLASSES, SHAPES_COEXISTENCE, load_shapes
from cosa_hf.data.stream import TrainingStream
from cosa_hf.data.tags import class_names, multi_hot, tag_features, without_untagged
from cosa_hf.data.views import Views
from cosa_hf.data.voc import VOC_CLASSES, VOC_COEXISTENCE, load_voc


def _voc(data_dir: str | Path | None, split: str, masks: bool) -> Dataset:
    if data_dir is None:
        raise ValueError("dataset 'voc' needs data_dir, the VOC2012 directory")
    return load_voc(data_dir, split, masks)


def _shapes(data_dir: str | Path | None, split: str, masks: bool) -> Dataset:
    if data_dir is not None:
        raise ValueError(f"dataset 'shapes' is generated, not read: leave data_dir out (got {str(data_dir)!r})")
    return load_shapes(split, masks=masks)


class _Entry(NamedTuple):
    load: Callable[[str | Path | None, str, bool], Dataset]
    coexistence: tuple[str, ...]


_REGISTRY = {
    "voc": _Entry(_voc, VOC_COEXISTENCE),
    "shapes": _Entry(_shapes, SHAPES_COEXISTENCE),
}

COEXISTENCE_CLASSES = {name: entry.coexistence for name, entry in _REGISTRY.items()}
"""Per dataset, the classes whose mean is C-mIoU: those usually seen with the same surroundings."""


def load_dataset_by_name(name: str, data_dir: str | Path | None, split: str, masks: bool = False) -> Dataset:
    """A dataset by the name that a recipe gives it.

    Args:
        name: "voc" or "shapes".
        data_dir: where its files are; None for "shapes", which is generated.
        split: a split of that dataset, e.g. "train_aug" or "train".
        masks: add the column `mask`; without it no mask is opened.

    Raises:
        ValueError: unknown name, or a `data_dir` that does not fit it; otherwise what the reader raises.

    Example:
        >>> load_dataset_by_name("shapes", None, "val").num_rows
        200
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(_REGISTRY)}")
    return _REGISTRY[name].load(data_dir, split, masks)


__all__ = [
    "COEXISTENCE_CLASSES",
    "SHAPES_CLASSES",
    "SHAPES_COEXISTENCE",
    "VOC_CLASSES",
    "VOC_COEXISTENCE",
    "TrainingStream",
    "Views",
    "class_names",
    "load_dataset_by_name",
    "load_shapes",
    "load_voc",
    "multi_hot",
    "read_image",
    "read_mask",
    "tag_features",
    "undecoded",
    "without_untagged",
]
