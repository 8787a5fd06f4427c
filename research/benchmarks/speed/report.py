"""The measurements as tables; nothing here needs torch, so that the parent of all processes stays small."""

import math
from typing import Any

MODEL = ("AN forward", "ON forward", "ON backward")
# The naive baseline has one phase for all losses but the dense energy, and one for the whole backward pass.
OBJECTIVE = (
    "pseudo-labels", "targets", "classification", "CAM2Seg (two)", "Seg2CAM", "separation", "dense energy",
    "objective, rest", "objective", "objective, backward",
)  # fmt: skip
ORDER = (
    "data", "AN forward", "pseudo-labels", "threshold", "targets", "ON forward", *OBJECTIVE[2:], "ON backward",
    "backward", "optimiser", "EMA", "telemetry", "rest",
)  # fmt: skip
AFTER_WARM_UP = {"AN forward", "threshold", *OBJECTIVE} - {"classification"}


def median_step(steps: list[dict[str, float]]) -> dict[str, float]:
    """The step whose time, without the data, is the median; a whole step, so that its phases add up.

    Example:
        >>> median_step([{"a": 3.0}, {"a": 1.0, "data": 9.0}, {"a": 2.0}])
        {'a': 2.0}
    """
    return sorted(steps, key=seconds)[(len(steps) - 1) // 2]


def seconds(step: dict[str, float]) -> float:
    """Time of a step without the data, which other processes prepare meanwhile."""
    return sum(value for phase, value in step.items() if phase != "data")


def exponent(sizes: list[float], times: list[float]) -> float:
    """b of time = a size^b, by least squares on logarithms.

    Example:
        >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    x, y = ([math.log(value) for value in values] for values in (sizes, times))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def heading(results: dict[str, Any], classes: int) -> str:
    """What was measured, on what machine."""
    bound = results["flop_bound"]
    clock = "CPU" if results["cpu_time"] else "wall"
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in bound["rates"].items())
    return (
        f"{results['recipe']}, {classes} classes, {clock} time, {bound['device']}, {bound['threads']} threads, "
        f"torch {bound['torch']}: {sum(bound['flops'].values()) / 1e9:,.0f} GFLOP a step; matrix products {rates}"
    )


def training_table(results: dict[str, Any]) -> str:
    """One recipe: the variants as columns, the phases of a step as rows, then the quantities that have targets."""
    variants = [name for name in ("fp32", "bf16", "sklearn", "naive") if name in results]
    steps = {name: median_step(results[name]["steps"]) for name in variants}
    phases = sorted({phase for step in steps.values() for phase in step}, key=ORDER.index)
    lines = [f"| seconds a step | {' | '.join(variants)} |", "|---|" + "---|" * len(variants)]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    for phase in phases:
        row(phase, [f"{steps[name][phase]:.4f}" if phase in steps[name] else "" for name in variants])
    row("**step without data**", [f"**{seconds(steps[name]):.3f}**" for name in variants])
    row("peak memory, GB", [f"{results[name]['memory'] / 1e9:.2f}" for name in variants])
    targets = {name: _targets(results, name, steps) for name in variants}
    for target in dict.fromkeys(key for values in targets.values() for key in values):
        row(target, [targets[name].get(target, "") for name in variants])
    return "\n".join(lines)


def _targets(results: dict[str, Any], name: str, steps: dict[str, dict[str, float]]) -> dict[str, str]:
    step, bound = steps[name], results["flop_bound"]
    whole = seconds(step)
    rate = bound["rates"]["bfloat16" if name == "bf16" else "float32"]
    found = {"FLOP lower bound, s": f"{sum(bound['flops'].values()) / rate:.3f}"}
    if name == "naive":
        return found
    shares = {
        "model (at least 85 %)": MODEL,
        "objective, threshold, EMA (at most 5 %)": (*OBJECTIVE, "threshold", "EMA"),
        "threshold (at most 1 %)": ("threshold",),
    }
    for target, phases in shares.items():
        found[target] = f"{100 * sum(step.get(phase, 0.0) for phase in phases) / whole:.1f} %"
    if "naive" in steps:
        naive = seconds(steps["naive"])
        bare = naive - steps["naive"].get("dense energy", 0.0)
        warm_up = sum(value for phase, value in step.items() if phase not in AFTER_WARM_UP | {"data"})
        share = bound["warm-up share"]
        run = share * warm_up + (1 - share) * whole
        found["speed-up over the naive baseline"] = f"{naive / whole:.2f} x"
        found["... without its dense energy"] = f"{bare / whole:.2f} x"
        found[f"... over a run with {100 * share:.0f} % warm-up"] = f"{bare / run:.2f} x"
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
    """Prediction of whole images, with and without CRF (Tab. 6b).

    Example:
        >>> print(evaluation_table({"evaluation": {"seconds": {"single scale": {"no CRF": 0.25, "CRF": 0.5}}}}))
        | images/s, JPEG to label map | no CRF | CRF |
        |---|---|---|
        | single scale | 4.00 | 2.00 |
    """
    seconds = results["evaluation"]["seconds"]
    columns = list(next(iter(seconds.values())))
    rows = [
        f"| {name} | {' | '.join(f'{1 / row[column]:.2f}' for column in columns)} |" for name, row in seconds.items()
    ]
    return "\n".join(
        [f"| images/s, JPEG to label map | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *rows]
    )
