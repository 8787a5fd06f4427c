"""Run one of the paper's ablation tables: every row trained from the same recipe with nothing but its switch changed.

    python research/ablate.py --table 3b --recipe voc-lite0 --data_dir VOC2012 --seeds 3
    python research/ablate.py --table 3b --recipe voc-lite0 --data_dir VOC2012 --rows CoSA "without CSC" --parallel 2

Every flag of scripts/train.py may follow and holds for all rows. Rows that were finished before are not run again.
Leaves OUTPUT_DIR/TABLE-SPLIT.csv, .json, .md and .png, and one directory for each run.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from ablation_report import write_results
from ablation_run import Protocol, describe, execute, plan, row_recipes
from ablation_tables import TABLES
from arguments import add_fusion, failure, positive
from plots import plot_ablation
from train import parse as parse_recipe

SCRIPTS = Path(os.path.relpath(Path(__file__).resolve().parent))


def main(args: argparse.Namespace, flags: list[str]) -> None:
    table = TABLES[args.table]
    flags = ["--recipe", args.recipe, *flags]
    base = parse_recipe(flags)
    recipes = row_recipes(table, base, args.rows)
    changes = describe(recipes, base)
    print(f"{args.table}: {table.title}")
    for row, change in changes.items():
        print(f"  {row}: {change}")
    protocol = Protocol(base.eval_split, tuple(args.scales), not args.no_flip)
    trainings = plan(args.table, table, recipes, flags, args.seeds, args.output_dir, protocol, SCRIPTS)
    failed = execute(trainings, args.parallel)

    paths, summary = write_results(args.table, table, changes, trainings, failed, args.output_dir)
    print(paths[-1].read_text(encoding="utf-8").split("\n## ")[0])
    print("written:", *paths, sep="\n  ")
    if summary:
        print(plot_ablation(summary, table.metric, table.title, paths[-1].with_suffix(".png")))
    if failed:
        sys.exit(f"error: {len(failed)} of {len(trainings)} runs failed; repeat the command to try them again")


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--table", required=True, choices=TABLES, help="which table or figure of the paper")
    parser.add_argument("--recipe", required=True, help="a YAML file, or the name of one in recipes/")
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each row (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these; the first in the table is compared with")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/ablations"), help="of the runs of all tables (%(default)s)"
    )
    parser.add_argument("--parallel", type=positive, default=1, help="runs side by side, then on one thread each")
    add_fusion(parser)
    return parser.parse_known_args()


if __name__ == "__main__":
    # Ended from outside, by a time limit say, it ends its runs too, as it does when interrupted from the keyboard.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
    try:
        main(*parse_args())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(failure(error))
