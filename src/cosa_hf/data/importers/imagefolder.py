"""A folder that load_dataset("imagefolder") of the Hugging Face library reads: metadata of its own, or directories."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from cosa_hf.data.hub import refuse_pattern
from cosa_hf.data.importers.rows import TAG_COLUMNS, ImportOptions, Row, column_of


def read(path: Path, options: ImportOptions) -> Iterator[Row]:
    """The images of such a folder, read by that library; of a column `objects` the categories are tags.

    Raises:
        ValueError: the library does not read it, or it has no column of tags.

    Example:
        >>> from PIL import Image
        >>> for name in ("cat", "dog"):
        ...     Path("photos", name).mkdir(parents=True)
        ...     Image.new("RGB", (4, 4)).save(f"photos/{name}/{name}.png")
        >>> [(row.files, row.tags) for row in read(Path("photos"), ImportOptions())]  # doctest: +SKIP
        [(['cat/cat.png'], ['cat']), (['dog/dog.png'], ['dog'])]
    """
    with tempfile.TemporaryDirectory() as cache:
        try:
            splits = datasets.load_dataset("imagefolder", data_dir=str(path), cache_dir=cache)
        except Exception as error:  # the library has no narrower one
            refuse_pattern(path)
            raise ValueError(f"{path} is not a folder of images that the library reads: {error}") from error
        for split, dataset in splits.items():
            columns = [name for name in dataset.column_names if name != "image"]
            objects = "objects" in columns and options.tag_column in (None, "objects")
            tag = (
                "objects" if objects else column_of(columns, options.tag_column, TAG_COLUMNS, "tag", f"{path}, {split}")
            )
            feature = dataset.features[tag]
            for row in dataset.cast_column("image", datasets.Image(decode=False)):
                file = os.path.relpath(row["image"]["path"], path.absolute())
                yield Row(f"{path}, {file}", [file], options.tags(_names(row[tag], feature)), split=str(split))


def recognises(path: Path) -> bool:
    """Whether a folder has the library's metadata; a sub-folder for each tag needs no import."""
    return path.is_dir() and any((path / name).is_file() for name in ("metadata.csv", "metadata.jsonl"))


def _names(value: Any, feature: Any) -> Any:
    if isinstance(value, dict):
        held = [value[key] for key in ("categories", "category", "labels", "label") if key in value]
        return held[0] if held else value
    if isinstance(feature, datasets.ClassLabel):
        return [feature.int2str(value)]
    return [str(value)] if isinstance(value, int) else value
