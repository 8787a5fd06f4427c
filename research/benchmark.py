"""Where the time of a training step goes, and how it compares with plainer ways; tables and JSON in --output_dir.

    python research/benchmark.py --recipe voc-lite0 --scaling --output_dir runs/benchmark
    python research/benchmark.py --recipe voc-vit-b --classes 20 --variants fp32 bf16 straight

Nothing is downloaded: photos are drawn and the backbone starts from random weights. Every measurement runs in a process
of its own, since the peak of a process never falls, and the variants take turns. docs/speed.md explains the rows.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from speed import report

VARIANTS = {
    "fp32": ("package", "no"),
    "bf16": ("package", "bf16"),
    "sklearn": ("sklearn", "no"),
    "straight": ("straight", "no"),
}


def measured(*arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure, *arguments).result()


def _measure(*arguments: Any) -> dict[str, Any]:
    from speed.measure import measure  # loads torch: in the child alone

    return measure(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="voc-lite0", help="a YAML file, or the name of one in recipes/")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="recipe fields to replace")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each measurement")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each variant, in turns")
    parser.add_argument("--evaluation", action="store_true", help="also time prediction")
    parser.add_argument("--scaling", action="store_true", help="also vary size, batch, classes and scales")
    parser.add_argument("--cpu_time", action="store_true", help="CPU time, on a machine with other load; one thread")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args()
    unreadable = [pair for pair in arguments.set if "=" not in pair]
    if unreadable:
        parser.error(f"--set: {unreadable[0]!r} is no FIELD=VALUE")
    changes = {name: yaml.safe_load(value) for name, value in (pair.split("=", 1) for pair in arguments.set)}

    def run(kind: str, classes: int = arguments.classes, steps: int = arguments.steps, **more: Any) -> dict[str, Any]:
        return measured(kind, arguments.recipe, changes | more, steps, classes, arguments.cpu_time)

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"recipe": arguments.recipe, "changes": changes, "cpu_time": arguments.cpu_time}
    tables: list[str] = []

    def save_results() -> None:
        (arguments.output_dir / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    def save(table: str) -> None:
        print(table, end="\n\n", flush=True)
        tables.append(table)
        (arguments.output_dir / "benchmark.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
        save_results()

    results["floor"] = run("floor")
    results["warm-up share"] = results["floor"]["warm-up share"]
    floor = results["floor"]
    save(
        f"{arguments.recipe}, {arguments.classes} classes, {'CPU' if arguments.cpu_time else 'wall'} time, "
        f"{floor['device']}, {floor['threads']} threads, torch {floor['torch']}: "
        f"{sum(floor['flops'].values()) / 1e9:,.0f} GFLOP a step; matrix products "
        + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in floor["rates"].items())
    )
    for _ in range(arguments.rounds):
        for name in arguments.variants:
            kind, precision = VARIANTS[name]
            result = run(kind, mixed_precision=precision)
            earlier = results.get(name, {"steps": [], "memory": 0})
            results[name] = {
                "steps": earlier["steps"] + result["steps"],
                "memory": max(earlier["memory"], result["memory"]),
            }
            save_results()
            print(f"{name}: {report.seconds(report.median_step(result['steps'])):.3f} s", file=sys.stderr, flush=True)
    if arguments.variants:
        save(report.training_table(results))
    if arguments.evaluation:
        results["evaluation"] = run("evaluation")
        save(report.evaluation_table(results))
    if arguments.scaling:
        side = floor["crop_size"]
        results["scaling"] = {
            "image side": [(f * side, run("package", crop_size=int(f * side))) for f in (0.5, 1.0, 1.5, 2.0)],
            "batch": [(n, run("package", batch_size=n)) for n in (2, 4, 8)],
            "classes": [(n, run("package", classes=n)) for n in (20, 80, 1000)],
            "AN scales": [(len(s), run("package", label_scales=s)) for s in ([1.0], [1.0, 0.5], [1.0, 0.5, 1.5])],
        }
        save(report.scaling_table(results["scaling"]))
    print(f"saved in {arguments.output_dir}")


if __name__ == "__main__":
    main()
