"""Read a dataset once from end to end and say what would spoil training: broken files, contradictions, leaks.

Exit code 0: nothing must be mended; 1: something must.

Example:
    python scripts/check_data.py --dataset folder --data_dir photos --split train val
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from arguments import check_output, dataset_parser
from datasets import Dataset

from cosa_hf.data import DatasetOptions, class_names, load_dataset_by_name
from cosa_hf.data.check import check_splits, format_findings
from cosa_hf.data.folder import unnamed_pictures


def main(args: argparse.Namespace, options: DatasetOptions) -> int:
    splits = {}
    try:
        if args.report is not None:
            check_output(args.report)
        for split in args.split:
            splits[split] = load(args, split, options)
            # Classes found in the first split hold for all.
            options = dataclasses.replace(options, classes=class_names(splits[split]))
        found = check_splits(splits, args.num_workers)
        if args.dataset == "folder" and (unnamed := unnamed_pictures(args.data_dir)):
            found.look["unnamed"] = unnamed
        print(format_findings(found))
        if args.report is not None:
            args.report.parent.mkdir(parents=True, exist_ok=True)
            args.report.write_text(json.dumps(vars(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"all findings: {args.report}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    return 1 if found.mend else 0


def load(args: argparse.Namespace, split: str, options: DatasetOptions) -> Dataset:
    """The split with its masks where it has any."""
    try:
        return load_dataset_by_name(args.dataset, args.data_dir, split, masks=True, options=options)
    except (ValueError, FileNotFoundError) as error:
        dataset = load_dataset_by_name(args.dataset, args.data_dir, split, options=options)
        print(f"masks of split {split!r} are not checked (training from tags needs none): {error}")
        return dataset


def parse_args() -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser(__doc__)
    parser.add_argument("--split", nargs="+", default=["train"], help="splits to read and compare (%(default)s)")
    parser.add_argument("--report", type=Path, help="JSON file for all findings; the first of each kind are printed")
    parser.add_argument(
        "--num_workers", type=int, default=os.cpu_count(), help="processes that read (default: %(default)s)"
    )
    options, args = parser.parse_args_into_dataclasses()
    return args, options


if __name__ == "__main__":
    sys.exit(main(*parse_args()))
