"""Run one of the paper's ablation tables: every row is trained from the same recipe, with only its switch changed.

    python research/ablate.py --table 3b --recipe voc-lite0 --data_dir VOC2012 --seeds 3
    python research/ablate.py --table 3b --recipe voc-lite0 --data_dir VOC2012 --rows CoSA "without CSC" --parallel 2

Every flag of `cosa-hf train` may follow and holds for all rows. Rows that were finished before are not run again.
Writes OUTPUT_DIR/TABLE-SPLIT.csv, .json, .md and .png, and one directory for each run.
"""

import argparse
import signal
import sys
from pathlib import Path

from ablations.report import write_results
from ablations.run import Protocol, describe, execute, plan, row_recipes
from ablations.tables import TABLES
from arguments import one_line_errors
from plots import plot_ablation

from cosa_hf.commands.arguments import HelpFormatter, positive
from cosa_hf.commands.train import parse as parse_recipe
from cosa_hf.inference import SCALES


@one_line_errors()
def main(arguments: list[str] | None = None) -> None:
    args, flags = parse(arguments)
    flags = ["--recipe", args.recipe, *flags]
    table, base = TABLES[args.table], parse_recipe(flags)
    recipes = row_recipes(table, base, args.rows)
    changes = describe(recipes, base)
    print(f"{args.table}: {table.title}")
    for row, change in changes.items():
        print(f"  {row}: {change}")
    protocol = Protocol(base.eval_split, tuple(args.scales), not args.no_flip)
    trainings = plan(args.table, table, recipes, flags, args.seeds, args.output_dir, protocol)
    failed = execute(trainings, args.parallel)

    paths, summary = write_results(args.table, table, changes, trainings, failed, args.output_dir)
    print(paths[-1].read_text(encoding="utf-8").split("\n## ")[0])
    print("written:", *paths, sep="\n  ")
    if summary:
        print(plot_ablation(summary, table.metric, table.title, paths[-1].with_suffix(".png")))
    if failed:
        sys.exit(f"error: {len(failed)} of {len(trainings)} runs failed; repeat the command to try them again")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--table", required=True, choices=TABLES, help="table or figure of the paper")
    parser.add_argument("--recipe", required=True, help="a YAML file, or the name of a recipe of the package")
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each row")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="only these rows, compared with the first of them in the table"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/ablations"),
        help="directory for the runs of all tables",
    )
    parser.add_argument("--parallel", type=positive, default=1, help="runs side by side, each on one thread")
    parser.add_argument("--scales", type=float, nargs="+", default=list(SCALES), help="scales of the evaluation")
    parser.add_argument("--no_flip", action="store_true", help="evaluate without mirrored images")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    # Terminated from outside, by a time limit for example, the command ends its runs too, as it does on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
    main()
