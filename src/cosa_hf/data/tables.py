"""Rows of CSV files, each with the place it stands at."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from cosa_hf.data.tags import read_text

DELIMITERS = ",;\t|"


def csv_rows(table: Path, delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
    """What each row of a CSV file says, by the names in its header, and where: "metadata.csv, line 3".

    Raises:
        ValueError: it is not UTF-8, a quote is never closed, a column occurs twice, or a row has more cells than the
            header or none that says anything; names the line.

    Example:
        >>> _ = Path("metadata.csv").write_text("file_name, labels\\na.png,cat\\n")
        >>> list(csv_rows(Path("metadata.csv")))
        [('metadata.csv, line 2', {'file_name': 'a.png', 'labels': 'cat'})]
    """
    # Strict: a quote that is never closed would swallow all lines after it.
    reader = csv.DictReader(io.StringIO(read_text(table), newline=""), strict=True, delimiter=delimiter)
    try:
        # Blank lines may come before the header, too.
        header = next(([name.strip() for name in row] for row in reader.reader if any(map(str.strip, row))), [])
        while header and not header[-1]:  # a spreadsheet makes the header as wide as the widest row
            header.pop()
        if repeated := sorted({name for name in header if name and header.count(name) > 1}):
            raise ValueError(f"{table} has more than one column {', '.join(repeated)}: leave one of each")
        reader.fieldnames = header
        for row in reader:
            where = f"{table}, line {reader.line_num}"
            extra = [cell for cell in row.pop(None, []) if cell.strip()]
            if extra:
                raise ValueError(
                    f"{where} has more cells than the header: {', '.join(extra)}; put tags with commas between them "
                    "in quotes, or semicolons between them"
                )
            if not any((cell or "").strip() for cell in row.values()):
                raise ValueError(f"{where}: the row is empty: remove it")
            yield where, {name: cell or "" for name, cell in row.items() if name}
    except csv.Error as error:
        raise ValueError(f"{table}, line {reader.line_num + 1} cannot be read: {error}") from error


def delimiter_of(table: Path) -> str:
    """What stands between the columns of a CSV file: that of `DELIMITERS` which its header has most of.

    Example:
        >>> _ = Path("tags.csv").write_text("file;tags\\na.png;cat, dog\\n")
        >>> delimiter_of(Path("tags.csv"))
        ';'
    """
    header = read_text(table).lstrip().partition("\n")[0]
    return max(DELIMITERS, key=header.count)


__all__ = ["DELIMITERS", "csv_rows", "delimiter_of"]
