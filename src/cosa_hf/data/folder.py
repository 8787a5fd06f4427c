"""A folder of one's own photos with tags.

`load_dataset("imagefolder")` is not used here: it drops images without metadata silently, does not read tags from
text, and what it raises for a missing file does not name the line. A folder that it can read also loads as dataset
"hub" with the folder as its name.
"""

import io
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset

from cosa_hf.data.formats import ENDINGS
from cosa_hf.data.importers import import_command
from cosa_hf.data.negatives import NEGATIVE, split_negatives
from cosa_hf.data.tables import csv_rows
from cosa_hf.data.tags import (
    check_image_ids,
    collect_classes,
    composed,
    name_some,
    parse_json,
    parse_tags,
    read_text,
    tag_features,
    tag_ids,
)

FOLDER_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Directory names that mean a split, in small letters, and what they are otherwise called."""

_TABLES = ("metadata.jsonl", "metadata.csv", "tags.json")
_TABLE_NAME = re.compile(r"\.(csv|tsv|jsonl?|xml)$", re.IGNORECASE)
_NO_TAGS = ("images", "image", "imgs", "img", "jpegimages", "photos", "pictures", "annotations", "labels", "masks")
_LITTER = ("thumbs.db", "desktop.ini")  # what file managers leave behind, next to hidden files


@dataclass
class _Entry:
    """One line of what a folder says about itself."""

    directory: Path  # what `file` and `mask` are relative to
    file: str  # composed, as is `mask`
    tags: list[str]
    mask: str | None
    split: str
    where: str  # for messages: "metadata.csv, line 3"


def load_folder(
    data_dir: str | Path, split: str = "train", masks: bool = False, classes: Sequence[str] | None = None
) -> Dataset:
    """Images and tags of a folder that has, in this order of precedence,

    1. ``metadata.jsonl`` or ``metadata.csv`` with `file_name` (relative to the folder), `labels` (a list of names,
       or text with commas, semicolons or bars between them) and, if wanted, `mask_file_name` and `split`;
    2. ``tags.json``: ``{"file name": ["tag", ...], ...}``;
    3. only directories named as `FOLDER_SPLITS`, each a folder in the sense of 1, 2 or 4;
    4. one sub-folder per tag.

    An image's split is what its `split` column says, otherwise the directory of `FOLDER_SPLITS` that it lies in,
    otherwise "train". Where no split has the name that is asked for, one that means the same is taken: "valid" for
    "val". The tag "-" alone says that an image shows none of the classes. Classes are the tags of all splits, sorted,
    so that every split has the same. Case counts in tags; spaces around them and the Unicode form of their accents do
    not. Images are opened when a row is read, not here; masks not before they are asked for.

    Args:
        data_dir: the folder.
        split: which split of it.
        masks: add the column `mask` (ids 0 background, 1..C in the order of the classes, 255 ignore).
        classes: the classes in the order of their ids; a tag that is none of them is an error.

    Returns:
        Dataset with `image`, `labels` (sorted; may be empty), `image_id` (the file name without its ending, with
        sub-directories joined by "_"), if asked for, `mask`, and, where any image shows none of the classes,
        `negative`, in the order of the table or of the names.

    Raises:
        FileNotFoundError: the folder, its tags, an image or a mask is missing; names it.
        ValueError: a table that cannot be read, or one of another tool (names the command that imports it), text that
            is not a tag, an unknown split or tag, tags that differ in case alone, an image named twice, two images with
            the same id, an id too long for a file name, two names that differ in Unicode form alone, an empty file or
            one that is not an image by its name.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (4, 3)).save("a.png")
        >>> _ = Path("metadata.csv").write_text("file_name,labels\\na.png,cat; dog\\n")
        >>> load_folder(".")[0]["labels"]
        [0, 1]
    """
    root = Path(data_dir).absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"no directory {root}: pass the folder of your photos")
    entries = list(_read(root))
    known, _ = split_negatives([entry.tags for entry in entries], [entry.file for entry in entries])
    names = list(classes) if classes else collect_classes(known)
    for entry in entries:
        if entry.split in names and not _meaning(entry.split):  # a tag in the next column, after a comma without quotes
            raise ValueError(
                f"{entry.where}: the split {entry.split!r} is a tag elsewhere: put tags with commas between them "
                "in quotes"
            )
    chosen = [entry for entry in entries if entry.split == split]
    if not chosen and (meant := _meaning(split)):
        chosen = [entry for entry in entries if _meaning(entry.split) == meant]
    if not chosen:
        found = ", ".join(f"{name} ({count})" for name, count in Counter(p.split for p in entries).items())
        raise ValueError(
            f"{root} has no images of split {split!r}, only of {found}: a split is a directory of that name, or a "
            "`split` column in the metadata"
        )
    _require_different_names(chosen)
    check_image_ids([_image_id(entry.file) for entry in chosen])
    tags, negatives = split_negatives([entry.tags for entry in chosen], [entry.file for entry in chosen])
    columns: dict[str, list] = {
        "image": _paths(chosen, [entry.file for entry in chosen]),
        "labels": tag_ids(tags, names, [entry.file for entry in chosen]),
        "image_id": [_image_id(entry.file) for entry in chosen],
    }
    if masks:
        maskless = [entry.file for entry in chosen if not entry.mask]
        if maskless:
            raise FileNotFoundError(
                f"split {split!r} of {root} names no mask for {name_some(maskless, 'image')}: give each a "
                "mask_file_name in the metadata"
            )
        columns["mask"] = _paths(chosen, [str(entry.mask) for entry in chosen])
    if any(negatives):
        columns[NEGATIVE] = negatives
    return Dataset.from_dict(columns, features=tag_features(names, masks, any(negatives)))


def unnamed_images(data_dir: str | Path) -> list[str]:
    """Images inside a folder that its tables do not name, and that are therefore not used.

    Raises:
        FileNotFoundError, ValueError: as `load_folder`.

    Example:
        >>> from PIL import Image
        >>> folder = Path("photos")
        >>> folder.mkdir()
        >>> for name in ("a.png", "b.png"):
        ...     Image.new("RGB", (4, 3)).save(folder / name)
        >>> _ = (folder / "tags.json").write_text('{"a.png": ["cat"]}')
        >>> unnamed_images(folder)
        ['b.png']
    """
    root = Path(data_dir).absolute()
    named = {
        composed(str(entry.directory / file)) for entry in _read(root) for file in (entry.file, entry.mask) if file
    }
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.suffix.lower() in ENDINGS and composed(str(path)) not in named
    )


def _read(root: Path, split: str | None = None) -> Iterator[_Entry]:
    """All images of a folder; `split` is what its name says about them."""
    tables = [root / name for name in _TABLES if (root / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{root} has {' and '.join(table.name for table in tables)}: keep one, they may contradict")
    if tables:
        yield from _read_table(tables[0], split)
        return
    visible = _visible(root)
    for name, entry in visible.items():
        known = entry.is_file() and _TABLE_NAME.search(name)
        if known and (command := import_command(root / name, root / "metadata.csv")):
            raise ValueError(f"{root} has {name}: `{command}` makes a table of tags of it; or move it away")
    directories = {name: entry for name, entry in visible.items() if entry.is_dir()}
    splits = [name for name in directories if _meaning(name)]
    if directories and split is None and len(splits) == len(directories):
        for name, entry in directories.items():
            yield from _read(Path(entry.path), name)
        return
    if len({_meaning(name) for name in splits}) > 1 and split is None:
        others = [name for name in directories if name not in splits]
        raise ValueError(
            f"{root} has the splits {', '.join(splits)} and beside them {', '.join(others)}: move what is not a split "
            f"out of it, or name the images in {root / 'metadata.csv'}"
        )
    if not directories:
        command = import_command(root, root / "metadata.csv") or "cosa-hf import"
        what = "keywords inside the photos" if " keywords " in command else "exports of other tools"
        raise FileNotFoundError(
            f"{root} has no tags: neither {', '.join(_TABLES)} nor a sub-folder per tag; {what} go through `{command}`"
        )
    for tag, entry in directories.items():
        files = _visible(Path(entry.path))
        if not files:
            raise ValueError(f"{entry.path} is the sub-folder of a tag, but empty: remove it or fill it")
        table = next((name for name, file in files.items() if _is_table(Path(file.path))), None)
        if table or tag.casefold() in _NO_TAGS:
            why = f"has a table of its own, {table}" if table else "is the directory of all images"
            advice = f"pass {entry.path} as --data_dir; if it is a split, call it train, val or test"
            if not table and not any(file.is_dir() for file in files.values()):
                advice = f"write the images' tags into {root / 'metadata.csv'}"
            raise ValueError(f"{entry.path} {why}, so {tag!r} is not a tag: {advice}")
        try:
            tags = parse_tags([tag])
        except ValueError as error:
            raise ValueError(f"{entry.path}, the sub-folder of a tag: {error}") from error
        for name, file in files.items():
            if file.is_dir():
                raise ValueError(
                    f"{file.path} is a directory inside the sub-folder of the tag {tag!r}, where only images "
                    f"belong (directories are splits if all are called train, val and test)"
                )
            relative = f"{tag}/{name}"
            yield _Entry(root, relative, tags, None, split or "train", relative)


def _is_table(path: Path) -> bool:
    """Whether a file in the sub-folder of a tag speaks of other files."""
    known = path.suffix.lower() in (".csv", ".tsv", ".json")
    return path.name in _TABLES or (known and import_command(path, path) is not None)


def _meaning(split: str) -> str | None:
    return FOLDER_SPLITS.get(split.casefold())


def _read_table(table: Path, split: str | None) -> Iterator[_Entry]:
    seen: dict[str, _Entry] = {}
    for where, row in _rows(table):
        missing = [column for column in ("file_name", "labels") if column not in row]
        if missing:
            found = f"{where}: no {' and no '.join(missing)}; found {', '.join(map(str, row))}"
            raise ValueError(found + _importing(table))
        file = _text(row, "file_name", where)
        path = PurePosixPath(file)
        if not file:
            raise ValueError(f"{where}: the row names no file: write its file_name, or remove the row")
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{where}: file_name {file!r} must be a path inside {table.parent}")
        try:
            tags = parse_tags(row["labels"])
        except ValueError as error:
            raise ValueError(f"{where}, image {file!r}: {error}") from error
        inside = path.parts[0] if len(path.parts) > 1 and _meaning(path.parts[0]) else None
        entry = _Entry(
            directory=table.parent,
            file=file,
            tags=tags,
            mask=_text(row, "mask_file_name", where) or None,
            split=_text(row, "split", where) or split or inside or "train",
            where=where,
        )
        if file in seen:
            other = seen[file]
            raise ValueError(
                f"{file} is named twice, in {other.where} with the tags {other.tags} and in {where} with {tags}: "
                f"write all of its tags in one row{_importing(table)}"
            )
        seen[file] = entry
        yield entry
    if not seen:
        raise ValueError(f"{table} names no images")


def _text(row: dict[str, Any], column: str, where: str) -> str:
    """What a cell says, without spaces around it; "" if nothing."""
    value = "" if row.get(column) is None else row[column]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} must be text, got {value!r}")
    return composed(value.strip())


def _importing(table: Path) -> str:
    """What else to do about a table that is not of this package's form."""
    if table.suffix == ".jsonl":
        target = table.with_name("metadata.csv")
        command = shlex.join(["cosa-hf", "import", "imagefolder", str(table.parent), "--output", str(target)])
        return f"; a table of load_dataset's: `{command}`, and then move {table.name} away"
    export = table.with_name(f"export{table.suffix}")
    found = import_command(table, table.with_name("metadata.csv"), export)
    return f"; an export of another tool: rename it to {export.name}, and then `{found}`" if found else ""


