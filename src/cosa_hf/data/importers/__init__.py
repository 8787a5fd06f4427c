"""What people export from other tools, as the table of a folder: a module for each format, all of one form."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cosa_hf.data.importers import coco, cvat, imagefolder, keywords, label_studio, one_hot, table, voc
from cosa_hf.data.importers.gather import Gathered, gather, write_table
from cosa_hf.data.importers.rows import ImportOptions, Row, read_names


class Format(NamedTuple):
    """A format of exports.

    Attributes:
        purpose: what it is, in a line.
        read: the rows of a file, or of a directory.
        recognises: whether a file, or a directory, may be of this format.
    """

    purpose: str
    read: Callable[[Path, ImportOptions], Iterator[Row]]
    recognises: Callable[[Path], bool]


FORMATS = {
    name: Format((module.__doc__ or "").partition("\n")[0], module.read, module.recognises)
    for name, module in {
        "label-studio": label_studio,
        "one-hot": one_hot,
        "csv": table,
        "cvat": cvat,
        "coco": coco,
        "voc": voc,
        "imagefolder": imagefolder,
        "keywords": keywords,
    }.items()
}
"""By name, those that are told apart by more first."""


def import_command(path: Path, target: Path, renamed: Path | None = None) -> str | None:
    """The command that turns a file, or a directory, into the table `target`; None if it is of no known format.

    Args:
        path: what is there.
        target: the table.
        renamed: what `path` will be called by then.

    Example:
        >>> _ = Path("export.csv").write_text("filename,cat,dog\\na.jpg,1,0\\n")
        >>> import_command(Path("export.csv"), Path("metadata.csv"))
        'cosa-hf import one-hot export.csv --output metadata.csv'
    """
    for name, format in FORMATS.items():
        try:
            if format.recognises(path):
                if name == "voc" and path.is_file():  # one of many, each of an image
                    path = path.parent
                return shlex.join(["cosa-hf", "import", name, str(renamed or path), "--output", str(target)])
        except (ValueError, OSError):  # broken in a way that the import itself will name
            continue
    return None


__all__ = [
    "FORMATS",
    "Format",
    "Gathered",
    "ImportOptions",
    "Row",
    "gather",
    "import_command",
    "read_names",
    "write_table",
]
