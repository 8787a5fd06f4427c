"""Reading a dataset once from end to end, to find before training what would spoil it."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from cosa_hf.data.formats import Look, ValueRange
from cosa_hf.data.ground_truth import nothing_to_score
from cosa_hf.data.images import UnreadableImageError, from_all_over, ignored_id, look_at, read_mask, undecoded
from cosa_hf.data.negatives import NEGATIVE
from cosa_hf.data.options import PictureConfig
from cosa_hf.data.tag_text import combined_names
from cosa_hf.data.tags import class_names
from cosa_hf.data.value_range import LOOKED_AT, described, range_of
from cosa_hf.progress import progress as progress_bar

FEW_IMAGES = 20
"""Classes with fewer images than this are pointed out: little can be learned from them."""


DARK, FLAT = 0.1, 0.02
"""Shares of the value range: images whose brightest values are below the first are nearly black, and those whose values
lie closer together than the second nearly constant."""


class _Seen(NamedTuple):
    """What one image turned out to be."""

    image_id: str
    digest: str
    labels: list[int]
    problem: str  # why it, or its mask, cannot be read
    kind: str  # "unreadable" or "mask"
    in_mask: list[int] | None  # the ids in its mask; None without a mask
    look: Look | None
    negative: bool  # verified to show none of the classes


@dataclass
class Findings:
    """What `check_splits` found.

    Attributes:
        class_counts: split -> class -> images with that tag.
        images: split -> images.
        value_range: what the values of images with more than 8 bits are scaled from, "" if there are none.
        errors: what spoils training or evaluation, by kind; each a list of sentences that name the images.
        warnings: what may be intended, by kind.
        notes: what is meant and good to know, by kind.
    """

    class_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    value_range: str = ""
    errors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


ADVICE = {
    "unreadable": "replace these files, or remove them and their tags",
    "mask": "correct these masks: evaluation stops at them",
    "nothing to score": "evaluation refuses these masks",
    "window": "these files name no window: give the range of all images, --value_range LOW HIGH",
    "contradiction": "give equal images equal tags, or keep one; an image with several tags needs a metadata table",
    "leak": "take these images out of one of the splits: scores on images seen in training mean nothing",
    "unnamed": "no table names these images: they are not used",
    "duplicate": "training sees these images more often than others",
    "dark": "nearly black or constant: wrong files, or a --value_range that is not that of these images",
    "several": "pages or frames of which only the first is used: save the others as images of their own",
    "untagged": "training leaves these images out; for evaluation they are background",
    "negative": "marked as showing none of the classes; training learns from these what no class looks like",
    "missing tag": "the mask shows a class that the tags leave out: add the tag, or correct the mask",
    "missing pixels": "the tags name a class that the mask does not show: correct the mask, or remove the tag",
    "combined": "these classes are made of the words of others; if blanks separate your tags, rename the table to "
    "export.csv, and then `cosa-hf import csv export.csv --tag_separator ' ' --output metadata.csv`",
    "number": "a class that is called by a number: is it an id? write the name of the class",
    "few images": f"fewer than {FEW_IMAGES} images: find more, or take the tag off them",
}
"""What to do about each kind of finding."""


def check_splits(
    splits: Mapping[str, Dataset],
    num_workers: int = 0,
    progress: bool = True,
    pictures: PictureConfig | None = None,
) -> Findings:
    """Read every image (and mask) of some splits once.

    Images are equal if their files are, byte for byte.

    Args:
        splits: name -> dataset of this package's form, with the same classes; with a `mask` column its masks are
            compared with the tags.
        num_workers: processes that read, 0: this one.
        progress: show a bar on stderr.
        pictures: value range and bands; by default a range is found over the first split, as training finds it.

    Raises:
        ValueError: splits with different classes.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> split = load_shapes("val", num_images=3, masks=True)
        >>> findings = check_splits({"train": split, "val": split}, progress=False)
        >>> list(findings.errors), len(findings.errors["leak"])
        (['leak'], 3)
    """
    names: list[str] = []
    found, pictures = Findings(), pictures or PictureConfig()
    value_range: Any = pictures.asked_range
    places: dict[str, list[tuple[str, _Seen]]] = defaultdict(list)  # content -> where it lies
    for split, dataset in splits.items():
        names = names or class_names(dataset)
        if class_names(dataset) != names:
            raise ValueError(
                f"split {split!r} has the classes {class_names(dataset)}, another one {names}: give both the same "
                "--classes"
            )
        counts: Counter = Counter()
        in_masks: set[int] = set()
        tagged: dict[int, list[str]] = defaultdict(list)  # of images with a mask
        reading, looks = _read(dataset, num_workers, pictures), []
        for seen in progress_bar(reading, f"check {split}", len(dataset), unit="image", disable=not progress):
            counts.update(seen.labels)
            _judge(found, split, seen, names, places)
            looks.append(seen.look)
            if seen.in_mask is not None:
                in_masks.update(seen.in_mask)
                for label in seen.labels:
                    tagged[label].append(seen.image_id)
        if in_masks and (reasons := nothing_to_score(in_masks, tagged, names)):
            found.errors["nothing to score"] += [f"{split}: {reason}" for reason in reasons]
        if value_range == "auto":
            value_range = range_of(
                look for index in from_all_over(len(looks), LOOKED_AT) if (look := looks[index]) is not None
            )
        if value_range is not None and any(look and look.deep for look in looks):
            found.value_range = described(value_range)
        _judge_looks(found, [f"{split}: {image_id}" for image_id in dataset["image_id"][:]], looks, value_range)
        found.images[split] = len(dataset)
        found.class_counts[split] = {name: counts[index] for index, name in enumerate(names)}
    _compare(found, places, names)
    for name, words in combined_names(names).items():
        found.warnings["combined"].append(f"class {name!r}: {' + '.join(words)}")
    for name in names:
        total = sum(count[name] for count in found.class_counts.values())
        if total < FEW_IMAGES:
            found.warnings["few images"].append(f"class {name!r}: {total}")
        if name.isdigit():
            found.warnings["number"].append(f"class {name!r}")
    return found


def format_findings(found: Findings, shown: int = 10) -> str:
    """Findings as a table of class counts and what to do, naming the first `shown` images of each kind.

    Example:
        >>> print(format_findings(Findings({"train": {"cat": 2}}, {"train": 2})))
        class   train
        cat         2
        images      2
        no errors
    """
    width = max(len(name) for name in ["images", *next(iter(found.class_counts.values()))])
    splits = list(found.images)
    rows: list[tuple[str, list]] = [("class", splits)]
    rows += [(name, [found.class_counts[split][name] for split in splits]) for name in found.class_counts[splits[0]]]
    rows += [("images", [found.images[split] for split in splits])]
    lines = [
        "  ".join(
            [name.ljust(width), *(str(cell).rjust(max(5, len(s))) for s, cell in zip(splits, cells, strict=True))]
        )
        for name, cells in rows
    ]
    if found.value_range:
        lines.append(f"images with more than 8 bits are scaled as with {found.value_range}")
    for verdict, kinds in (("error", found.errors), ("warning", found.warnings), ("note", found.notes)):
        for kind, items in kinds.items():
            lines.append(f"{verdict}  {kind}, {len(items)}: {ADVICE[kind]}")
            lines += [f"      {item}" for item in items[:shown]]
            if len(items) > shown:
                lines.append(f"      ... and {len(items) - shown} more")
    if not found.errors:
        lines.append("no errors")
    return "\n".join(lines)


def _judge(
    found: Findings, split: str, seen: _Seen, names: list[str], places: dict[str, list[tuple[str, _Seen]]]
) -> None:
    """What is to be said about one image by itself."""
    where = f"{split}: {seen.image_id}"
    if seen.problem:
        found.errors[seen.kind].append(f"{split}: {seen.problem}")
        return
    places[seen.digest].append((split, seen))
    if seen.negative:
        found.notes["negative"].append(where)
    elif not seen.labels:
        found.warnings["untagged"].append(where)
    if seen.in_mask is None:
        return
    shown = {index - 1 for index in seen.in_mask if index not in (0, ignored_id(len(names)))}
    for index in sorted(shown - set(seen.labels)):
        found.warnings["missing tag"].append(f"{where}: {names[index]}")
    for index in sorted(set(seen.labels) - shown):
        found.warnings["missing pixels"].append(f"{where}: {names[index]}")


def _judge_looks(found: Findings, places: list[str], looks: list[Look | None], value_range: ValueRange) -> None:
    """What is to be said of the values of a split's images, now that their range is known."""
    for place, look in zip(places, looks, strict=True):
        if look is None:
            continue
        if look.deep and value_range == "window" and look.window is None:
            found.errors["window"].append(place)
        low, high = look.window or (0.0, 255.0)
        if look.deep and isinstance(value_range, tuple):
            low, high = value_range
        if look.high - low < DARK * (high - low) or look.high - look.low < FLAT * (high - low):
            found.warnings["dark"].append(f"{place}: values {look.low:g} to {look.high:g}")
        if look.several:
            found.warnings["several"].append(place)


