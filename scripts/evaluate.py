"""Score a model on a dataset with masks: segmentation with and without tags, CAM, auxiliary CAM, per class.

python scripts/evaluate.py runs/voc --dataset voc --data_dir VOC2012 --split val --report report.json
accelerate launch scripts/evaluate.py runs/voc ...        the images shared among all GPUs
"""

import argparse
import json
from pathlib import Path

from accelerate import Accelerator
from arguments import add_inference, add_model, check_output, dataset_of, dataset_parser, inference_of, positive

from cosa_hf.data import DatasetOptions
from cosa_hf.evaluation.crf import DenseCRF
from cosa_hf.evaluation.evaluate import evaluate_model, format_report
from cosa_hf.evaluation.figures import save_panels
from cosa_hf.evaluation.weights import weights_sha256
from cosa_hf.inference import load_model


def main(args: argparse.Namespace, options: DatasetOptions) -> None:
    size = {} if args.input_size is None else {"size": {"height": args.input_size, "width": args.input_size}}
    accelerator = Accelerator()
    try:
        check_output(args.report)
        if args.panels is not None:
            check_output(args.panels, directory=True)
        model, processor = load_model(args.model, accelerator.device, **size)
        dataset = dataset_of(args, options, model.config, masks=True)
        if args.num_images is not None:
            dataset = dataset.select(range(min(args.num_images, len(dataset))))
        inference = inference_of(args) | {"crf": DenseCRF() if args.crf else None}
        weights = weights_sha256(args.model)
        report = evaluate_model(
            model,
            processor,
            dataset,
            **inference,
            dataset_name=args.dataset,
            split=args.split,
            accelerator=accelerator,
        )
        if not accelerator.is_main_process:
            return
        report["weights_sha256"] = weights
        print(format_report(report))
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(report, indent=2) + "\n")
        print(f"report: {args.report}")
        if args.panels is not None:
            first = dataset.select(range(min(args.num_panels, len(dataset))))
            save_panels(model, processor, first, args.panels, **inference)
            print(f"panels of the first {len(first)} images: {args.panels}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def parse_args() -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser(__doc__)
    add_model(parser)
    parser.add_argument("--split", default="val", help="part of the dataset to score (default: %(default)s)")
    parser.add_argument("--report", type=Path, default=Path("report.json"), help="JSON file to write (%(default)s)")
    parser.add_argument(
        "--panels", type=Path, help="directory for pictures of CAMs, predictions and truth; none without"
    )
    parser.add_argument(
        "--num_panels", type=positive, default=16, help="pictures, from the start of the split (%(default)s)"
    )
    parser.add_argument("--num_images", type=positive, help="score only the first N images; all without")
    add_inference(parser)
    parser.add_argument(
        "--input_size",
        type=positive,
        help="side in pixels images are resized to; the processor's own without",
    )
    parser.add_argument("--crf", action="store_true", help="refine the segmentations, not the CAMs, with a dense CRF")
    options, args = parser.parse_args_into_dataclasses()
    return args, options


if __name__ == "__main__":
    main(*parse_args())
