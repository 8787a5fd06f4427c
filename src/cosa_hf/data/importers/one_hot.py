"""CSV with a column for each class, of ones and zeros: Roboflow's _classes.csv and many tables of Kaggle."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from cosa_hf.data.importers.rows import FILE_COLUMNS, SPLIT_COLUMNS, TAG_COLUMNS, ImportOptions, Row, column_of
from cosa_hf.data.tables import csv_rows, delimiter_of

_VALUES = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": None}


def read(path: Path, options: ImportOptions) -> Iterator[Row]:
    """The rows of such a table. An empty cell says nothing of its class; a one in "Unlabeled" nothing of any.

    Raises:
        ValueError: as `csv_rows`; no column of files, or a column of something else than ones and zeros.

    Example:
        >>> _ = Path("_classes.csv").write_text("filename, cat, dog\\na.jpg, 1, 0\\n")
        >>> [(row.files, row.tags, row.absent) for row in read(Path("_classes.csv"), ImportOptions())]
        [(['a.jpg'], ['cat'], ['dog'])]
    """
    for where, cells in csv_rows(path, delimiter_of(path)):
        file = column_of(list(cells), options.file_column, FILE_COLUMNS, "file", where)
        values = {}
        for name, cell in cells.items():
            if name == file or name.casefold() in SPLIT_COLUMNS or name not in (options.classes or cells):
                continue
            if cell.strip().casefold() not in _VALUES:
                raise ValueError(
                    f"{where}: {name} is {cell!r}, neither 0 nor 1: pass --classes with the columns that are classes"
                )
            values[name] = _VALUES[cell.strip().casefold()]
        unlabeled = next((values.pop(name) for name in list(values) if name.casefold() == "unlabeled"), False)
        yield Row(
            where,
            [cells[file].strip()],
            options.tags([name for name, value in values.items() if value]),
            () if unlabeled else options.tags([name for name, value in values.items() if value is False]),
            split=next((cells[name].strip() for name in cells if name.casefold() in SPLIT_COLUMNS), ""),
            seen=not unlabeled,
        )


def recognises(path: Path) -> bool:
    """Whether a table has columns of ones and zeros, beside those of files and splits, and none of tags."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        return False
    rows = [cells for _, cells in itertools.islice(csv_rows(path, delimiter_of(path)), 20)]
    others = (*FILE_COLUMNS, *SPLIT_COLUMNS, "confidence")
    columns = [name for name in (rows[0] if rows else ()) if name.casefold() not in others]
    hot = [name for name in columns if all(cells[name].strip().casefold() in _VALUES for cells in rows)]
    return bool(hot) and not any(name.casefold() in TAG_COLUMNS for name in columns if name not in hot)