def _compare(found: Findings, places: dict[str, list[tuple[str, _Seen]]], names: list[str]) -> None:
    """What is to be said about images with equal content."""
    for equal in places.values():
        if len(equal) == 1:
            continue
        described = " = ".join(
            f"{split}: {seen.image_id} [{', '.join(names[index] for index in seen.labels)}]" for split, seen in equal
        )
        if len({tuple(seen.labels) for _, seen in equal}) > 1:
            found.errors["contradiction"].append(described)
        if len({split for split, _ in equal}) > 1:
            found.errors["leak"].append(described)
        elif "contradiction" not in found.errors or found.errors["contradiction"][-1] != described:
            found.warnings["duplicate"].append(described)


class _Reading(torch.utils.data.Dataset):
    """Row by row, what `_Seen` says of it."""

    def __init__(self, dataset: Dataset, pictures: PictureConfig):
        self.dataset = undecoded(dataset)
        self.bands = None if pictures.bands is None else tuple(pictures.bands)
        self.num_classes = len(class_names(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Seen:
        row = self.dataset[index]
        digest, problem, kind, in_mask, look = "", "", "unreadable", None, None
        try:
            content = _content(row)
            digest = hashlib.sha256(content).hexdigest()
            look = look_at(row | {"image": row["image"] | {"bytes": content}}, self.bands)
            kind = "mask"
            if "mask" in row:
                ids = np.asarray(read_mask(row, look.size, self.num_classes))
                in_mask = [int(i) for i in np.unique(ids)]
        except UnreadableImageError as error:
            problem = str(error)
        return _Seen(row["image_id"], digest, row["labels"], problem, kind, in_mask, look, bool(row.get(NEGATIVE)))


def _content(row: dict[str, Any]) -> bytes:
    """The bytes of an image file, read once for both digest and decoding."""
    value = row["image"]
    if value is None:
        raise UnreadableImageError(f"image {row['image_id']!r} has no picture: the row is empty; remove it")
    if value.get("bytes") is not None:
        return value["bytes"]
    try:
        return Path(value["path"]).read_bytes()
    except (OSError, KeyError, TypeError) as error:
        raise UnreadableImageError(f"cannot read the image of image {row['image_id']!r}: {error}") from error


def _read(dataset: Dataset, num_workers: int, pictures: PictureConfig) -> Iterator[_Seen]:
    for batch in DataLoader(_Reading(dataset, pictures), batch_size=16, collate_fn=list, num_workers=num_workers):
        yield from batch


__all__ = ["ADVICE", "Findings", "check_splits", "format_findings"]
