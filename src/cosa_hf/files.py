"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["remove_unfinished", "whole_file"]

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
