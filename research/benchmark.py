"""Where the time of a training step goes, and how fast it is beside a naive baseline; prediction with and without CRF.

    python research/benchmark.py --recipe voc-lite0 --scaling --output_dir runs/benchmark
    python research/benchmark.py --recipe voc-vit-b --variants fp32 bf16 naive
    python research/benchmark.py --recipe voc-vit-b --variants --evaluation      Tab. 6b: images per second, CRF or not

Nothing is downloaded: photos are drawn and the backbone starts from random weights. Every measurement runs in a process
of its own, since the peak memory of a process never falls, and the variants take turns. Writes benchmark.md and
benchmark.json; notes/speed.md explains the rows.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from benchmarks.speed import report

#: What is measured in each variant, and in which precision.
VARIANTS = {
    "fp32": ("package", "no"),
    "bf16": ("package", "bf16"),
    "sklearn": ("sklearn", "no"),
    "naive": ("naive", "no"),
}


def measured(*arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure, *arguments).result()


def _measure(*arguments: Any) -> dict[str, Any]:
    from benchmarks.speed.measure import measure  # loads torch: in the child process alone

    return measure(*arguments)


class Benchmark:
    """The measurements that the flags ask for, written after each of them."""

    def __init__(self, args: argparse.Namespace, changes: dict[str, Any]) -> None:
        self.args, self.changes = args, changes
        self.results: dict[str, Any] = {"recipe": args.recipe, "changes": changes, "cpu_time": args.cpu_time}
        self.tables: list[str] = []
        args.output_dir.mkdir(parents=True, exist_ok=True)

    def run(self, kind: str, classes: int | None = None, **changes: Any) -> dict[str, Any]:
        args = self.args
        changes = self.changes | changes
        return measured(kind, args.recipe, changes, args.steps, classes or args.classes, args.cpu_time)

    def save(self, table: str | None = None) -> None:
        if table is not None:
            print(table, end="\n\n", flush=True)
            self.tables.append(table)
        for name, text in (("json", json.dumps(self.results, indent=1)), ("md", "\n\n".join(self.tables))):
            (self.args.output_dir / f"benchmark.{name}").write_text(text + "\n", encoding="utf-8")

    def bound(self) -> None:
        self.results["flop_bound"] = self.run("flop_bound")
        self.save(report.heading(self.results, self.args.classes))

    def variants(self) -> None:
        for _ in range(self.args.rounds):
            for name in self.args.variants:
                kind, precision = VARIANTS[name]
                result = self.run(kind, mixed_precision=precision)
                earlier = self.results.get(name, {"steps": [], "memory": 0})
                steps, memory = earlier["steps"] + result["steps"], max(earlier["memory"], result["memory"])
                self.results[name] = {"steps": steps, "memory": memory}
                self.save()
                seconds = report.seconds(report.median_step(result["steps"]))
                print(f"{name}: {seconds:.3f} s", file=sys.stderr, flush=True)
        self.save(report.training_table(self.results))

    def evaluation(self) -> None:
        self.results["evaluation"] = self.run("evaluation")
        self.save(report.evaluation_table(self.results))

    def scaling(self) -> None:
        side = self.results["flop_bound"]["crop_size"]
        self.results["scaling"] = {
            "image side": [(f * side, self.run("package", crop_size=int(f * side))) for f in (0.5, 1.0, 1.5, 2.0)],
            "batch": [(n, self.run("package", batch_size=n)) for n in (2, 4, 8)],
            "classes": [(n, self.run("package", classes=n)) for n in (20, 80, 1000)],
            "AN scales": [
                (len(scales), self.run("package", label_scales=scales))
                for scales in ([1.0], [1.0, 0.5], [1.0, 0.5, 1.5])
            ],
        }
        self.save(report.scaling_table(self.results["scaling"]))


def main(arguments: list[str] | None = None) -> None:
    args, changes = parse(arguments)
    benchmark = Benchmark(args, changes)
    benchmark.bound()
    if args.variants:
        benchmark.variants()
    if args.evaluation:
        benchmark.evaluation()
    if args.scaling:
        benchmark.scaling()
    print(f"saved in {args.output_dir}")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="voc-lite0", help="a YAML file, or a recipe's name (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="recipe fields to replace")
    parser.add_argument("--classes", type=int, default=20, help="number of classes (default: %(default)s)")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), help="(default: all)")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each variant, in turns (%(default)s)")
    parser.add_argument("--evaluation", action="store_true", help="also time prediction, with and without CRF")
    parser.add_argument("--scaling", action="store_true", help="also vary size, batch, classes and scales")
    parser.add_argument("--cpu_time", action="store_true", help="CPU time, on a machine with other load; one thread")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/benchmark"), help="directory to write (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    unreadable = [pair for pair in args.set if "=" not in pair]
    if unreadable:
        parser.error(f"--set: {unreadable[0]!r} is not FIELD=VALUE")
    return args, {name: yaml.safe_load(value) for name, value in (pair.split("=", 1) for pair in args.set)}


if __name__ == "__main__":
    main()
