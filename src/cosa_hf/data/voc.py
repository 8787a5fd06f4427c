"""PASCAL VOC 2012 in its official layout."""

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from datasets import Dataset

from cosa_hf.data.tags import name_some, parse_json, parse_tags, read_text, tag_features, tag_ids

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

VOC_COEXISTENCE = ("aeroplane", "bird", "boat", "train")
"""Classes usually seen with the same surroundings (sky, branches, water, railways): paper, Fig. 8."""


def load_voc(data_dir: str | Path, split: str, masks: bool = False) -> Dataset:
    """Images and tags of a VOC 2012 segmentation split; masks only if asked for.

    The classes are `VOC_CLASSES`, or the lines of ``classes.txt`` that are not blank where the directory has one, as an
    export of other classes does.

    Reads ``ImageSets/Segmentation/<split>.txt`` and ``JPEGImages/<id>.jpg``. Tags come from
    ``image_labels.json`` (image id -> list of class names) where the directory has one, otherwise from the
    object names in ``Annotations/<id>.xml``, objects marked "difficult" included: they are in the image and
    in the masks. Masks come from ``SegmentationClassAug`` where it exists, otherwise from
    ``SegmentationClass``. Without `masks` no mask file is opened or looked for. Image files are opened when a
    row is read, not here.

    VOC has no list "train_aug". Where the directory has none either, it is made from the lists of SBD, if
    ``benchmark_RELEASE/dataset/{train,val}.txt`` of its download lies inside the directory: VOC's train and all of SBD
    without VOC's val, 10,582 images. (SBD's own masks are MATLAB files, which are not read: masks of these images, for
    supervised bounds, must be in ``SegmentationClassAug``.)

    Args:
        data_dir: the ``VOC2012`` directory itself.
        split: name of a list, e.g. "train_aug" or "val".
        masks: add the column `mask`.

    Returns:
        Dataset with `image`, `labels` (ids into the classes, sorted; may be empty), `image_id` and, if asked
        for, `mask` (0 background, 1..C, 255 ignore), in the order of the list.

    Raises:
        FileNotFoundError: the directory, the list, an image, its tags or its mask is missing.
        ValueError: the list is empty or names an image twice, a tag file is malformed, or a tag is not a class.

    Example:
        >>> dataset = load_voc("VOCdevkit/VOC2012", "train_aug")  # doctest: +SKIP
        >>> dataset[0]["image_id"], dataset[0]["labels"]  # doctest: +SKIP
        ('2007_000032', [0, 14])
    """
    root = Path(data_dir).absolute()
    _check_layout(root)
    image_ids = _read_list(root, split)
    classes = _read_classes(root)
    image_paths = _paths(root / "JPEGImages", image_ids, ".jpg", split)
    columns: dict[str, list] = {
        "image": image_paths,
        "labels": _read_tags(root, image_ids, classes),
        "image_id": image_ids,
    }
    if masks:
        augmented = root / "SegmentationClassAug"
        directory = augmented if augmented.is_dir() else root / "SegmentationClass"
        columns["mask"] = _paths(directory, image_ids, ".png", split)
    return Dataset.from_dict(columns, features=tag_features(classes, masks))


