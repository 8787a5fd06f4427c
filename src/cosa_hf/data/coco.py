"""MS-COCO 2014 in the layout of its official zips."""

import json
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from cosa_hf.data.palette import to_palette_image
from cosa_hf.data.tags import list_some, name_some, tag_features
from cosa_hf.files import remove_unfinished, whole_file
from cosa_hf.progress import progress

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
"""The 80 classes in the order of COCO's category ids; those have gaps (1..90), ids in masks have none (1..80)."""


def load_coco(data_dir: str | Path, split: str, masks: bool = False) -> Dataset:
    """Images and tags of a COCO split; masks only if asked for.

    Reads ``annotations/instances_<split>.json`` and ``<split>/<file name>``. The tags of an image are the classes of
    its annotations, crowd regions included; an image without annotations has none (training leaves it out and counts
    it). Masks come from ``masks/<split>/<image id>.png``, which `cosa-hf convert coco-masks` writes once. Without
    `masks` they are not opened or looked for. Image files are opened when a row is read, not here.

    Args:
        data_dir: the directory with ``annotations``, ``train2014`` and ``val2014``.
        split: "train2014" or "val2014", or any other with its JSON and directory.
        masks: add the column `mask`.

    Returns:
        Dataset with `image`, `labels` (ids into `COCO_CLASSES`, sorted; may be empty), `image_id` (the file name
        without ending) and, if asked for, `mask` (0 background, 1..80), in the order of the JSON.

    Raises:
        FileNotFoundError: the directory, the JSON, an image or a mask is missing.
        ValueError: the JSON cannot be read, lists an image twice, has images that share an id or a name without
            ending, annotations of no image in it, or classes other than COCO's.

    Example:
        >>> dataset = load_coco("coco", "train2014")  # doctest: +SKIP
        >>> dataset[0]["image_id"]  # doctest: +SKIP
        'COCO_train2014_000000057870'
    """
    root = Path(data_dir).absolute()
    instances = read_instances(root, split)
    files = [image["file_name"] for image in instances.images]
    image_ids = [Path(file).stem for file in files]
    columns: dict[str, list] = {
        "image": _paths(root / split, files, f"the images of {split}.zip"),
        "labels": [sorted({label for label, _ in instances.objects[image["id"]]}) for image in instances.images],
        "image_id": image_ids,
    }
    if masks:
        command = f"cosa-hf convert coco-masks --data_dir {data_dir} --split {split}"
        columns["mask"] = _paths(
            root / "masks" / split, [f"{image_id}.png" for image_id in image_ids], f"the masks that `{command}` writes"
        )
    return Dataset.from_dict(columns, features=tag_features(list(COCO_CLASSES), masks))


class Instances(NamedTuple):
    """What an instances JSON says.

    Attributes:
        images: as in the JSON: dicts with id, file_name, width and height.
        objects: image id -> [(label, annotation)], label an index into `COCO_CLASSES`.
    """

    images: list[dict[str, Any]]
    objects: dict[int, list[tuple[int, dict[str, Any]]]]


def read_instances(root: Path, split: str) -> Instances:
    """Parse ``annotations/instances_<split>.json``.

    Raises:
        FileNotFoundError, ValueError: as `load_coco`.
    """
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        available = sorted(file.stem.removeprefix("instances_") for file in path.parent.glob("instances_*.json"))
        raise FileNotFoundError(
            f"no {path}; splits found: {', '.join(available) or 'none'} (expected COCO's annotations/, train2014/ and "
            "val2014/, unzipped side by side)"
        )
    by_id: dict[Any, list[str]] = defaultdict(list)
    by_name: dict[str, list[str]] = defaultdict(list)
    objects: dict[int, list] = defaultdict(list)
    strays = []
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        images, categories = content["images"], content["categories"]
        labels = {name: label for label, name in enumerate(COCO_CLASSES)}
        label_of = {category["id"]: labels.get(category["name"]) for category in categories}
        foreign = [str(category["name"]) for category in categories if category["name"] not in labels]
        for image in images:
            by_id[image.get("id")].append(image["file_name"])
            by_name[Path(image["file_name"]).stem].append(image["file_name"])
        for annotation in content["annotations"]:
            image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
            if image_id in by_id and category_id in label_of:
                objects[image_id].append((label_of[category_id], annotation))
            else:
                strays.append(f"{annotation.get('id')} with image_id {image_id!r} and category_id {category_id!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an instances file of COCO: {type(error).__name__}: {error}") from error
    if not images:
        raise ValueError(f"{path} lists no images")
    if foreign:
        raise ValueError(
            f"{path} is not an instances file of COCO, which has no category {list_some(foreign)}: classes of your own "
            f"go through `cosa-hf import coco {path} --output {root / 'metadata.csv'}` and --dataset folder"
        )
    if None in by_id:
        raise ValueError(f"{path} has {name_some(by_id[None], 'image')} without id")
    twice = [file for file, count in Counter(image["file_name"] for image in images).items() if count > 1]
    if twice:
        raise ValueError(f"{path} lists {name_some(twice, 'image')} more than once")
    # Annotations find their image by its id; masks and results bear its name without the ending.
    for what, holders in (("id", by_id), ("name", by_name)):
        shared = [f"{key} of {' and '.join(files)}" for key, files in holders.items() if len(files) > 1]
        if shared:
            raise ValueError(f"{path} gives {name_some(shared, what)} to more than one image: each needs its own")
    if strays:
        raise ValueError(
            f"{path} has {name_some(strays, 'annotation')} of an image or category that it does not list: ids must be "
            "equal in type too"
        )
    return Instances(images, objects)