def _rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, each with the place it stands at."""
    if table.suffix == ".csv":
        yield from csv_rows(table)
        return
    text = read_text(table)
    if table.suffix == ".jsonl":
        for number, line in enumerate(io.StringIO(text, newline=""), start=1):
            where = f"{table}, line {number}"
            if line.strip():
                row = parse_json(line, where)
                if row is None or (isinstance(row, dict) and all(value in (None, "", []) for value in row.values())):
                    raise ValueError(f"{where}: the row is empty: remove it")
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: expected an object, got {line.strip()}")
                yield where, row
    else:
        tags = parse_json(text, table)
        if not isinstance(tags, dict) or {"images", "annotations"} <= set(tags):
            raise ValueError(f"{table} must be an object, file name -> list of tags{_importing(table)}")
        for name, value in tags.items():
            yield str(table), {"file_name": name, "labels": value}


def _visible(directory: Path) -> dict[str, os.DirEntry]:
    """What a directory holds, by `composed` name, sorted: without hidden files and file managers' litter."""
    entries: dict[str, os.DirEntry] = {}
    for entry in os.scandir(directory):
        if entries.setdefault(composed(entry.name), entry) is not entry:
            raise ValueError(
                f"{directory} has two entries {composed(entry.name)!r} whose names differ in Unicode form alone: "
                "rename or merge them"
            )
    return {name: entries[name] for name in sorted(entries) if not name.startswith(".") and name.lower() not in _LITTER}


