"""Draw the masks that several models predict for the same images: a row for each image, a column for each model.

    python research/compare.py base=runs/base/assignment CoSA=runs/cosa/assignment --dataset shapes --output masks.png
    python research/compare.py MODEL ... --dataset voc --data_dir VOC2012 --source cam --output masks.png
    python research/compare.py MODEL ... --dataset folder --data_dir photos --split train --no_truth --output masks.png

The images are spread evenly over the split.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from arguments import (
    dataset_parser,
    named_paths,
    one_line_errors,
    segmenter_of,
)
from PIL import Image

from cosa_hf.commands.arguments import positive
from cosa_hf.commands.inputs import add_inference, dataset_of, parse_dataset_args
from cosa_hf.data import DatasetOptions
from cosa_hf.evaluation.evaluate import PROTOCOLS
from cosa_hf.evaluation.figures import comparison
from cosa_hf.files import check_output
from cosa_hf.inference import require_cams


@one_line_errors()
def main(arguments: list[str] | None = None) -> None:
    args, options = parse(arguments)
    check_output(args.output)
    if Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"cannot write {args.output}: unknown image format; end the name in .png or .jpg")
    models = named_paths(args.models)
    first = segmenter_of(args, next(iter(models.values())))
    dataset = dataset_of(args, options, first, masks=not args.no_truth)
    chosen = np.linspace(0, len(dataset) - 1, min(args.num_images, len(dataset))).round().astype(int)
    dataset = dataset.select(chosen)
    lines: dict[str, tuple] = {}
    for name, directory in models.items():
        segmenter = segmenter_of(args, directory)
        if args.source.startswith("cam"):
            require_cams(segmenter.model)
        for image in segmenter.predict(dataset):
            ground_truth = {} if args.no_truth else {"ground truth": image.ground_truth}
            _, masks = lines.setdefault(image.image_id, (image.image, ground_truth))
            masks[name] = image.label(args.source)[0]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    comparison(list(lines.values()), first.names).save(args.output)
    print(f"{args.output}: {', '.join(lines)}")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser(__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="directory of a model; NAME=DIRECTORY names it")
    parser.add_argument("--split", default="val", help="split of the dataset")
    parser.add_argument("--num_images", type=positive, default=6, help="number of images")
    parser.add_argument(
        "--source",
        choices=PROTOCOLS,
        default="seg_tags",
        help="; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items()) + "",
    )
    parser.add_argument("--no_truth", action="store_true", help="the data has no masks")
    parser.add_argument("--output", type=Path, required=True, help="image to write, PNG or JPEG")
    add_inference(parser)
    return parse_dataset_args(parser, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
