"""How pseudo-labels lie on disk: palette PNGs in VOC layout, a parquet dataset, COCO json.

Every format writes one file for each shard of the images. That file is the proof that its shard is done, so it
appears last and at once; a shard without its file is done again.
"""

import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from cosa_hf.data.palette import mask_image
from cosa_hf.data.tags import list_some, tag_features
from cosa_hf.files import file_name, whole_file

__all__ = ["FORMATS", "CocoFormat", "Format", "ParquetFormat", "PngFormat", "PseudoLabel"]


@dataclass(frozen=True)
class PseudoLabel:
    """One image with what was found in it.

    Attributes:
        image_id: the dataset's id of the image.
        file: the image's file as `datasets` stores it: "path", and "bytes" where they are in the dataset.
        labels: ids of the tags that the mask was made with, 0..C-1.
        mask: (H, W) uint16 ids, background 0, the image upright and at its own size.
        confidence: (H, W) uint8, 255 for full confidence.
    """

    image_id: str
    file: dict[str, Any]
    labels: list[int]
    mask: np.ndarray
    confidence: np.ndarray


class Format:
    """Where one format's files are, and how a shard and the complete export are written.

    Args:
        output_dir: the export's directory.
        class_names: the C foreground classes.
        split: names the list, the parquet files or the json file.
        num_shards: of the whole export.
        paths: of all images, as `datasets` stores them; None where it has the bytes alone.
        data_dir: what file names in COCO json are relative to.

    Raises:
        ValueError: the format needs a library that is not installed, or cannot hold the split or the images' names.
    """

    def __init__(
        self,
        output_dir: Path,
        class_names: list[str],
        split: str,
        num_shards: int,
        paths: Sequence[str | None] = (),
        data_dir: str | Path | None = None,
    ):
        self.output_dir, self.class_names, self.split, self.num_shards = output_dir, class_names, split, num_shards
        self.paths, self.data_dir = paths, data_dir

    def shard_file(self, shard: int) -> Path:
        """The file whose presence says that the shard is done."""
        return self.output_dir / ".parts" / f"{shard:05d}.json"

    def prepare(self) -> None:
        """Make the directories."""
        self.shard_file(0).parent.mkdir(exist_ok=True)

    def encode(self, label: PseudoLabel) -> Any:
        """The entry of one image in the file of its shard."""
        raise NotImplementedError

    def write(self, shard: int, entries: list[Any]) -> None:
        """Write the file of a shard."""
        _write_json(self.shard_file(shard), entries)

    def finish(self) -> None:
        """Complete the export from its shards; again does no harm."""
        raise NotImplementedError

    def clean(self) -> None:
        """Remove the files of single shards once the export is complete."""
        shutil.rmtree(self.shard_file(0).parent, ignore_errors=True)

    def entries(self) -> list[Any]:
        """The entries of all shards, in the order of the dataset."""
        return [
            entry
            for shard in range(self.num_shards)
            for entry in json.loads(self.shard_file(shard).read_text(encoding="utf-8"))
        ]


class PngFormat(Format):
    """PNGs of `mask_image` in VOC layout, which `load_voc` reads.

    `SegmentationClassAug/ID.png`, `ImageSets/Segmentation/SPLIT.txt`, the tags in `image_labels.json`, the
    class names in `classes.txt`. `JPEGImages/ID.jpg` is a link to the image where that is a file, so that no
    image is on the disk twice, and else the image's own bytes, whatever their format. A slash, backslash,
    percent sign or blank in an id becomes %2F, %5C, %25 or %20, and an over-long one is cut (`file_name`).
    """

    def prepare(self) -> None:
        super().prepare()
        for name in ("SegmentationClassAug", "JPEGImages", "ImageSets/Segmentation"):
            (self.output_dir / name).mkdir(parents=True, exist_ok=True)

    def encode(self, label: PseudoLabel) -> Any:
        name = file_name(label.image_id, ".png").removesuffix(".png")
        image = self.output_dir / "JPEGImages" / f"{name}.jpg"
        if not os.path.lexists(image):
            if label.file["bytes"] is None:
                image.symlink_to(Path(label.file["path"]).absolute())
            else:
                with whole_file(image) as path:
                    path.write_bytes(label.file["bytes"])
        mask = self.output_dir / "SegmentationClassAug" / f"{name}.png"
        if not mask.exists():
            with whole_file(mask) as path:
                path.write_bytes(_png(mask_image(label.mask, len(self.class_names))))
        return {"image_id": name, "labels": [self.class_names[index] for index in label.labels]}

    def finish(self) -> None:
        labels = {entry["image_id"]: entry["labels"] for entry in self.entries()}
        _write_json(self.output_dir / "image_labels.json", labels)
        for path, lines in (
            (self.output_dir / "classes.txt", self.class_names),
            (self.output_dir / "ImageSets" / "Segmentation" / f"{self.split}.txt", list(labels)),
        ):
            with whole_file(path) as unfinished:
                unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


