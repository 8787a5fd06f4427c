"""What an export says of one image, and what has to be said about an export."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cosa_hf.data.tag_text import SEPARATORS
from cosa_hf.data.tags import parse_tags, read_text

FILE_COLUMNS = (
    "file_name", "filename", "file", "image_name", "image", "img", "path", "filepath", "image_path",
    "image_id", "imageid", "id", "name",
)  # fmt: skip
TAG_COLUMNS = (
    "labels", "label", "tags", "tag", "classes", "class", "class_name", "labelname", "label_name", "keywords",
    "category", "categories", "choice", "choices",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "subset")


class Row(NamedTuple):
    """One row, element or file of an export; an image may have several.

    Attributes:
        where: for messages: "export.csv, line 3".
        files: what the image may be called, the likeliest first; paths in the export's directory or in the photos'.
        tags: what is in the image.
        absent: what somebody looked for in vain.
        unsure: tags of less confidence than asked for.
        split: of the image, where the export says.
        mask: file of the image's mask, where the export says.
        seen: whether somebody has looked at the image.
    """

    where: str
    files: Sequence[str]
    tags: Sequence[str] = ()
    absent: Sequence[str] = ()
    unsure: Sequence[str] = ()
    split: str = ""
    mask: str = ""
    seen: bool = True


@dataclass(kw_only=True)
class ImportOptions:
    """What a format does not say of itself.

    Attributes:
        file_column: the column, or key, of the images' names.
        tag_column: that of the tags; of Label Studio the name of a control.
        tag_separator: what stands between tags; None: as `parse_tags` reads text.
        names: names by id, where the export has ids.
        classes: these alone become tags, where given.
        min_confidence: tags of less are left out; those of 0 are verified to be absent.
    """

    file_column: str | None = None
    tag_column: str | None = None
    tag_separator: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    classes: list[str] | None = None
    min_confidence: float = 1.0

    def tags(self, value: Any) -> list[str]:
        """The tags in a cell.

        Raises:
            ValueError: as `parse_tags`, or an id without a name.

        Example:
            >>> ImportOptions(tag_separator=" ").tags("haze primary"), ImportOptions(names={"3": "cat"}).tags("3")
            (['haze', 'primary'], ['cat'])
        """
        if isinstance(value, str) and self.tag_separator:
            value = value.split(self.tag_separator.strip() or None)
        if self.names:
            ids = re.split(SEPARATORS, value) if isinstance(value, str) else value
            ids = [str(one).strip() for one in (ids if isinstance(ids, list) else [ids]) if one not in ("", None)]
            if unknown := [one for one in ids if one not in self.names]:
                raise ValueError(f"--names has no name for {unknown[0]}: add the line {unknown[0]},NAME to its file")
            value = [self.names[one] for one in ids]
        return parse_tags(value)


def column_of(columns: Sequence[str], asked: str | None, usual: Sequence[str], what: str, where: str) -> str:
    """The column that was asked for, or the one that has a usual name; of files the likeliest of several.

    Raises:
        ValueError: there is none, or there are several with tags; lists the columns and names the flag.

    Example:
        >>> column_of(["Image", "width"], None, FILE_COLUMNS, "file", "tags.csv")
        'Image'
    """
    folded = {column.casefold(): column for column in columns}
    named = [asked] if asked else [folded[name] for name in usual if name in folded]
    found = [name for name in named if name in columns]
    if not found or (what == "tag" and len(found) > 1):
        several = f"{' and '.join(found)} could all be the tags" if found else f"no column {asked or f'of a {what}'}"
        raise ValueError(f"{where}: {several}: pass --{what}_column with one of {', '.join(columns)}")
    return found[0]


def read_names(path: Path) -> dict[str, str]:
    """Names by id, from a CSV file of two columns; a header does no harm.

    Raises:
        ValueError: a line without two columns.

    Example:
        >>> _ = Path("names.csv").write_text("/m/01yrx,Cat\\n/m/0bt9lr,Dog\\n")
        >>> read_names(Path("names.csv"))
        {'/m/01yrx': 'Cat', '/m/0bt9lr': 'Dog'}
    """
    names = {}
    for number, cells in enumerate(csv.reader(io.StringIO(read_text(path), newline="")), start=1):
        if len(cells) != 2:
            raise ValueError(f"{path}, line {number}: expected an id and a name, as in 3,cat; got {','.join(cells)!r}")
        names[cells[0].strip()] = cells[1].strip()
    return names


__all__ = ["FILE_COLUMNS", "SPLIT_COLUMNS", "TAG_COLUMNS", "ImportOptions", "Row", "column_of", "read_names"]
