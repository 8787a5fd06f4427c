"""Score a model on a dataset with masks: segmentation with and without tags, CAM, auxiliary CAM, per class.

By default as the paper does, over five scales and mirrored images. Accelerate shares the images among all GPUs.

    cosa-hf evaluate runs/voc/assignment --dataset voc --data_dir VOC2012 --split val --report report.json
    accelerate launch -m cosa_hf.cli evaluate runs/voc/assignment --dataset voc --data_dir VOC2012
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from cosa_hf.commands.arguments import positive
from cosa_hf.commands.inputs import (
    add_crf,
    add_inference,
    add_model,
    crf_of,
    dataset_of,
    dataset_parser,
    parse_dataset_args,
    segmenter_of,
)
from cosa_hf.data import DatasetOptions
from cosa_hf.evaluation.evaluate import evaluate, format_report
from cosa_hf.evaluation.figures import save_visualizations
from cosa_hf.files import check_output, require_absent


def main(arguments: Sequence[str]) -> None:
    args, options = parse(arguments)
    check_output(args.report, instead="choose another --report")
    if args.panels is not None:
        check_output(args.panels, directory=True, replace=True)  # a run may have left its own in directories below
        require_absent(sorted(args.panels.glob("*.png")), f"choose another --panels, or remove {args.panels}")
    accelerator = Accelerator()
    segmenter = segmenter_of(args, accelerator.device, size=args.input_size, crf=crf_of(args))
    dataset = dataset_of(args, options, segmenter, masks=True)
    if args.num_images is not None:
        dataset = dataset.select(range(min(args.num_images, len(dataset))))
    report = evaluate(segmenter, dataset, dataset_name=args.dataset, split=args.split, accelerator=accelerator)
    if not accelerator.is_main_process:
        return
    print(format_report(report))
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=2) + "\n")
    print(f"report: {args.report}")
    if args.panels is not None:
        first = dataset.select(range(min(args.num_panels, len(dataset))))
        save_visualizations(segmenter, first, args.panels)
        print(f"visualizations of the first {len(first)} images: {args.panels}")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser("evaluate", __doc__)
    add_model(parser)
    parser.add_argument("--split", default="val", help="split of the dataset to score")
    parser.add_argument("--report", type=Path, default=Path("report.json"), help="JSON file to write")
    parser.add_argument(
        "--panels", type=Path, help="directory for visualizations of CAMs, predictions and ground truth (default: none)"
    )
    parser.add_argument(
        "--num_panels", type=positive, default=16, help="how many visualizations, from the start of the split"
    )
    parser.add_argument("--num_images", type=positive, help="score only the first N images (default: all)")
    add_inference(parser)
    parser.add_argument(
        "--input_size", type=positive, help="side in pixels that images are resized to (default: the processor's)"
    )
    add_crf(parser)
    return parse_dataset_args(parser, arguments)