class ParquetFormat(Format):
    """A dataset that `datasets.load_dataset(DIRECTORY)` reads and `push_to_hub` takes.

    Columns: those of the package's datasets, the image with its original bytes and `mask` as a PNG of `mask_image`,
    and `confidence`, a grey PNG.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not re.fullmatch(r"\w+(\.\w+)*", self.split):
            raise ValueError(
                f"parquet files are named after their split, and `datasets` reads none of {self.split!r}: export the "
                "whole split, or another format"
            )

    def shard_file(self, shard: int) -> Path:
        return self.output_dir / "data" / f"{self.split}-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def encode(self, label: PseudoLabel) -> Any:
        source = Path(label.file["path"] or label.image_id)
        return {
            "image": {"bytes": label.file["bytes"] or source.read_bytes(), "path": source.name},
            "labels": label.labels,
            "image_id": label.image_id,
            "mask": {"bytes": _png(mask_image(label.mask, len(self.class_names))), "path": None},
            "confidence": {"bytes": _png(PILImage.fromarray(label.confidence)), "path": None},
        }

    def write(self, shard: int, entries: list[Any]) -> None:
        features = Features(tag_features(self.class_names, masks=True) | {"confidence": Image()})
        dataset = Dataset.from_list(entries, features=features)
        with whole_file(self.shard_file(shard)) as path, path.open("wb") as file:
            dataset.to_parquet(file)

    def finish(self) -> None:
        """Nothing: the files of the shards are the export."""

    def clean(self) -> None:
        """Nothing: the files of the shards stay."""


class CocoFormat(Format):
    """COCO json, `annotations/instances_SPLIT.json`: one run-length encoded annotation per image and class.

    The annotations do not overlap and none is a crowd; they are segments of a class, not objects. An image's
    id is its place in the dataset from 1 on, its `name` the dataset's own id, its `file_name` relative to the
    directory the dataset was read from, or else to the one that all its images lie in. A category's id is the id
    in the masks.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        try:
            from pycocotools import mask
        except ImportError:
            raise ValueError('the format coco-json needs pycocotools: pip install "cosa-hf[coco]"') from None
        self._rle = mask
        files = [Path(path) for path in self.paths if path]
        self._roots = [] if self.data_dir is None else [Path(self.data_dir).absolute()]
        if folders := [file.parent for file in files if file.is_absolute()]:
            self._roots.append(Path(os.path.commonpath(folders)))
        twice = [name for name, count in Counter(map(self._file_name, files)).items() if count > 1]
        if twice:
            raise ValueError(
                f"{list_some(twice)} more than once among the images' files, which COCO json knows them by: "
                "export png or parquet"
            )

    def prepare(self) -> None:
        super().prepare()
        (self.output_dir / "annotations").mkdir(exist_ok=True)

    def encode(self, label: PseudoLabel) -> Any:
        height, width = label.mask.shape
        path = label.file["path"]
        name = self._file_name(Path(path)) if path else label.image_id
        annotations = []
        for category in np.unique(label.mask[label.mask > 0]).tolist():
            code = self._rle.encode(np.asfortranarray(label.mask == category))
            annotations.append(
                {
                    "category_id": category,
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
                    "area": int(self._rle.area(code)),
                    "bbox": self._rle.toBbox(code).tolist(),
                    "iscrowd": 0,
                }
            )
        image = {"file_name": name, "name": label.image_id, "height": height, "width": width}
        return image | {"annotations": annotations}

    def _file_name(self, file: Path) -> str:
        root = next((root for root in self._roots if file.is_relative_to(root)), None)
        return (file if root is None else file.relative_to(root)).as_posix()

    def finish(self) -> None:
        images: list[dict] = []
        annotations: list[dict] = []
        for number, entry in enumerate(self.entries(), 1):
            for annotation in entry.pop("annotations"):
                annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation})
            images.append({"id": number, **entry})
        _write_json(
            self.output_dir / "annotations" / f"instances_{self.split}.json",
            {
                "images": images,
                "annotations": annotations,
                "categories": [{"id": index, "name": name} for index, name in enumerate(self.class_names, 1)],
            },
        )


#: By the name the command line gives them.
FORMATS: dict[str, type[Format]] = {"png": PngFormat, "parquet": ParquetFormat, "coco-json": CocoFormat}


def _png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write_json(path: Path, value: Any) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
