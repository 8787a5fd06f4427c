"""Label Studio's JSON, JSON-MIN or CSV: choices, taxonomies, and the labels of boxes, polygons and brushes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from cosa_hf.data.formats import ENDINGS
from cosa_hf.data.importers.rows import TAG_COLUMNS, ImportOptions, Row, column_of
from cosa_hf.data.tables import csv_rows, delimiter_of
from cosa_hf.data.tags import parse_json, read_text


def read(path: Path, options: ImportOptions) -> Iterator[Row]:
    """The tasks of an export. A task without a submitted annotation has not been looked at.

    Raises:
        ValueError: it is no such export, a task without an image, or several controls, of which one must be named.

    Example:
        >>> _ = Path("min.json").write_text('[{"image": "/data/upload/1/0a1b2c3d-a.jpg", "choice": "cat"}]')
        >>> [(row.files, row.tags) for row in read(Path("min.json"), ImportOptions())]
        [(['0a1b2c3d-a.jpg', 'a.jpg'], ['cat'])]
    """
    tasks = list(_tasks(path))
    tag = _tag_column(tasks, options.tag_column, path) if any("annotations" not in task for _, task in tasks) else ""
    controls: set[str] = set()
    for where, task in tasks:
        if "annotations" in task:
            submitted = [one for one in task["annotations"] if not one.get("was_cancelled")]
            values = _results(submitted, options.tag_column, controls)
            data, seen = task.get("data", {}), bool(submitted)
        else:
            data, values, seen = {name: task[name] for name in task if name != tag}, _names(task.get(tag)), True
        if len(controls) > 1:
            raise ValueError(f"{where}: the controls {' and '.join(sorted(controls))} label images: pass --tag_column")
        yield Row(where, _files(data, options.file_column, where), options.tags(values), seen=seen)


def recognises(path: Path) -> bool:
    """Whether a file has what Label Studio writes with each task."""
    if path.suffix.lower() not in (".json", ".csv"):
        return False
    _, first = next(_tasks(path), ("", {}))
    return {"annotations", "data"} <= set(first) or bool({"annotation_id", "annotator", "lead_time"} & set(first))


def _tasks(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix.lower() == ".csv":
        for where, cells in csv_rows(path, delimiter_of(path)):
            yield where, {name: _cell(cell) for name, cell in cells.items()}
        return
    content = parse_json(read_text(path), path)
    if not isinstance(content, list) or not all(isinstance(task, dict) for task in content):
        raise ValueError(f"{path} is not a list of tasks: export from Label Studio as JSON, JSON-MIN or CSV")
    for number, task in enumerate(content, start=1):
        yield f"{path}, task {task.get('id', number)}", task


def _cell(text: str) -> Any:
    try:
        return json.loads(text) if text[:1] in ("[", "{") else text
    except ValueError:
        return text


def _results(annotations: list[dict], asked: str | None, controls: set[str]) -> list[str]:
    """The names that annotations give, in JSON; `controls` gathers where from."""
    found = []
    for annotation in annotations:
        for result in annotation.get("result", []):
            names = _names([result.get("value", {})]) if result.get("type") != "textarea" else []
            if names and asked in (None, result.get("from_name")):
                controls.add(str(result.get("from_name")))
                found += names
    return found


def _tag_column(tasks: list[tuple[str, dict]], asked: str | None, path: Path) -> str:
    """The key of the tags where tasks are flat: one that holds choices or regions, or has a usual name."""
    columns = list(dict.fromkeys(name for _, task in tasks for name in task))
    held = {
        name for _, task in tasks for name, value in task.items() if isinstance(value, list | dict) and _names(value)
    }
    return column_of(columns, asked, [name.casefold() for name in held] or TAG_COLUMNS, "tag", str(path))


def _names(value: Any) -> list[str]:
    """The names in the value of a control: text, choices, paths in a taxonomy, or regions with labels."""
    if value in (None, ""):
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        held = [value[key] for key in value if key in ("choices", "taxonomy") or key.endswith("labels")]
        return [name for one in held for name in _names(one)]
    # In a taxonomy a name is the end of a path.
    return [name for one in value for name in (one[-1:] if _is_path(one) else _names(one))]


def _is_path(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _files(data: dict[str, Any], asked: str | None, where: str) -> list[str]:
    texts = {name: value for name, value in data.items() if isinstance(value, str)}
    found = (
        [asked] if asked in texts else [name for name in texts if Path(_place(texts[name])).suffix.lower() in ENDINGS]
    )
    if len(found) != 1:
        raise ValueError(f"{where}: {len(found) or 'no'} images: pass --file_column with one of {', '.join(texts)}")
    file = _place(texts[found[0]])
    # What was uploaded bears eight digits before its name, and lies in a directory of the server.
    uploaded = re.fullmatch(r"/?data/upload/(?:\d+/)?((?:[0-9a-f]{8}-)?(.+))", file)
    return [uploaded[1], uploaded[2]] if uploaded else [file]


def _place(url: str) -> str:
    """The path in a URL: of a local file, an upload, a bucket, or a plain path."""
    if "/local-files/" in url:
        return parse_qs(urlsplit(url).query).get("d", [""])[0]
    if re.match(r"\w+://", url):
        return unquote(urlsplit(url).path).lstrip("/")
    return unquote(url) if url.startswith("/data/") else url