def render_mask(height: int, width: int, objects: list[tuple[int, dict[str, Any]]]) -> np.ndarray:
    """The class ids of an image's pixels, (height, width) uint8, from its annotations.

    Where annotations overlap, the one with the smaller `area` is on top: the cup on the table, the tie on the person.
    Of equal areas the later one in the JSON is below. Crowd regions count like any other object, with their class
    and their area. This is the order of the masks that the literature evaluates on (coco2voc).

    Args:
        height, width: of the image, pixels.
        objects: (label, annotation) pairs; an annotation has `area` and `segmentation` (polygons or RLE).

    Raises:
        ImportError: pycocotools, which turns polygons into pixels, is not installed.
        ValueError: an annotation without area, or with a segmentation that is empty, broken or of another size than
            the image; names it.

    Example:
        >>> square = {"area": 4.0, "segmentation": [[1, 1, 3, 1, 3, 3, 1, 3]]}
        >>> render_mask(4, 4, [(16, square)]).tolist()
        [[0, 0, 0, 0], [0, 17, 17, 0], [0, 17, 17, 0], [0, 0, 0, 0]]
    """
    try:
        from pycocotools import mask as rle
    except ImportError as error:
        raise ImportError('masks of COCO need pycocotools: pip install "cosa-hf[coco]"') from error

    ids = np.zeros((height, width), dtype=np.uint8)
    unsorted = [str(one.get("id")) for _, one in objects if not isinstance(one.get("area"), int | float)]
    if unsorted:
        raise ValueError(f"{name_some(unsorted, 'annotation')} without a number as area, which says what is on top")
    for label, annotation in sorted(objects, key=lambda one: one[1]["area"])[::-1]:
        try:
            region = annotation["segmentation"]
            if not any(region):
                raise ValueError("its segmentation is empty; remove the annotation or draw its outline")
            if isinstance(region, list) or isinstance(region["counts"], list):
                region = rle.frPyObjects(region, height, width)
            if isinstance(region, list):
                region = rle.merge(region)
            if list(region["size"]) != [height, width]:
                raise ValueError(f"its RLE has the size {region['size']}, the image {[height, width]}")
            ids[rle.decode(region) == 1] = label + 1
        except Exception as error:  # pycocotools raises no narrower one
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"annotation {annotation.get('id')} cannot be drawn: {reason}") from error
    return ids


class WrittenMasks(NamedTuple):
    """What `write_masks` did.

    Attributes:
        directory: where the masks are.
        images: of the split.
        written: how many masks were written; those of the other images were there before.
        untagged: images without an annotation.
    """

    directory: Path
    images: int
    written: int
    untagged: int


def write_masks(root: Path, split: str, num_workers: int | None = None) -> WrittenMasks:
    """Write the masks of a split as palette PNGs where `load_coco` looks for them; those that are there stay.

    Args:
        root: the directory with ``annotations``.
        split: as for `load_coco`.
        num_workers: processes that draw; None: one for each core.

    Raises:
        FileNotFoundError, ValueError: as `load_coco`, or an image has no size or a mask cannot be drawn.
        ImportError: pycocotools is not installed.
    """
    instances = read_instances(root, split)
    sizeless = [
        image["file_name"]
        for image in instances.images
        if not all(isinstance(image.get(side), int) for side in ("height", "width"))
    ]
    if sizeless:
        raise ValueError(f"the annotations give no height and width for {name_some(sizeless, 'image')}")
    directory = root / "masks" / split
    directory.mkdir(parents=True, exist_ok=True)
    remove_unfinished(directory)
    present = {path.stem for path in directory.glob("*.png")}
    images = [image for image in instances.images if Path(image["file_name"]).stem not in present]
    targets = [directory / f"{Path(image['file_name']).stem}.png" for image in images]
    sizes = [(image["height"], image["width"]) for image in images]
    objects = [instances.objects.get(image["id"], []) for image in images]
    with ProcessPoolExecutor(num_workers) as pool:
        for _ in progress(pool.map(_write_mask, targets, sizes, objects, chunksize=32), "masks", len(targets), "mask"):
            pass
    untagged = sum(not instances.objects.get(image["id"]) for image in instances.images)
    return WrittenMasks(directory, len(instances.images), len(targets), untagged)


def _write_mask(target: Path, size: tuple[int, int], objects: list) -> None:
    try:
        mask = render_mask(*size, objects)
    except ValueError as error:
        raise ValueError(f"no mask for {target.stem}: {error}") from error
    with whole_file(target) as unfinished:
        to_palette_image(mask).save(unfinished, "PNG")


def _paths(directory: Path, files: list[str], what: str) -> list[str]:
    present = {file.name for file in directory.iterdir()} if directory.is_dir() else set()
    missing = [file for file in files if file not in present]
    if missing:
        raise FileNotFoundError(f"{directory} lacks {name_some(missing, 'file')} of {len(files)}: expected {what}")
    return [str(directory / file) for file in files]


__all__ = ["COCO_CLASSES", "Instances", "WrittenMasks", "load_coco", "read_instances", "render_mask", "write_masks"]
