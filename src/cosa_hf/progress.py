"""The progress bar of everything that takes a while."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 10.0


class _Lines(tqdm):
    """A line every ten seconds: a log file keeps what a terminal would overwrite."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self.fp.write(f"{self if msg is None else msg}\n")
        return True


def progress(
    iterable: Iterable[Any] | None = None,
    description: str | None = None,
    total: int | None = None,
    unit: str = "it",
    disable: bool = False,
    **options: Any,
) -> Any:
    """A `tqdm` bar on stderr; where that is not a terminal, a line every ten seconds in place of thousands.

    Args:
        iterable: what to go through; None for a bar that is moved by `update`.
        description: stands before the bar.
        total: how many there are, where `len(iterable)` does not tell.
        unit: what is counted.
        disable: show nothing, as on all processes but the main one.
        options: of `tqdm`, such as `initial`.

    Example:
        >>> [number for number in progress([1, 2], "numbers", disable=True)]
        [1, 2]
    """
    options |= {"desc": description, "total": total, "unit": unit, "disable": disable}
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    return _Lines(iterable, mininterval=SECONDS_BETWEEN_LINES, maxinterval=SECONDS_BETWEEN_LINES, ncols=100, **options)


__all__ = ["progress"]
