"""From the rows of an export to a table that the reader of folders takes: one line an image, files that are there."""

import csv
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cosa_hf.data.formats import ENDINGS
from cosa_hf.data.importers.rows import ImportOptions, Row
from cosa_hf.data.tag_text import NONE_OF_THE_CLASSES, SEPARATORS
from cosa_hf.data.tags import composed, name_some
from cosa_hf.files import whole_file


@dataclass
class Gathered:
    """All that an export says of one image.

    Attributes:
        file: its path, relative to the table.
        tags: as the export has them, in its order, each once.
        absent: what the export says is not in the image.
        split: the same for all rows of the image; "" where the export does not say.
        mask: the same.
        seen: whether somebody has looked at the image.
        verified: whether it is known to have none of the classes.
    """

    file: str
    tags: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    split: str = ""
    mask: str = ""
    seen: bool = False
    verified: bool = False


def gather(
    rows: Iterable[tuple[Path, Row]],
    root: Path,
    options: ImportOptions,
    verified: bool = False,
    skip_missing: bool = False,
) -> tuple[list[Gathered], list[str]]:
    """Join the rows of each image, and find its file below `root`.

    Args:
        rows: each with the directory of its export, where files are looked for first.
        root: the directory of the photos.
        options: whose `classes` alone are kept.
        verified: an image without a tag that somebody looked at has none of the classes.
        skip_missing: leave out images that are not there.

    Returns:
        The images in the order of the export, and the names of those left out.

    Raises:
        FileNotFoundError: images that are not there.
        ValueError: no rows, a name that could be several files or several names of one, a class that is both there
            and verified to be absent, or rows of one image that differ in split or mask.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (4, 4)).save("a.png")
        >>> rows = [(Path("."), Row("line 2", ["a"], ["cat"])), (Path("."), Row("line 3", ["a"], ["dog"]))]
        >>> [(image.file, list(image.tags)) for image in gather(rows, Path("."), ImportOptions())[0]]
        [('a.png', ['cat', 'dog'])]
    """
    photos, images = _Photos(root), dict[str, Gathered]()
    names: dict[str, str] = {}
    missing: dict[str, None] = {}
    for directory, row in rows:
        file = photos.find(row, directory)
        if file is None:
            missing[row.files[0]] = None
            continue
        if names.setdefault(file, row.files[0]) != row.files[0]:
            raise ValueError(f"{row.where}: {names[file]} and {row.files[0]} would both be {file}: rename one of them")
        image = images.setdefault(file, Gathered(file))
        for tags, known in ((row.tags, image.tags), (row.absent, image.absent)):
            known.update((tag, row.where) for tag in tags if not options.classes or tag in options.classes)
        if both := set(image.tags) & set(image.absent):
            tag = min(both)
            raise ValueError(
                f"{file} has the tag {tag!r} in {image.tags[tag]} and not in {image.absent[tag]}: correct one of them"
            )
        for what, said in (("split", row.split), ("mask", row.mask)):
            if said and getattr(image, what) not in ("", said):
                raise ValueError(
                    f"{row.where}: {file} has the {what} {said!r} here and {getattr(image, what)!r} before"
                )
            setattr(image, what, said or getattr(image, what))
        image.seen |= row.seen
    if missing and not (skip_missing and images):
        raise FileNotFoundError(
            f"{root} lacks {name_some(list(missing), 'image')} that the export names: put them there"
            + (", or leave them out with --skip_missing" if images else "")
        )
    if not images:
        raise ValueError("the export names no images")
    classes = set(options.classes or [tag for image in images.values() for tag in image.tags])
    for image in images.values():
        denied = bool(classes) and classes <= set(image.absent)
        image.verified = not image.tags and (denied or (verified and image.seen))
    return list(images.values()), list(missing)


def write_table(images: list[Gathered], target: Path) -> None:
    """The table that `load_folder` reads, with a list as JSON where a tag has a separator in it."""
    columns = ["file_name", "labels", *(["split"] if any(image.split for image in images) else [])]
    columns += ["mask_file_name"] if any(image.mask for image in images) else []
    with whole_file(target) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for image in images:
            labels = "; ".join(image.tags) or (NONE_OF_THE_CLASSES if image.verified else "")
            if any(re.search(SEPARATORS, tag) or tag.isdigit() for tag in image.tags):
                labels = json.dumps(list(image.tags), ensure_ascii=False)
            writer.writerow([image.file, labels, *[getattr(image, name.partition("_")[0]) for name in columns[2:]]])


class _Photos:
    """The image files below a directory, found by what exports call them."""

    def __init__(self, root: Path):
        self.root = root.absolute()
        files = [path.relative_to(self.root).as_posix() for path in sorted(self.root.rglob("*"))]
        self.files = {composed(file) for file in files if PurePosixPath(file).suffix.lower() in ENDINGS}
        self.by_name = defaultdict(list)
        for file in sorted(self.files):
            self.by_name[PurePosixPath(file).name].append(file)
            self.by_name[PurePosixPath(file).stem].append(file)

    def find(self, row: Row, directory: Path) -> str | None:
        """The file of a row's image, looked for in the directory of the export, at the root, then by its last parts.

        Raises:
            ValueError: a row without a name, or a name that several files bear.
        """
        if not row.files or not row.files[0]:
            raise ValueError(f"{row.where} names no file")
        for name in row.files:
            path = composed(name.strip().replace("\\", "/"))
            beside = os.path.relpath(directory.absolute() / path, self.root).replace(os.sep, "/")
            if found := next((file for file in (beside, os.path.normpath(path)) if file in self.files), None):
                return found
            found_by_name = self.by_name.get(PurePosixPath(path).name, [])
            agreeing = Counter({file: _agreement(file, path) for file in found_by_name}).most_common(2)
            if len(agreeing) > 1 and agreeing[0][1] == agreeing[1][1]:
                both = " or ".join(file for file, _ in agreeing)
                raise ValueError(f"{row.where}: {name} could be {both}: rename one of them, here and in the export")
            if agreeing:
                return agreeing[0][0]
        return None


def _agreement(file: str, name: str) -> int:
    """How many directories right before the last part are the same."""
    pairs = zip(PurePosixPath(file).parts[-2::-1], PurePosixPath(name).parts[-2::-1], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


__all__ = ["Gathered", "gather", "write_table"]
