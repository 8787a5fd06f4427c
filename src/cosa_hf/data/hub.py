"""Any dataset that `load_dataset` loads: from the Hub, from parquet files, from a folder on disk."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Features, IterableDataset, LargeList, List, Value
from datasets import Image as ImageFeature

from cosa_hf.data.negatives import NEGATIVE, split_negatives
from cosa_hf.data.options import DatasetOptions
from cosa_hf.data.tags import check_image_ids, collect_classes, name_some, parse_tags, tag_features, tag_ids

logger = logging.getLogger(__name__)


def load_hub(options: DatasetOptions, split: str, masks: bool = False) -> Dataset:
    """A split of a `datasets` dataset, with its columns brought into the form of this package.

    The image column must be of type `Image`. The label column may be a `ClassLabel`, a list of them, text, or a list
    of texts; text is read by `parse_tags` and has the classes of `options.classes`, or all that occur in the split,
    sorted. Ids come from a column `image_id`, where there is one, otherwise they are row numbers. Neither images nor
    masks are opened.

    Args:
        options: `dataset_name`, and the columns' names where they are not image, labels and mask.
        split: as `load_dataset` knows it, e.g. "train" or "train[:500]".
        masks: add the column `mask` (ids 0 background, 1..C in the order of the classes, 255 ignore).

    Returns:
        Dataset with `image`, `labels`, `image_id` and, if asked for, `mask`.

    Raises:
        FileNotFoundError: no such dataset, or the Hub is out of reach.
        ValueError: no such split or configuration, a missing column or one of another type, or a tag that is no
            class; names it.

    Example:
        >>> load_hub(DatasetOptions(dataset_name="org/pets", label_column="label"), "train")  # doctest: +SKIP
    """
    dataset = _load(options, split, streaming=False)
    _check_columns(dataset.features, options, masks)
    values = dataset.with_format(None)[options.label_column][:]
    names, tags_of = _label_reader(dataset.features[options.label_column], options)
    image_ids = _image_ids(dataset, split)
    tags = [_tags(tags_of, value, image_id) for value, image_id in zip(values, image_ids, strict=True)]
    tags, negatives = split_negatives(tags, image_ids)
    if _has_negatives(dataset.features):  # as `load_folder` gives them
        negatives = [bool(one or other) for one, other in zip(negatives, dataset[NEGATIVE][:], strict=True)]
    names = names or list(options.classes or collect_classes(tags))
    features = tag_features(names, masks, any(negatives))
    labels = tag_ids(tags, names, image_ids)
    columns = {options.image_column: "image"} | ({options.mask_column: "mask"} if masks else {})
    dataset = dataset.select_columns(list(columns)).rename_columns(columns)
    dataset = dataset.add_column("labels", labels, feature=features["labels"])
    dataset = dataset.add_column("image_id", image_ids, feature=features["image_id"])
    if any(negatives):
        dataset = dataset.add_column(NEGATIVE, negatives, feature=features[NEGATIVE])
    for column in columns.values():  # not cast(): that would copy every image
        dataset = dataset.cast_column(column, features[column])
    return dataset.select_columns(list(features))


def stream_hub(options: DatasetOptions, split: str) -> IterableDataset:
    """The same for training, without having the dataset on disk: rows come as they are read.

    Tags in text need `options.classes`, since all classes must be known before the last row is. A row with a tag that
    is not a class cannot stop a stream: a warning names it, and it comes without tags. `image_id` is the column of
    that name, otherwise the image's file name, otherwise a hash of its content.

    Args:
        options: as for `load_hub`.
        split: as `load_dataset` knows it; subsets of a split ("train[:500]") do not stream.

    Returns:
        IterableDataset with `image`, `labels`, `image_id` and `negative`.

    Raises:
        FileNotFoundError, ValueError: as `load_hub`; also text without classes.

    Example:
        >>> stream_hub(DatasetOptions(dataset_name="org/pets", label_column="label"), "train")  # doctest: +SKIP
    """
    stream = _load(options, split, streaming=True)
    if stream.features is None:
        stream = stream._resolve_features()  # what the library itself calls where a feature is needed
    _check_columns(stream.features, options, masks=False)
    names, tags_of = _label_reader(stream.features[options.label_column], options)
    names = names or list(options.classes or ())
    if not names:
        raise ValueError(
            f"column {options.label_column!r} of {options.dataset_name} holds text: a stream needs --classes, since it "
            "is not read to its end before training begins"
        )
    columns = [options.image_column, options.label_column]
    if "image_id" in stream.features and "image_id" not in columns:
        columns.append("image_id")
    if _has_negatives(stream.features):
        columns.append(NEGATIVE)

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        image, image_id = row[options.image_column], row.get("image_id")
        if image_id is None:
            image_id = _stream_id(image or {})
        try:
            tags = _tags(tags_of, row[options.label_column], str(image_id))
            (tags,), (negative,) = split_negatives([tags], [str(image_id)])
            (labels,) = tag_ids([tags], names, [str(image_id)])
        except ValueError as error:
            logger.warning("left out: %s", error)
            labels, negative = [], False
        return {
            "image": image,
            "labels": labels,
            "image_id": str(image_id).replace("/", "_"),
            NEGATIVE: bool(negative or row.get(NEGATIVE)),
        }

    # Nothing else is read, masks least of all; and undecoded, or a broken image would end the stream here.
    stream = stream.select_columns(columns).cast_column(options.image_column, ImageFeature(decode=False))
    return stream.map(convert, remove_columns=columns, features=tag_features(names, negatives=True))


def _load(options: DatasetOptions, split: str, streaming: bool) -> Any:
    name = options.dataset_name
    try:
        return datasets.load_dataset(name, options.dataset_config, split=split, streaming=streaming)
    except FileNotFoundError as error:
        refuse_pattern(Path(str(name)))
        raise FileNotFoundError(f"no dataset {name!r} on the Hub or on disk: {error}") from error
    except ConnectionError as error:
        raise FileNotFoundError(f"{name!r} is not a local path, and the Hub is out of reach: {error}") from error


def refuse_pattern(path: Path) -> None:
    """Refuse a directory whose path `load_dataset` takes for a pattern, and then finds nothing in it.

    Raises:
        ValueError: it is there, and has brackets or stars in its path.
    """
    if path.exists() and (found := set("[]*?") & set(str(path.absolute()))):
        raise ValueError(
            f"load_dataset takes {' '.join(sorted(found))} in {str(path.absolute())!r} for a pattern: rename the "
            "directory"
        )


def _check_columns(features: Features, options: DatasetOptions, masks: bool) -> None:
    wanted = {"image_column": options.image_column, "label_column": options.label_column}
    if masks:
        wanted["mask_column"] = options.mask_column
    found = ", ".join(f"{name}: {feature}" for name, feature in features.items())
    for flag, column in wanted.items():
        if column not in features:
            raise ValueError(f"{options.dataset_name} has no column {column!r}: pass --{flag}. Its columns are {found}")
        if flag != "label_column" and not isinstance(features[column], ImageFeature):
            raise ValueError(f"column {column!r} of {options.dataset_name} is {features[column]}, not Image")


def _has_negatives(features: Features) -> bool:
    return features.get(NEGATIVE) == Value("bool")


def _label_reader(feature: Any, options: DatasetOptions) -> tuple[list[str] | None, Callable[[Any], list[str]]]:
    """The classes, if the column's type names them, and what makes tags of one of its values."""
    one = feature.feature if isinstance(feature, List | LargeList) else feature
    if isinstance(one, ClassLabel):
        names = list(one.names)
        if options.classes and list(options.classes) != names:
            raise ValueError(
                f"column {options.label_column!r} of {options.dataset_name} has the classes {names}, in this order; "
                f"leave out --classes (got {list(options.classes)})"
            )

        def tags_of_ids(value: Any) -> list[str]:
            ids = value if isinstance(value, list) else [value]
            return [names[i] for i in ids if i is not None and i >= 0]  # -1: the library's "no label"

        return names, tags_of_ids
    if isinstance(one, Value) and one.dtype in ("string", "large_string"):
        return None, parse_tags
    raise ValueError(
        f"column {options.label_column!r} of {options.dataset_name} is {feature}: expected ClassLabel, text, or a list "
        "of one of them; pass another --label_column, or cast it"
    )


def _tags(tags_of: Callable[[Any], list[str]], value: Any, image_id: str) -> list[str]:
    try:
        return tags_of([] if value is None else value)
    except (ValueError, IndexError) as error:
        raise ValueError(f"image {image_id!r}: {error}") from error


def _image_ids(dataset: Dataset, split: str) -> list[str]:
    if "image_id" not in dataset.column_names:
        return [f"{index:08d}" for index in range(len(dataset))]
    image_ids = [str(value).replace("/", "_") for value in dataset.with_format(None)["image_id"][:]]
    check_image_ids(image_ids)
    twice = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
    if twice:
        raise ValueError(f"split {split!r} has {name_some(twice, 'image_id')} more than once: rename that column")
    return image_ids


def _stream_id(image: dict[str, Any]) -> str:
    if image.get("path"):
        return Path(image["path"]).stem
    return hashlib.sha256(image.get("bytes") or b"").hexdigest()[:16]


__all__ = ["load_hub", "refuse_pattern", "stream_hub"]
