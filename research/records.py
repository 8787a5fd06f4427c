"""What runs have written down about themselves: precision of the classification (Fig. 1a), xi over time (Fig. 9).

No model is loaded: the numbers come from the reports of `cosa-hf evaluate` and from the log of a run.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["RECORDS", "classification_precision", "reports_of", "thresholds_over_time"]


def classification_precision(name: str, path: Path) -> list[dict[str, Any]]:
    """Fig. 1a: mean average precision of the classification, from every report of a run, or from one report.

    Give a run with and a run without guidance, or the four rows of `ablate.py --table fig1`.

    Args:
        name: of the run.
        path: its directory, with one or more report*.json in it, or the file of one report.

    Returns:
        A row for each report: run, split, images, cls_map (percent).

    Raises:
        FileNotFoundError: there is no report.
        ValueError: a report without `cls_map`: an older version wrote it, or the model only segments.
    """
    rows = []
    for file, report in reports_of(path):
        if report.get("cls_map") is None:
            raise ValueError(f"{file} has no cls_map: score the model again with `cosa-hf evaluate`")
        row = {"run": name, "split": report["protocol"]["split"] or file.stem, "images": report["images"]}
        rows.append(row | {"cls_map": report["cls_map"]})
    return rows


def reports_of(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The reports in a run's directory by their names, or the one report that a file is.

    Raises:
        FileNotFoundError: the directory has no report*.json.
    """
    files = sorted(path.glob("report*.json")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no report*.json in {path}: score its model with `cosa-hf evaluate --report`")
    for file in files:
        yield file, json.loads(file.read_text(encoding="utf-8"))


def thresholds_over_time(name: str, path: Path) -> list[dict[str, Any]]:
    """Fig. 9, left: xi of M' and of M†' over the steps of a run.

    Args:
        name: of the run.
        path: its directory, finished or not, or its log.jsonl.

    Returns:
        A row for each entry of the log that has them: run, step, xi, aux_xi.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: no entry has them.
    """
    file = path / "log.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no log.jsonl in {path}: MODEL is the directory of a run")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line
    rows = [{"run": name} | {key: entry[key] for key in ("step", "xi", "aux_xi")} for entry in entries if "xi" in entry]
    if not rows:
        raise ValueError(f"{file} has no xi in any of its {len(entries)} entries")
    return rows


RECORDS: dict[str, Callable[[str, Path], list[dict[str, Any]]]] = {
    "1a": classification_precision,
    "9": thresholds_over_time,
}
"""By the number of the paper's figure."""
