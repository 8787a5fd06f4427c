"""Exported pseudo-labels in: found, checked, and said what their confidence means."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from cosa_hf.data import class_names, load_voc, undecoded
from cosa_hf.data.images import UnreadableImageError, ignored_id, read_mask, upright_size
from cosa_hf.data.palette import voc_palette
from cosa_hf.pseudo_labels.export import RECORD, read_record

SHOWN = 10  # of the masks that cannot be used, in an error


@dataclass(frozen=True)
class Exported:
    """Images with tags and exported masks.

    Attributes:
        dataset: columns image, labels, image_id, mask and, from parquet, confidence.
        threshold: xi, around which a CAM's confidence says little; None where it is a probability.
        record: what `export.json` says of how they were made, and so what confidence means; empty where it is missing.
    """

    dataset: Dataset
    threshold: float | None
    record: dict[str, Any]


def load_pseudo_labels(source: str, split: str | None = None) -> Exported:
    """What `cosa-hf label` wrote, as PNG or parquet, on disk or pushed to the Hub; or a VOC layout.

    Args:
        source: a directory, or a dataset's name on the Hub.
        split: of it; an export's own when None.

    Raises:
        FileNotFoundError: no such directory or dataset, or one of its files is missing.
        ValueError: the export is unfinished or in another format, or the dataset has no masks.

    Example:
        >>> from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
        >>> from cosa_hf.data import SHAPES_CLASSES, load_shapes
        >>> from cosa_hf.inference import Segmenter
        >>> from cosa_hf.pseudo_labels.export import export_pseudo_labels
        >>> config = CoSAConfig(backbone="test_vit", id2label=dict(enumerate(["background", *SHAPES_CLASSES])))
        >>> processor = CoSAImageProcessor(size={"height": 32, "width": 32})
        >>> segmenter = Segmenter(CoSAForWeaklySupervisedSegmentation(config), processor)
        >>> settings = {"source": "cam_mean", "format": "png", "split": "train", "progress": False}
        >>> _ = export_pseudo_labels(segmenter, load_shapes("train", 2), "labels", **settings)
        >>> exported = load_pseudo_labels("labels")
        >>> len(exported.dataset), exported.threshold
        (2, 0.5)
    """
    root = Path(source)
    record: dict[str, Any] = {}
    if (root / RECORD).is_file():
        record = read_record(root)
        if not record["complete"]:
            raise ValueError(f"{root / RECORD}: this export was interrupted; run the same export again, it goes on")
        if record["settings"]["format"] == "coco-json":
            raise ValueError(f"{root} is an export in coco-json: export png or parquet to train on")
    elif root.is_dir() and not (root / "ImageSets").is_dir():
        raise FileNotFoundError(
            f"{root} is neither an export (it has no {RECORD}) nor a VOC layout (it has no ImageSets)"
        )
    settings = record.get("settings", {})
    split = split or settings.get("split")
    if split is None:
        if not root.is_dir():
            raise FileNotFoundError(f"no directory {root}; of a dataset on the Hub, name the split with train_split")
        raise ValueError(f"{source} does not say which split it is of: name one with train_split")
    if root.is_dir() and (root / "ImageSets").is_dir():
        dataset = load_voc(root, split, masks=True)
    else:
        try:
            dataset = datasets.load_dataset(source, split=split)
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(f"no pseudo-labels {source!r} on disk or on the Hub: {error}") from error
        missing = [name for name in ("image", "labels", "image_id", "mask") if name not in dataset.column_names]
        if missing:
            raise ValueError(f"{source} lacks the columns {missing}; it has {dataset.column_names}")
    if "classes" in settings and class_names(dataset) != settings["classes"]:
        raise ValueError(
            f"{root}: its classes {class_names(dataset)} are not those it was exported with, {settings['classes']}"
        )
    return Exported(dataset, None if settings.get("crf") else settings.get("threshold"), record)


def check_masks(dataset: Dataset) -> None:
    """Open every mask once, before hours of training on wrong ones; shared among the processes.

    Args:
        dataset: with the columns image, labels, image_id and mask.

    Raises:
        ValueError: masks that cannot be read, have another size than their image, ids beyond the classes, colours that
            are not those of their ids, or not one labelled pixel; names their files.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> check_masks(load_shapes("train", num_images=2, masks=True))
    """
    num_classes = len(class_names(dataset))
    state = PartialState()
    rows = range(state.process_index, len(dataset), state.num_processes)
    share = undecoded(dataset.select_columns(["image", "image_id", "mask"])).select(rows)
    problems = []
    for row in share:
        try:
            _check_mask(row, num_classes)
        except UnreadableImageError as error:
            file = row["mask"]["path"] if row["mask"] else None
            problems.append(f"  {file or row['image_id']}: {error}")
    problems = gather_object(problems)
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"{len(problems)} of {len(dataset)} pseudo-labels cannot be trained on:\n"
            + "\n".join(problems[:SHOWN])
            + more
        )


def _check_mask(row: dict[str, Any], num_classes: int) -> None:
    mask = read_mask(row, upright_size(row), num_classes)
    present = np.unique(np.asarray(mask))
    ignored = ignored_id(num_classes)
    if present.tolist() == [ignored]:
        raise UnreadableImageError(f"mask of image {row['image_id']!r} is all {ignored}: not one pixel is labelled")
    palette = datasets.Image().decode_example(row["mask"]).getpalette()  # None of a grey image
    if palette is not None:
        _check_palette(palette, present.tolist(), row["image_id"])


def _check_palette(palette: list[int], present: Sequence[int], image_id: str) -> None:
    """A program that saves a palette image anew may number its colours anew: the ids then mean other classes."""
    expected = voc_palette()
    for index in present:
        colour = tuple(palette[3 * index : 3 * index + 3])
        if colour != tuple(expected[index]):
            raise UnreadableImageError(
                f"mask of image {image_id!r} shows id {index} in the colour {colour}, VOC's palette in "
                f"{tuple(expected[index])}: its ids may have been renumbered; export again, or save it as a grey image"
            )
