"""Files and models that are there completely or not at all, what they are called, and whether they can be written."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

from safetensors import SafetensorError

__all__ = [
    "CONFIG",
    "check_output",
    "file_name",
    "remove_unfinished",
    "require_absent",
    "visible",
    "whole_file",
    "whole_model",
]

LONGEST_NAME = 200  # bytes; common file systems take 255

CONFIG = "config.json"  # of a saved model

_UNFINISHED = ".*.unfinished"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name in the directory of `path`, which it becomes when the block ends.

    An exception removes the temporary file. A process that is killed leaves it behind, under a name that
    nothing reads and `remove_unfinished` finds.

    Raises:
        OSError: as the block does, of a full disk say; names the file.

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
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        _name(error, path)
        raise


@contextmanager
def whole_model(directory: Path) -> Iterator[Path]:
    """`whole_file` for a saved model, and what lies beside it.

    A directory is a model's if it has a `config.json`: of a model that is replaced it goes first, of the new one it
    comes last. Other files that are there stay.

    Raises:
        OSError: as the block does; names the directory.

    Example:
        >>> with whole_model(Path("model")) as unfinished:
        ...     for name in (CONFIG, "model.safetensors"):
        ...         (unfinished / name).touch()
        ...     sorted(file.name for file in unfinished.iterdir()), Path("model", CONFIG).exists()
        (['config.json', 'model.safetensors'], False)
        >>> sorted(file.name for file in Path("model").iterdir())
        ['config.json', 'model.safetensors']
    """
    remove_unfinished(directory)
    unfinished = directory / _UNFINISHED.replace("*", uuid4().hex)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        _name(error, directory)
        raise
    # Whatever ends this leaves `unfinished`, by which the directory is known as one to write to again.
    (directory / CONFIG).unlink(missing_ok=True)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == CONFIG):
        path.replace(directory / path.name)
    unfinished.rmdir()


def _name(error: BaseException, path: Path) -> None:
    """What was being written, for an error that does not say: that of a full disk."""
    if isinstance(error, SafetensorError):
        raise OSError(f"cannot write {path}: {error}") from error
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def remove_unfinished(directory: Path) -> None:
    """Delete what killed processes left behind, in `directory` and below."""
    for path in list(directory.rglob(_UNFINISHED)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_output(
    path: Path, directory: bool = False, instead: str = "choose another name", replace: bool = False
) -> None:
    """Refuse a file, or a directory, that could not be written after the work, or would replace what is there.

    Makes nothing.

    Args:
        path: to be written; a directory may be there, but empty, or with the model that a killed process began.
        directory: whether it is one.
        instead: how else to go on, for the message.
        replace: what is there was meant to be replaced.

    Raises:
        OSError: something is in its place, or it may not be written.

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
    if not replace:
        begun = any(path.glob(_UNFINISHED)) and not (path / CONFIG).exists()
        require_absent([] if begun else visible(path) if directory else [path], f"{instead}, or remove {path}")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission to write {there}; choose another place")


def require_absent(results: Iterable[Path], instead: str) -> None:
    """Refuse to write over what an earlier command left.

    Args:
        results: what is going to be written.
        instead: how to go on, for the message.

    Raises:
        FileExistsError: one of them is there; names it.

    Example:
        >>> _ = Path("report.json").write_text("{}")
        >>> require_absent([Path("report.json")], "choose another --report")
        Traceback (most recent call last):
        FileExistsError: report.json is there already: choose another --report
    """
    for path in results:
        if path.exists():
            raise FileExistsError(f"{path} is there already: {instead}")


def visible(directory: Path) -> list[Path]:
    """What a directory holds, sorted, without hidden files; nothing where there is none."""
    paths = sorted(directory.iterdir()) if directory.is_dir() else []
    return [path for path in paths if not path.name.startswith(".")]


def file_name(identity: str, ending: str) -> str:
    """A file's name for an image's id: any id gets one of its own, which every file system takes.

    A slash, backslash, percent sign or blank becomes %2F, %5C, %25 or %20; of an over-long id the end makes room for a
    digest.

    Example:
        >>> file_name("cats/1", ".png"), len(file_name("x" * 300, ".png"))
        ('cats%2F1.png', 200)
    """
    name = re.sub(r"[%/\\\s]", lambda match: quote(match[0], safe=""), identity) + ending
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = f"-{sha256(identity.encode()).hexdigest()[:16]}{ending}"
    return name.encode()[: LONGEST_NAME - len(digest)].decode(errors="ignore") + digest