def _paths(entries: list[_Entry], files: list[str]) -> list[str]:
    """Where the files are, known to exist, to have content and to be images by their names."""
    listings: dict[Path, dict[str, os.DirEntry]] = {}
    paths, missing, empty, foreign = [], [], [], []
    for described, file in zip(entries, files, strict=True):
        path = described.directory / file
        entry = _listing(path.parent, listings).get(path.name)
        if entry is None:
            missing.append(f"{file} of {described.where}")
        elif path.suffix.lower() not in ENDINGS:
            foreign.append(file)
        elif entry.stat().st_size == 0:
            empty.append(file)
        else:
            paths.append(entry.path)
    root = entries[0].directory
    if missing:
        raise FileNotFoundError(f"{root} lacks {name_some(missing, 'file')}")
    if foreign:
        raise ValueError(f"{root} has {name_some(foreign, 'file')} that, by their names, are not images: take them out")
    if empty:
        raise ValueError(f"{root} has {name_some(empty, 'file')} without content: replace or remove them")
    return paths


def _listing(directory: Path, known: dict[Path, dict[str, os.DirEntry]]) -> dict[str, os.DirEntry]:
    """What a directory holds, if it is there: one listing instead of a stat per file, for network drives."""
    if directory not in known:
        if directory.is_dir():
            known[directory] = _visible(directory)
        else:  # its own name, or that of one above, may be decomposed on the disk
            entry = _listing(directory.parent, known).get(directory.name)
            known[directory] = _visible(Path(entry.path)) if entry and entry.is_dir() else {}
    return known[directory]


def _image_id(file: str) -> str:
    return str(PurePosixPath(file).with_suffix("")).replace("/", "_")


def _require_different_names(entries: list[_Entry]) -> None:
    """Masks and visualizations are named by the image's id, so it must be unique."""
    seen: dict[str, str] = {}
    for entry in entries:
        other = seen.setdefault(_image_id(entry.file), entry.file)
        if other != entry.file:
            raise ValueError(f"{other} and {entry.file} would both be called {_image_id(other)!r}: rename one")


__all__ = ["FOLDER_SPLITS", "load_folder", "unnamed_images"]
