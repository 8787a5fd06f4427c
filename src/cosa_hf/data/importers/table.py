"""CSV with a column of files and one of tags: a row for each image, or for each tag as in Open Images.

Any delimiter and any names of columns. In a column Confidence, 1 is a tag and 0 a class verified to be absent.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from cosa_hf.data.importers.rows import FILE_COLUMNS, SPLIT_COLUMNS, TAG_COLUMNS, ImportOptions, Row, column_of
from cosa_hf.data.tables import csv_rows, delimiter_of


def read(path: Path, options: ImportOptions) -> Iterator[Row]:
    """The rows of a table.

    Raises:
        ValueError: as `csv_rows`; columns that are not there, tags that are none, ids without names.

    Example:
        >>> _ = Path("tags.tsv").write_text("image\\ttags\\na\\thaze primary\\n")
        >>> [(row.files, row.tags) for row in read(Path("tags.tsv"), ImportOptions(tag_separator=" "))]
        [(['a'], ['haze', 'primary'])]
    """
    numbers = 0
    rows = list(csv_rows(path, delimiter_of(path)))
    for where, cells in rows:
        columns = list(cells)
        file = column_of(columns, options.file_column, FILE_COLUMNS, "file", where)
        tag = column_of([name for name in columns if name != file], options.tag_column, TAG_COLUMNS, "tag", where)
        try:
            if re.fullmatch(r"/[a-z]/\w+", cells[tag].strip()) and not options.names:
                raise ValueError(
                    f"{cells[tag]} is an id: pass --names with the file of their names (of Open Images "
                    "oidv7-class-descriptions.csv)"
                )
            tags = options.tags(cells[tag])
        except ValueError as error:
            raise ValueError(f"{where}, column {tag}: {error}") from error
        numbers += bool(tags) and all(name.isdigit() for name in tags) and not options.names
        by_fold = {name.casefold(): cells[name] for name in columns}
        confidence = _number(by_fold.get("confidence", "1"), where)
        yield Row(
            where,
            [cells[file].strip()],
            tags if confidence >= options.min_confidence else (),
            tags if confidence == 0 else (),
            tags if 0 < confidence < options.min_confidence else (),
            next((by_fold[name].strip() for name in SPLIT_COLUMNS if name in by_fold), ""),
            cells.get("mask_file_name", "").strip(),
        )
    if rows and numbers == len(rows):
        raise ValueError(f"{path}: the tags are numbers: pass --names with a CSV file of their names, such as 3,cat")


def recognises(path: Path) -> bool:
    """Whether a file may be such a table."""
    return path.suffix.lower() in (".csv", ".tsv") and any(csv_rows(path, delimiter_of(path)))


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: the confidence {text!r} is not a number") from None
