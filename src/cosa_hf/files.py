"""Files that are there completely or not at all, and whether they can be written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["check_output", "remove_unfinished", "whole_file"]

_UNFINISHED = ".*.unfinished"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name in the directory of `path`, which it becomes when the block ends.

    An exception removes the temporary file. A process that is killed leaves it behind, under a name that
    nothing reads and `remove_unfinished` finds.

    Example:
        >>> with whole_file(Path("numbers.txt")) as unfinished:
        ...     _ = unfinished.write_text("1 2 3")
        ...     Path("numbers.txt").exists()
        False
        >>> Path("numbers.txt").read_text()
        '1 2 3'
    """
    unfinished = path.with_name(_UNFINISHED.replace("*", uuid4().hex))
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(directory: Path) -> None:
    """Delete what killed processes left behind, in `directory` and below."""
    for path in directory.rglob(_UNFINISHED):
        path.unlink()


def check_output(path: Path, directory: bool = False) -> None:
    """Refuse a file, or a directory, that could not be written after the work. Makes nothing.

    Raises:
        OSError: something else is in its place, or it may not be written.

    Example:
        >>> check_output(Path("new/report.json"))
        >>> check_output(Path("."))
        Traceback (most recent call last):
        FileExistsError: cannot write .: . is a directory; choose another name
    """
    there = next(place for place in (path, *path.parents) if place.exists())
    if there.is_dir() != (directory or there != path):
        kind = "directory" if there.is_dir() else "file"
        raise FileExistsError(f"cannot write {path}: {there} is a {kind}; choose another name")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission to write {there}; choose another place")
