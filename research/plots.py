"""Tables as plots: ablations, and the paper's figures from what `analyses` measured and `records` read.

Needs matplotlib (`pip install -e ".[research]"`); the tables do not.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_ablation", "plot_figure"]

Rows = Sequence[dict[str, Any]]


def plot_ablation(summary: dict[str, dict[str, dict[str, Any]]], metric: str, title: str, path: Path) -> str:
    """Mean and standard deviation of one metric, a line for each row of an ablation table.

    Args:
        summary: {row: {metric: {"mean", "std", "n"}}}.
        metric: the one to draw; rows that do not have it are left out.
        title: of the plot.
        path: PNG to write.

    Returns:
        A sentence: where the plot is, or that there is none and why.
    """
    rows = {row: metrics[metric] for row, metrics in summary.items() if metric in metrics}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        means, spreads = [row["mean"] for row in rows.values()], [row["std"] or 0.0 for row in rows.values()]
        axes.errorbar(means, range(len(rows)), xerr=spreads, fmt="o", capsize=3)
        if means:
            axes.axvline(means[0], color="0.8", zorder=0)
        axes.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=f"{metric}, mIoU (%)", title=title)
        axes.margins(y=0.2)
        axes.invert_yaxis()

    return _save(draw, path, (8, 1.5 + 0.35 * len(rows)))


def plot_figure(figure: str, rows: Rows, path: Path) -> str:
    """One figure of the paper from its table.

    Args:
        figure: a key of `analyses.ANALYSES` or `records.RECORDS`.
        rows: from one of these, those of an analysis with run, step and network.
        path: PNG to write.

    Returns:
        A sentence: where the plot is, or that there is none and why.
    """
    draw, columns = _DRAWN[figure]
    height = 4.0 * (len(_distinct(rows, "run")) if figure == "3" else 1)
    return _save(lambda canvas: draw(canvas, rows), path, (5.0 * columns, height))


def _accuracy(figure: Any, rows: Rows) -> None:
    runs = _distinct(rows, "run")
    grid = figure.subplots(len(runs), 3, squeeze=False)
    for (heat, curve, spread), run in zip(grid, runs, strict=True):
        own = [row for row in rows if row["run"] == run]
        steps = _distinct(own, "step")
        by_confidence = [[row for row in own if _is(row, step, "confidence")] for step in steps]
        accuracy = [[_number(row["accuracy"]) for row in line] for line in by_confidence]
        image = heat.imshow(
            accuracy, aspect="auto", origin="lower", extent=(0, 1, -0.5, len(steps) - 0.5), vmin=0, vmax=100
        )
        figure.colorbar(image, ax=heat)
        heat.set(yticks=range(len(steps)), yticklabels=steps, xlabel="confidence", ylabel="step")
        heat.set_title(f"{run}: accuracy of CPL (%)")
        for step, line in zip(steps, by_confidence, strict=True):
            uncertain = [row for row in own if _is(row, step, "perplexity")]
            curve.plot([row["low"] for row in uncertain], [_number(row["accuracy"]) for row in uncertain], label=step)
            total = sum(row["pixels"] for row in line) or 1
            (drawn,) = spread.plot([row["low"] for row in line], [row["pixels"] / total for row in line], label=step)
            spread.axvline(line[0]["threshold"], color=drawn.get_color(), linestyle=":")
        curve.set(xlabel="perplexity (lower end of the bin)", ylabel="accuracy (%)")
        spread.set(xlabel="confidence (dotted: xi)", ylabel="share of pixels", yscale="log")
        curve.legend(title="step")


def _filtered(figure: Any, rows: Rows) -> None:
    for axes, pixels in zip(figure.subplots(1, 2, sharey=True), ("all", "certain"), strict=True):
        chosen = [row for row in rows if row["pixels"] == pixels]
        _lines(axes, chosen, "miou", lambda row: (row["run"], row["map"]))
        axes.set(title=f"CPL, {pixels} pixels", ylabel="mIoU (%)")


def _networks(figure: Any, rows: Rows) -> None:
    for axes, labels in zip(figure.subplots(1, 2, sharey=True), ("SPL", "CPL"), strict=True):
        _lines(axes, [row for row in rows if row["labels"] == labels], "miou", lambda row: (row["run"], row["network"]))
        axes.set(title=labels, ylabel="mIoU (%)")


def _reliability(figure: Any, rows: Rows) -> None:
    *boxes, over_time = figure.subplots(1, 4)
    runs = _distinct(rows, "run")
    for axes, column in zip(boxes, ("miou", "perplexity", "mae"), strict=True):
        series = []
        for run in runs:
            last = max(row["step"] for row in rows if row["run"] == run)
            at_end = [row[column] for row in rows if row["run"] == run and row["step"] == last]
            series.append([value for value in at_end if value is not None])
        axes.boxplot(series)
        axes.set(xticks=range(1, len(runs) + 1), xticklabels=runs, title=f"{column} of each image's CPL, at the end")
    means = []
    for run in runs:
        for step in _distinct([row for row in rows if row["run"] == run], "step"):
            found = [row["perplexity"] for row in rows if row["run"] == run and row["step"] == step]
            means.append({"run": run, "step": step, "perplexity": sum(found) / len(found)})
    _lines(over_time, means, "perplexity", lambda row: (row["run"],))
    over_time.set(ylabel="mean perplexity")


def _coexistence(figure: Any, rows: Rows) -> None:
    heights = {column: [_number(row[column]) for row in rows] for column in ("c_miou", "miou")}
    _bars(figure.subplots(), [row["run"] for row in rows], heights, "CPL (%)")


def _classification(figure: Any, rows: Rows) -> None:
    runs, heights = _distinct(rows, "run"), {}
    for split in _distinct(rows, "split"):
        found = {row["run"]: row["cls_map"] for row in rows if row["split"] == split}
        heights[split] = [_number(found.get(run)) for run in runs]
    _bars(figure.subplots(), runs, heights, "mean average precision of the classification (%)")


def _thresholds(figure: Any, rows: Rows) -> None:
    for axes, column in zip(figure.subplots(1, 2, sharey=True), ("xi", "aux_xi"), strict=True):
        _lines(axes, rows, column, lambda row: (row["run"],), marker="")
        axes.set(title="xi of M" if column == "xi" else "xi of M†", ylabel=column)


_DRAWN: dict[str, tuple[Callable[[Any, Rows], None], int]] = {
    "1a": (_classification, 1),
    "3": (_accuracy, 3),
    "4": (_filtered, 2),
    "6": (_networks, 2),
    "7": (_reliability, 4),
    "9": (_thresholds, 2),
    "4b": (_coexistence, 1),
}


def _bars(axes: Any, names: list[str], heights: dict[str, list[float]], ylabel: str) -> None:
    """A group of bars for each name, one bar for each series."""
    width = 0.8 / len(heights)
    for index, (label, values) in enumerate(heights.items()):
        offset = (index - (len(heights) - 1) / 2) * width
        bars = axes.bar([place + offset for place in range(len(names))], values, width=width, label=label)
        axes.bar_label(bars, fmt="%.1f")
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel=ylabel)
    axes.legend()


def _lines(
    axes: Any, rows: Rows, column: str, key: Callable[[dict[str, Any]], tuple[str, ...]], marker: str = "o"
) -> None:
    """A line over the steps for each value of `key`."""
    series: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for row in rows:
        series.setdefault(key(row), []).append((row["step"], _number(row[column])))
    for name, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=", ".join(name))
    axes.set_xlabel("step")
    axes.legend()


def _distinct(rows: Iterable[dict[str, Any]], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _is(row: dict[str, Any], step: int, against: str) -> bool:
    return row["step"] == step and row["against"] == against


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _save(draw: Callable[[Any], None], path: Path, size: tuple[float, float]) -> str:
    try:
        from matplotlib.figure import Figure  # an extra: only the plots need it
    except ModuleNotFoundError:
        return f'no {path}: matplotlib is not installed (pip install -e ".[research]")'
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=120)
    return str(path)
