"""What the measurements say, as tables; nothing here needs torch, so that the parent of all processes stays small."""

import math
from typing import Any

MODEL = ("AN forward", "ON forward", "ON backward")
# Of the straight version all but the pseudo-labels and the energy are one part, and one backward pass is all.
OBJECTIVE = (
    "pseudo-labels", "classification", "CAM2Seg (two)", "Seg2CAM", "separation", "dense energy", "objective, rest",
    "objective", "objective, backward",
)  # fmt: skip
ORDER = (
    "data", "AN forward", "pseudo-labels", "threshold", "ON forward", *OBJECTIVE[1:], "ON backward", "backward",
    "optimiser", "EMA", "telemetry", "rest",
)  # fmt: skip
AFTER_WARM_UP = {"AN forward", "threshold", *OBJECTIVE} - {"classification"}


def median_step(steps: list[dict[str, float]]) -> dict[str, float]:
    """The step in the middle of all by its time, without the data: whole, so that its parts add up.

    Example:
        >>> median_step([{"a": 3.0}, {"a": 1.0, "data": 9.0}, {"a": 2.0}])
        {'a': 2.0}
    """
    return sorted(steps, key=seconds)[(len(steps) - 1) // 2]


def seconds(step: dict[str, float]) -> float:
    """Of a step, without the data, which other processes prepare meanwhile."""
    return sum(value for part, value in step.items() if part != "data")


def exponent(sizes: list[float], times: list[float]) -> float:
    """b of time = a size^b, by least squares on logarithms.

    Example:
        >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    x, y = ([math.log(value) for value in values] for values in (sizes, times))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def training_table(results: dict[str, Any]) -> str:
    """One recipe: the variants as columns, the parts of a step as rows, then what the targets ask for."""
    variants = [name for name in ("fp32", "bf16", "sklearn", "straight") if name in results]
    steps = {name: median_step(results[name]["steps"]) for name in variants}
    parts = sorted({part for step in steps.values() for part in step}, key=ORDER.index)
    lines = [f"| seconds a step | {' | '.join(variants)} |", "|---|" + "---|" * len(variants)]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    for part in parts:
        row(part, [f"{steps[name][part]:.4f}" if part in steps[name] else "" for name in variants])
    row("**step without data**", [f"**{seconds(steps[name]):.3f}**" for name in variants])
    row("peak memory, GB", [f"{results[name]['memory'] / 1e9:.2f}" for name in variants])
    targets = {name: _targets(results, name, steps) for name in variants}
    for target in dict.fromkeys(key for values in targets.values() for key in values):
        row(target, [targets[name].get(target, "") for name in variants])
    return "\n".join(lines)


def _targets(results: dict[str, Any], name: str, steps: dict[str, dict[str, float]]) -> dict[str, str]:
    step, floor = steps[name], results["floor"]
    whole, straight = seconds(step), steps.get("straight")
    rate = floor["rates"]["bfloat16" if name == "bf16" else "float32"]
    found = {"FLOP floor, s": f"{sum(floor['flops'].values()) / rate:.3f}"}
    if name == "straight":
        return found
    share = {
        "model (at least 85 %)": sum(step.get(part, 0.0) for part in MODEL),
        "objective, threshold, EMA (at most 5 %)": sum(
            step.get(part, 0.0) for part in (*OBJECTIVE, "threshold", "EMA")
        ),
        "threshold (at most 1 %)": step.get("threshold", 0.0),
    }
    found |= {target: f"{100 * value / whole:.1f} %" for target, value in share.items()}
    if straight is not None:
        bare = seconds(straight) - straight.get("dense energy", 0.0)
        warm_up = sum(value for part, value in step.items() if part not in AFTER_WARM_UP | {"data"})
        warm = results["warm-up share"]
        run = warm * warm_up + (1 - warm) * whole
        found["as fast as straight"] = f"{seconds(straight) / whole:.2f} x"
        found["... without its dense energy"] = f"{bare / whole:.2f} x"
        found[f"... over a run with {100 * warm:.0f} % warm-up"] = f"{bare / run:.2f} x"
    return found


def scaling_table(curves: dict[str, list[tuple[float, dict[str, Any]]]]) -> str:
    """What varies as rows: seconds and peak memory of each point, and the fitted exponents."""
    lines = ["| varied | seconds a step | exponent | peak memory, GB |", "|---|---|---|---|"]
    for name, points in curves.items():
        sizes = [size for size, _ in points]
        times = [seconds(median_step(result["steps"])) for _, result in points]
        label = ", ".join(f"{size:g}" for size in sizes)
        shown = ", ".join(f"{time:.3f}" for time in times)
        memory = ", ".join(f"{result['memory'] / 1e9:.2f}" for _, result in points)
        lines.append(f"| {name} {label} | {shown} | {exponent(sizes, times):.2f} | {memory} |")
    return "\n".join(lines)


def evaluation_table(results: dict[str, Any]) -> str:
    rows = [f"| {name} | {value:.3f} |" for name, value in results["evaluation"]["seconds"].items()]
    return "\n".join(["| prediction, JPEG to label map | seconds an image |", "|---|---|", *rows])
