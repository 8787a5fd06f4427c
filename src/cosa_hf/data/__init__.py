"""Images and tags in: every reader returns a `datasets.Dataset` with the columns of `tag_features`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from cosa_hf.data.coco import COCO_CLASSES, load_coco
from cosa_hf.data.dataset import TrainingDataset
from cosa_hf.data.folder import load_folder
from cosa_hf.data.hub import load_hub, stream_hub
from cosa_hf.data.images import read_image, read_mask, undecoded
from cosa_hf.data.mask_values import with_mask_values
from cosa_hf.data.options import DatasetOptions
from cosa_hf.data.shapes import SHAPES_CLASSES, SHAPES_COEXISTENCE, load_shapes
from cosa_hf.data.streaming import streaming_loader
from cosa_hf.data.tags import class_names, multi_hot, tag_features, without_untagged
from cosa_hf.data.views import Views
from cosa_hf.data.voc import VOC_CLASSES, VOC_COEXISTENCE, load_voc


class _Entry(NamedTuple):
    load: Callable[[str | Path | None, str, bool, DatasetOptions], Dataset]
    coexistence: tuple[str, ...] = ()


def _voc(data_dir: str | Path | None, split: str, masks: bool, options: DatasetOptions) -> Dataset:
    return load_voc(_required(data_dir, "voc", "the VOC2012 directory"), split, masks)


def _coco(data_dir: str | Path | None, split: str, masks: bool, options: DatasetOptions) -> Dataset:
    return load_coco(_required(data_dir, "coco", "the directory of annotations/ and train2014/"), split, masks)


def _folder(data_dir: str | Path | None, split: str, masks: bool, options: DatasetOptions) -> Dataset:
    return load_folder(_required(data_dir, "folder", "the folder of your photos"), split, masks, options.classes)


def _shapes(data_dir: str | Path | None, split: str, masks: bool, options: DatasetOptions) -> Dataset:
    if data_dir is not None:
        raise ValueError(f"dataset 'shapes' is generated, not read: leave data_dir out (got {str(data_dir)!r})")
    return load_shapes(split, masks=masks)


def _hub(data_dir: str | Path | None, split: str, masks: bool, options: DatasetOptions) -> Dataset:
    if data_dir is not None or not options.dataset_name:
        raise ValueError(
            "dataset 'hub' needs dataset_name, a name on the Hub or a local path, and no data_dir; "
            f"got dataset_name={options.dataset_name!r}, data_dir={data_dir!r}"
        )
    return load_hub(options, split, masks)


def _required(data_dir: str | Path | None, name: str, what: str) -> str | Path:
    if data_dir is None:
        raise ValueError(f"dataset {name!r} needs data_dir, {what}")
    return data_dir


_REGISTRY = {
    "voc": _Entry(_voc, VOC_COEXISTENCE),
    "coco": _Entry(_coco),
    "shapes": _Entry(_shapes, SHAPES_COEXISTENCE),
    "folder": _Entry(_folder),
    "hub": _Entry(_hub),
}

COEXISTENCE_CLASSES = {name: entry.coexistence for name, entry in _REGISTRY.items()}
"""Per dataset, the classes whose mean is C-mIoU: those usually seen with the same surroundings."""


def coexistence_among(names: Sequence[str], dataset: str) -> list[str]:
    """The `COEXISTENCE_CLASSES` of a dataset that are among these: files in VOC's layout may show other things.

    Example:
        >>> coexistence_among(["rust", "boat"], "voc"), coexistence_among(["rust"], "folder")
        (['boat'], [])
    """
    return [name for name in COEXISTENCE_CLASSES.get(dataset, ()) if name in names]


def load_dataset_by_name(
    name: str,
    data_dir: str | Path | None,
    split: str,
    masks: bool = False,
    options: DatasetOptions | None = None,
) -> Dataset:
    """A dataset by the name that a recipe gives it.

    Args:
        name: "voc", "coco", "shapes", "folder" or "hub".
        data_dir: where its files are; None for "shapes", which is generated, and "hub", which has a name.
        split: a split of that dataset, e.g. "train_aug" or "train".
        masks: add the column `mask`; without it no mask is opened.
        options: what "folder" and "hub" need to be told. A dataset with classes of its own ignores them, but for
            `classes`, which must then be these, and `mask_values`.

    Raises:
        ValueError: unknown name, a `data_dir` or `classes` that do not fit; otherwise what the reader raises.

    Example:
        >>> load_dataset_by_name("shapes", None, "val").num_rows
        200
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(_REGISTRY)}")
    options = options or DatasetOptions()
    dataset = _REGISTRY[name].load(data_dir, split, masks, options)
    if masks and options.mask_values:
        dataset = with_mask_values(dataset, options.mask_values)
    if options.classes and class_names(dataset) != list(options.classes):
        raise ValueError(
            f"dataset {name!r} has classes of its own, {class_names(dataset)}; got {list(options.classes)}"
        )
    return dataset


__all__ = [
    "COCO_CLASSES",
    "COEXISTENCE_CLASSES",
    "SHAPES_CLASSES",
    "SHAPES_COEXISTENCE",
    "VOC_CLASSES",
    "VOC_COEXISTENCE",
    "DatasetOptions",
    "TrainingDataset",
    "Views",
    "class_names",
    "coexistence_among",
    "load_coco",
    "load_dataset_by_name",
    "load_folder",
    "load_hub",
    "load_shapes",
    "load_voc",
    "multi_hot",
    "read_image",
    "read_mask",
    "stream_hub",
    "streaming_loader",
    "tag_features",
    "undecoded",
    "without_untagged",
]
