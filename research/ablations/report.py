"""The results of a table of ablations: CSV, JSON and Markdown from the reports of its runs."""

import csv
import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ablations.run import Training, slug
from ablations.tables import Table
from cosa_hf.evaluation.evaluate import PROTOCOLS

__all__ = ["metrics_of", "summarize", "write_results"]

#: The columns of a table: mIoU under each protocol, C-mIoU of the CAM, and precision of the classification (Fig. 1a).
METRICS = (*PROTOCOLS, "cam_coexistence", "cls_map")

Summary = dict[str, dict[str, dict[str, Any]]]


def metrics_of(report: dict[str, Any]) -> dict[str, float]:
    """The scores of one report that a table shows; those without a value are left out.

    Example:
        >>> scores = {"miou": 75.0, "coexistence_miou": None}
        >>> metrics_of({"seg": scores, "cam": scores, "cls_map": None})
        {'seg': 75.0, 'cam': 75.0}
    """
    values = {protocol: report[protocol]["miou"] for protocol in PROTOCOLS if protocol in report}
    values["cam_coexistence"] = report["cam"]["coexistence_miou"]
    values["cls_map"] = report.get("cls_map")
    return {metric: value for metric, value in values.items() if value is not None}


def summarize(results: Sequence[dict[str, Any]]) -> Summary:
    """Mean and sample standard deviation over the seeds, {row: {metric: {"mean", "std", "n"}}}; one seed has no std.

    Args:
        results: dicts with row, metric and value, one for each seed.

    Example:
        >>> summarize([{"row": "CoSA", "metric": "seg", "value": value} for value in (70.0, 73.0, 76.0)])
        {'CoSA': {'seg': {'mean': 73.0, 'std': 3.0, 'n': 3}}}
    """
    values: dict[str, dict[str, list[float]]] = {}
    for line in results:
        values.setdefault(line["row"], {}).setdefault(line["metric"], []).append(line["value"])
    return {
        row: {
            metric: {"mean": mean(found), "std": stdev(found) if len(found) > 1 else None, "n": len(found)}
            for metric, found in metrics.items()
        }
        for row, metrics in values.items()
    }


def write_results(
    name: str,
    table: Table,
    changes: dict[str, str],
    trainings: Sequence[Training],
    failed: dict[Path, str],
    output_dir: Path,
) -> tuple[list[Path], Summary]:
    """Gather the reports into `NAME-SPLIT.csv` (a line for each row, seed and metric), `.json` and `.md`.

    Args:
        name: of the table.
        table: for its title and the metric that the paper's table shows.
        changes: how each row differs, from `ablations.run.describe`.
        trainings: the runs, from `ablations.run.plan`.
        failed: from `ablations.run.execute`; these are named and have no scores.
        output_dir: where to write.

    Returns:
        The files, and mean and standard deviation of each row and metric.
    """
    protocol = trainings[0].protocol
    results = []
    for row in changes:
        for training in trainings:
            if row in training.rows and training.directory not in failed:
                run = {"table": name, "row": row, "seed": training.recipe.seed, "split": protocol.split}
                run |= {"network": training.network, "run": str(training.directory)}
                scores = metrics_of(json.loads(training.report.read_text(encoding="utf-8")))
                for metric, value in scores.items():
                    results.append(run | {"metric": metric, "value": value})
    summary = summarize(results)

    stem = f"{name}-{slug(protocol.split)}"
    paths = [output_dir / f"{stem}.{ending}" for ending in ("csv", "json", "md")]
    with paths[0].open("w", newline="", encoding="utf-8") as file:
        columns = ("table", "row", "seed", "split", "metric", "value", "network", "run")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)
    everything = {
        "table": name,
        "title": table.title,
        "metric": table.metric,
        "protocol": dataclasses.asdict(protocol),
        "changes": changes,
        "results": results,
        "summary": summary,
        "failed": {str(directory): reason for directory, reason in failed.items()},
        "commands": {str(training.directory): _commands(training) for training in trainings},
    }
    paths[1].write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    paths[2].write_text(_markdown(name, table, changes, trainings, failed, summary), encoding="utf-8")
    return paths, summary


def _markdown(
    name: str,
    table: Table,
    changes: dict[str, str],
    trainings: Sequence[Training],
    failed: dict[Path, str],
    summary: Summary,
) -> str:
    protocol, dataset = trainings[0].protocol, trainings[0].recipe.dataset
    metrics = [metric for metric in METRICS if any(metric in row for row in summary.values())]
    scales = ", ".join(f"{scale:g}" for scale in protocol.scales)
    flips = "with flips" if protocol.flip else "no flips"
    lines = [
        f"# {name}: {table.title}",
        "",
        f"mIoU in percent on `{protocol.split}` of `{dataset}`, scales {scales}, {flips}: "
        f"mean +- standard deviation over n seeds. The last column compares `{table.metric}`, which the paper's "
        "table shows, with the first row's. `seg`: tags unknown; all others: tags given; `cam_coexistence`: C-mIoU of "
        "the CAM; `cls_map`: mean average precision of the classification.",
        "",
        _row("row", "changed", "n", *metrics, "difference"),
        "|" + "---|" * (len(metrics) + 4),
    ]
    reference = summary.get(next(iter(changes)), {}).get(table.metric)
    for row, change in changes.items():
        found = summary.get(row, {})
        count = max((value["n"] for value in found.values()), default=0)
        own = found.get(table.metric)
        gap = f"{own['mean'] - reference['mean']:+.2f}" if own and reference and own is not reference else "-"
        lines.append(_row(row, change, str(count), *(_cell(found.get(metric)) for metric in metrics), gap))
    networks: dict[str, list[str]] = {training.network: [] for training in trainings}
    for training in trainings:
        networks[training.network] += [row for row in training.rows if row not in networks[training.network]]
    if len(networks) == 1:
        lines += ["", f"All rows are the {next(iter(networks))} network."]
    else:
        lines += ["", "Not all rows are the same network, because the recipe's schedule recommends another:", ""]
        lines += [f"- {network}: {', '.join(rows)}" for network, rows in networks.items()]
    if failed:
        lines += ["", "## Failed", "", *(f"- {directory}: {reason}" for directory, reason in failed.items())]
    lines += ["", "## Repeat a row"]
    for training in trainings:
        lines += ["", f"{training}:", "", "```sh", *_commands(training), "```"]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" +- {value['std']:.2f}")


def _commands(training: Training) -> list[str]:
    """What a reader types to repeat the run and its scores."""
    return [f"cosa-hf {shlex.join(command)}" for command in (training.train_command, training.evaluate_command)]
