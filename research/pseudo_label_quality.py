"""How good the pseudo-labels of a model are where masks exist: CAM, auxiliary CAM, their mean, threshold by threshold.

Example:
    python research/pseudo_label_quality.py runs/voc/assignment --dataset voc --data_dir VOC2012 --split train_aug
"""

import argparse
import json
from pathlib import Path

from accelerate import PartialState
from arguments import add_inference, add_model, check_output, dataset_of, dataset_parser, inference_of
from label_quality import THRESHOLDS, format_quality, pseudo_label_quality

from cosa_hf.data import DatasetOptions
from cosa_hf.inference import load_model


def main(args: argparse.Namespace, options: DatasetOptions) -> None:
    try:
        check_output(args.report)
        model, processor = load_model(args.model, PartialState().device)
        dataset = dataset_of(args, options, model.config, masks=True)
        report = pseudo_label_quality(model, processor, dataset, args.thresholds, **inference_of(args))
        print(format_quality(report))
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(report, indent=2) + "\n")
        print(f"report: {args.report}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def parse_args() -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser(__doc__)
    add_model(parser)
    parser.add_argument("--split", required=True, help="part of the dataset to score")
    parser.add_argument("--report", type=Path, default=Path("quality.json"), help="JSON file to write (%(default)s)")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="values of xi (default: %(default)s)"
    )
    add_inference(parser)
    options, args = parser.parse_args_into_dataclasses()
    return args, options


if __name__ == "__main__":
    main(*parse_args())
