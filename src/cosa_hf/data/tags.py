"""What a tagged dataset looks like: its columns, its class names, its tags as files say them and as vectors."""

import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value

from cosa_hf.data.tag_text import as_tag, names_in


def tag_features(class_names: list[str], masks: bool = False, negatives: bool = False) -> Features:
    """Columns shared by every dataset of this package.

    Args:
        class_names: the C foreground classes. Tag ``c`` is ``class_names[c]`` and has id ``c + 1`` in a mask.
        masks: add the `mask` column (ids 0 for background, 1..C, 255 for ignore).
        negatives: add the `negative` column, true of images that show none of the classes (`data.negatives`).

    Example:
        >>> list(tag_features(["cat", "dog"]))
        ['image', 'labels', 'image_id']
    """
    features = {
        "image": Image(),
        "labels": List(ClassLabel(names=list(class_names))),
        "image_id": Value("string"),
    }
    if masks:
        features["mask"] = Image()
    if negatives:
        features["negative"] = Value("bool")
    return Features(features)


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without the signature that Excel and Notepad put before it.

    Raises:
        ValueError: it is in another encoding; names the file and the line.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} cannot be read: save the file as UTF-8 ({error})") from error


def parse_json(text: str, where: str | Path) -> Any:
    """JSON in which no object has a key twice: `json` alone would keep the last value and drop the others silently.

    Raises:
        ValueError: a key that occurs twice, or no JSON; begins with `where`.

    Example:
        >>> parse_json('{"a.jpg": ["cat"], "a.jpg": ["dog"]}', "tags.json")
        Traceback (most recent call last):
        ValueError: tags.json cannot be read: the key 'a.jpg' occurs twice: join what they say under one
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise ValueError(f"the key {key!r} occurs twice: join what they say under one")
            content[key] = value
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def composed(name: str) -> str:
    """A name in Unicode's composed form, in which names are compared: macOS writes decomposed ones.

    Example:
        >>> composed("cafe\\N{COMBINING ACUTE ACCENT}") == "caf\\N{LATIN SMALL LETTER E WITH ACUTE}"
        True
    """
    return unicodedata.normalize("NFC", name)


def parse_tags(value: Any) -> list[str]:
    """Tags as people write them: a list of names, or one text as `names_in` reads it.

    Names are `as_tag` makes them, and `composed`. None and "" mean no tags.

    Raises:
        ValueError: neither text nor a list of texts, or a text that cannot be the name of a class.

    Example:
        >>> parse_tags("traffic light; car "), parse_tags([" cat"]), parse_tags("['cat', 'dog']"), parse_tags(None)
        (['traffic light', 'car'], ['cat'], ['cat', 'dog'], [])
    """
    if value is None:
        return []
    if isinstance(value, dict) and list(value) == ["choices"]:  # as Label Studio writes several
        value = value["choices"]
    names = names_in(value) if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"tags must be text or a list of texts, got {value!r}")
    return [tag for name in names if (tag := as_tag(composed(name)))]


def tag_ids(tags: Sequence[Sequence[str]], classes: Sequence[str], image_ids: Sequence[str]) -> list[list[int]]:
    """Ids of every image's tags, sorted, each once.

    Case counts: "Cat" is not "cat", and the error says which class was probably meant.

    Raises:
        ValueError: tags that are not classes; names all of them and images that have them.

    Example:
        >>> tag_ids([["dog", "cat", "dog"], []], ["cat", "dog"], ["photo", "sky"])
        [[0, 1], []]
    """
    ids = {composed(name): index for index, name in enumerate(classes)}
    tags = [[composed(tag) for tag in image_tags] for image_tags in tags]
    unknown: dict[str, list[str]] = {}
    for image_tags, image_id in zip(tags, image_ids, strict=True):
        for tag in image_tags:
            if tag not in ids:
                unknown.setdefault(tag, []).append(image_id)
    if unknown:
        folded = {name.casefold(): name for name in classes}
        problems = []
        for tag, images in unknown.items():
            near = difflib.get_close_matches(tag.casefold(), folded, n=1)
            meant = f" (did you mean {folded[near[0]]!r}?)" if near else ""
            problems.append(f"{tag!r}{meant} of {name_some(images, 'image')}")
        raise ValueError(f"tags that are not classes: {'; '.join(problems)}. The classes are {', '.join(classes)}")
    return [sorted({ids[tag] for tag in image_tags}) for image_tags in tags]


LONGEST_ID = 240
"""Bytes of an image's id: masks are files of its name, and file systems allow 255 with what comes after it."""


