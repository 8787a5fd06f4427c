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

from cosa_hf.data.images import IGNORE_INDEX, UnreadableImageError, read_image, read_mask, undecoded
from cosa_hf.data.negatives import NEGATIVE
from cosa_hf.data.tags import class_names
from cosa_hf.progress import progress as progress_bar

FEW_IMAGES = 20
"""Classes with fewer images than this are pointed out: little can be learned from them."""


class _Seen(NamedTuple):
    """What one image turned out to be."""

    image_id: str
    digest: str
    labels: list[int]
    problem: str  # why it, or its mask, cannot be read
    kind: str  # "unreadable" or "mask"
    in_mask: list[int] | None  # the tags that its mask has pixels of; None without a mask
    negative: bool  # verified to show none of the classes


@dataclass
class Findings:
    """What `check_splits` found.

    Attributes:
        class_counts: split -> class -> images with that tag.
        images: split -> images.
        errors: what spoils training or evaluation, by kind; each a list of sentences that name the images.
        warnings: what may be intended, by kind.
        notes: what is meant and good to know, by kind.
    """

    class_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


ADVICE = {
    "unreadable": "replace these files, or remove them and their tags",
    "mask": "correct these masks: evaluation stops at them",
    "contradiction": "give equal images equal tags, or keep one; an image with several tags needs a metadata table",
    "leak": "take these images out of one of the splits: scores on images seen in training mean nothing",
    "unnamed": "no table names these images: they are not used",
    "duplicate": "training sees these images more often than others",
    "untagged": "training leaves these images out; for evaluation they are background",
    "negative": "marked as showing none of the classes; training learns from these what no class looks like",
    "missing tag": "the mask shows a class that the tags leave out: add the tag, or correct the mask",
    "missing pixels": "the tags name a class that the mask does not show: correct the mask, or remove the tag",
    "few images": f"fewer than {FEW_IMAGES} images: find more, or leave the class out",
}
"""What to do about each kind of finding."""


def check_splits(splits: Mapping[str, Dataset], num_workers: int = 0, progress: bool = True) -> Findings:
    """Read every image (and mask) of some splits once.

    Images are equal if their files are, byte for byte.

    Args:
        splits: name -> dataset of this package's form, with the same classes; with a `mask` column its masks are
            compared with the tags.
        num_workers: processes that read, 0: this one.
        progress: show a bar on stderr.

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
    found = Findings()
    places: dict[str, list[tuple[str, _Seen]]] = defaultdict(list)  # content -> where it lies
    for split, dataset in splits.items():
        names = names or class_names(dataset)
        if class_names(dataset) != names:
            raise ValueError(
                f"split {split!r} has the classes {class_names(dataset)}, another one {names}: fix --classes"
            )
        counts: Counter = Counter()
        reading = _read(dataset, num_workers)
        for seen in progress_bar(reading, f"check {split}", len(dataset), unit="image", disable=not progress):
            counts.update(seen.labels)
            _judge(found, split, seen, names, places)
        found.images[split] = len(dataset)
        found.class_counts[split] = {name: counts[index] for index, name in enumerate(names)}
    _compare(found, places, names)
    for name in names:
        total = sum(count[name] for count in found.class_counts.values())
        if total < FEW_IMAGES:
            found.warnings["few images"].append(f"class {name!r}: {total}")
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
    for index in sorted(set(seen.in_mask) - set(seen.labels)):
        found.warnings["missing tag"].append(f"{where}: {names[index]}")
    for index in sorted(set(seen.labels) - set(seen.in_mask)):
        found.warnings["missing pixels"].append(f"{where}: {names[index]}")


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

    def __init__(self, dataset: Dataset):
        self.dataset = undecoded(dataset)
        self.num_classes = len(class_names(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Seen:
        row = self.dataset[index]
        digest, problem, kind, in_mask = "", "", "unreadable", None
        try:
            content = _content(row)
            digest = hashlib.sha256(content).hexdigest()
            image = read_image(row | {"image": row["image"] | {"bytes": content}})
            kind = "mask"
            if "mask" in row:
                ids = np.asarray(read_mask(row, image.size, self.num_classes))
                in_mask = [int(i) - 1 for i in np.unique(ids) if i not in (0, IGNORE_INDEX)]
        except UnreadableImageError as error:
            problem = str(error)
        return _Seen(row["image_id"], digest, row["labels"], problem, kind, in_mask, bool(row.get(NEGATIVE)))


def _content(row: dict[str, Any]) -> bytes:
    """The bytes of an image file, read once for both digest and decoding."""
    value = row["image"] or {}
    if value.get("bytes") is not None:
        return value["bytes"]
    try:
        return Path(value["path"]).read_bytes()
    except (OSError, KeyError, TypeError) as error:
        raise UnreadableImageError(f"cannot read the image of image {row['image_id']!r}: {error}") from error


def _read(dataset: Dataset, num_workers: int) -> Iterator[_Seen]:
    for batch in DataLoader(_Reading(dataset), batch_size=16, collate_fn=list, num_workers=num_workers):
        yield from batch


__all__ = ["ADVICE", "Findings", "check_splits", "format_findings"]