def _check_layout(root: Path) -> None:
    if (root / "ImageSets" / "Segmentation").is_dir():
        return
    if not root.is_dir():
        raise FileNotFoundError(f"no directory {root}: pass the VOC2012 directory of the extracted download")
    hint = ""
    for below in (root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if below.is_dir():
            hint = f"; found {below}: pass that"
    raise FileNotFoundError(
        f"{root} is not a VOC2012 directory: it has no ImageSets/Segmentation (expected ImageSets/Segmentation, "
        f"JPEGImages and Annotations or image_labels.json){hint}"
    )


def _read_list(root: Path, split: str) -> list[str]:
    directory = root / "ImageSets" / "Segmentation"
    path = directory / f"{split}.txt"
    sbd = root / "benchmark_RELEASE" / "dataset"
    if split == "train_aug" and not path.is_file() and sbd.is_dir():
        return _train_aug(directory, sbd)
    if not path.is_file():
        available = sorted(file.stem for file in directory.glob("*.txt"))
        hint = f" (or put SBD's benchmark_RELEASE into {root})" if split == "train_aug" else ""
        raise FileNotFoundError(f"no list {path}; available splits: {', '.join(available) or 'none'}{hint}")
    image_ids = read_text(path).split()
    if not image_ids:
        raise ValueError(f"{path} is empty: split {split!r} has no images")
    twice = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
    if twice:
        raise ValueError(f"{path} names {name_some(twice, 'image')} more than once")
    return image_ids


def _train_aug(directory: Path, sbd: Path) -> list[str]:
    """The usual training list: everything that VOC and SBD have masks for, without VOC's val."""
    lists = {
        path: set(read_text(path).split()) if path.is_file() else None
        for path in (directory / "train.txt", sbd / "train.txt", sbd / "val.txt", directory / "val.txt")
    }
    missing = [str(path) for path, image_ids in lists.items() if image_ids is None]
    if missing:
        raise FileNotFoundError(f"split 'train_aug' is made from four lists; missing {', '.join(missing)}")
    *training, validation = (image_ids or set() for image_ids in lists.values())
    return sorted(set().union(*training) - validation)


def _read_classes(root: Path) -> list[str]:
    path = root / "classes.txt"
    if not path.is_file():
        return list(VOC_CLASSES)
    classes = parse_tags(read_text(path).splitlines())
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise ValueError(f"{path} has {name_some(twice, 'class')} more than once: leave one line of each")
    return classes


def _paths(directory: Path, image_ids: list[str], suffix: str, split: str) -> list[str]:
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {directory}: split {split!r} needs its {suffix} files")
    # One listing instead of a stat per file: data sets live on network drives too.
    present = {file.name for file in directory.iterdir()}
    missing = [image_id + suffix for image_id in image_ids if image_id + suffix not in present]
    if missing:
        raise FileNotFoundError(f"{directory} lacks {name_some(missing, 'file')} that split {split!r} names")
    return [str(directory / (image_id + suffix)) for image_id in image_ids]


def _read_tags(root: Path, image_ids: list[str], classes: list[str]) -> list[list[int]]:
    source = root / "image_labels.json"
    names = _tags_from_json(source, image_ids) if source.is_file() else _tags_from_xml(root, image_ids)
    found: dict[str, None] = {}
    for image_id, image_names in zip(image_ids, names, strict=True):
        try:
            found |= dict.fromkeys(parse_tags(image_names))
        except ValueError as error:
            raise ValueError(f"{source if source.is_file() else root}, image {image_id!r}: {error}") from error
    foreign = [name for name in found if name not in classes]
    if foreign and not (root / "classes.txt").is_file():
        raise ValueError(
            f"{root} has {name_some(foreign, 'tag')} that are not classes of VOC: if they are your own, write their "
            f"names, one a line, into {root / 'classes.txt'}"
        )
    return tag_ids([parse_tags(image_names) for image_names in names], classes, image_ids)


def _tags_from_json(path: Path, image_ids: list[str]) -> list[list[str]]:
    tags = parse_json(read_text(path), path)
    if not isinstance(tags, dict):
        raise ValueError(f"{path} holds a {type(tags).__name__}: expected an object, image id -> list of class names")
    missing = [image_id for image_id in image_ids if image_id not in tags]
    if missing:
        raise ValueError(f"{path} has no entry for {name_some(missing, 'image')}; an image without classes needs []")
    malformed = [
        image_id
        for image_id in image_ids
        if not isinstance(tags[image_id], list) or not all(isinstance(name, str) for name in tags[image_id])
    ]
    if malformed:
        raise ValueError(f"{path}: expected a list of class names for {name_some(malformed, 'image')}")
    return [tags[image_id] for image_id in image_ids]


def _tags_from_xml(root: Path, image_ids: list[str]) -> list[list[str]]:
    directory = root / "Annotations"
    if not directory.is_dir():
        raise FileNotFoundError(f"{root} has neither image_labels.json nor Annotations/: no tags to read")
    present = {file.name for file in directory.iterdir()}
    missing = [image_id for image_id in image_ids if f"{image_id}.xml" not in present]
    if missing:
        raise FileNotFoundError(f"{directory} has no tags (.xml) for {name_some(missing, 'image')}")
    names = []
    for image_id in image_ids:
        path = directory / f"{image_id}.xml"
        try:
            annotation = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{path} is not valid XML: {error}") from error
        # Direct children only: the body parts of a person have names too.
        names.append([element.text or "" for element in annotation.findall("object/name")])
    return names
