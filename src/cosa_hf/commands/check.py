"""Read a dataset once from end to end and say what would spoil training: broken files, contradictions, leaks.

Exit status 0: no errors; 1: something must be put right.

    cosa-hf check --dataset folder --data_dir photos --split train val
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from cosa_hf.commands.inputs import dataset_parser, options_of, parse_dataset_args
from cosa_hf.data import DatasetOptions, class_names, load_dataset_by_name
from cosa_hf.data.check import check_splits, format_findings
from cosa_hf.data.folder import unnamed_images
from cosa_hf.data.options import PictureConfig
from cosa_hf.files import check_output


def main(arguments: Sequence[str]) -> int:
    args, options = parse(arguments)
    pictures = options_of(args, PictureConfig)
    if args.report is not None:
        check_output(args.report, instead="choose another --report")
    splits = {}
    for split in args.split:
        splits[split] = load(args, split, options)
        # Classes found in the first split hold for all.
        options = dataclasses.replace(options, classes=class_names(splits[split]))
    found = check_splits(splits, args.num_workers, pictures=pictures)
    if args.dataset == "folder" and (unnamed := unnamed_images(args.data_dir)):
        found.warnings["unnamed"] = unnamed
    print(format_findings(found))
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(vars(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"all findings: {args.report}")
    return 1 if found.errors else 0


def load(args: argparse.Namespace, split: str, options: DatasetOptions) -> Dataset:
    """The split with its masks where it has any."""
    try:
        return load_dataset_by_name(args.dataset, args.data_dir, split, masks=True, options=options)
    except (ValueError, FileNotFoundError) as error:
        if options.mask_values:
            raise
        dataset = load_dataset_by_name(args.dataset, args.data_dir, split, options=options)
        print(f"masks of split {split!r} are not checked (training from tags needs none): {error}")
        return dataset


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser("check", __doc__, PictureConfig)
    parser.add_argument("--split", nargs="+", default=["train"], help="splits to read and compare")
    parser.add_argument("--report", type=Path, help="JSON file for all findings; the first of each kind are printed")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that read")
    return parse_dataset_args(parser, arguments)