def check_image_ids(image_ids: Iterable[str]) -> None:
    """Refuse ids that could not be the names of files, before there is anything to write.

    Raises:
        ValueError: an id that is too long; blanks and slashes count three bytes, as exports write them.

    Example:
        >>> check_image_ids(["a" * 300])
        Traceback (most recent call last):
        ValueError: the id 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...' has 300 bytes, and files are named by it: ...
    """
    for image_id in image_ids:
        size = len(re.sub(r"[%/\\\s]", "%20", image_id).encode("utf-8", "surrogatepass"))
        if size > LONGEST_ID:
            raise ValueError(
                f"the id '{image_id[:40]}...' has {size} bytes, and files are named by it: at most {LONGEST_ID}; "
                "shorten the name of the file or of the directories that it is in"
            )


def collect_classes(tags: Iterable[Iterable[str]]) -> list[str]:
    """All tags that occur, sorted: the classes of a dataset that does not list them.

    Raises:
        ValueError: there are none, or two differ in case, or in the width of letters, alone.

    Example:
        >>> collect_classes([["dog", "cat"], [], ["dog"]])
        ['cat', 'dog']
    """
    counts = Counter(tag for image_tags in tags for tag in image_tags)
    if not counts:
        raise ValueError("no image has a tag: there are no classes")
    spellings: dict[str, str] = {}
    for tag in sorted(counts):
        other = spellings.setdefault(unicodedata.normalize("NFKC", tag).casefold(), tag)
        if other != tag:
            raise ValueError(
                f"the tags {other!r} (images: {counts[other]}) and {tag!r} (images: {counts[tag]}) differ in case or "
                "width alone: write one of them everywhere"
            )
    return sorted(counts)


def class_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the C foreground classes, in tag order.

    Raises:
        ValueError: the dataset has no `labels` column of type ``List(ClassLabel)``.

    Example:
        >>> examples = {"image": [], "labels": [], "image_id": []}
        >>> class_names(Dataset.from_dict(examples, features=tag_features(["cat", "dog"])))
        ['cat', 'dog']
    """
    labels = (dataset.features or {}).get("labels")
    if not isinstance(labels, List) or not isinstance(labels.feature, ClassLabel):
        raise ValueError(
            f"the dataset needs a column 'labels' of type List(ClassLabel(names=...)), found {labels!r} "
            f"among the columns {dataset.column_names}"
        )
    return list(labels.feature.names)


def multi_hot(labels: list[int], num_classes: int) -> torch.Tensor:
    """Tags of one image as a float vector (C,).

    Example:
        >>> multi_hot([2, 0], num_classes=4)
        tensor([1., 0., 1., 0.])
    """
    vector = torch.zeros(num_classes)
    vector[labels] = 1.0
    return vector


def name_some(names: Sequence[str], noun: str) -> str:
    """Names for an error message, five at most.

    Example:
        >>> name_some(["a", "b"], "image")
        '2 images (a, b)'
    """
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({list_some(names)})"


def list_some(names: Sequence[str]) -> str:
    """The names alone, where the message counts them itself.

    Example:
        >>> list_some(["a", "b", "c", "d", "e", "f"])
        'a, b, c, d, e, ...'
    """
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def without_untagged(dataset: Dataset) -> tuple[Dataset, list[str]]:
    """The images that have at least one tag or are true negatives, and the `image_id` of those left out.

    An image without either may show any of the classes: nothing can be learned from it. The
    order of the others is kept. Nothing is written to disk.

    Raises:
        ValueError: no image has a tag.

    Example:
        >>> examples = {"image": [None, None], "labels": [[1], []], "image_id": ["a", "b"]}
        >>> dataset = Dataset.from_dict(examples, features=tag_features(["cat", "dog"]))
        >>> tagged, dropped = without_untagged(dataset)
        >>> tagged["image_id"][:], dropped
        (['a'], ['b'])
    """
    plain = dataset.with_format(None)
    tags, image_ids = plain["labels"][:], plain["image_id"][:]
    negative = plain["negative"][:] if "negative" in plain.column_names else [False] * len(tags)
    kept = [index for index, labels in enumerate(tags) if labels or negative[index]]
    if not any(tags):
        raise ValueError(f"none of the {len(dataset)} images has a tag: nothing to train on")
    if len(kept) == len(tags):
        return dataset, []
    dropped = [image_ids[index] for index in sorted(set(range(len(tags))) - set(kept))]
    return dataset.select(kept, keep_in_memory=True), dropped
