"""Draw what several models make of the same images: a line for each image, a column for each model.

    python research/compare.py base=runs/base/assignment CoSA=runs/cosa/assignment --dataset shapes --output compare.png
    python research/compare.py MODEL ... --dataset voc --data_dir VOC2012 --source cam --output compare.png
    python research/compare.py MODEL ... --dataset folder --data_dir photos --split train --no_truth --output compare.png

The images are spread evenly over the split.
"""

import argparse
from pathlib import Path

import numpy as np
from accelerate import PartialState
from arguments import add_inference, check_output, dataset_of, dataset_parser, inference_of, named_directories, positive
from PIL import Image
from transformers import AutoConfig

from cosa_hf.data import DatasetOptions
from cosa_hf.evaluation.evaluate import PROTOCOLS
from cosa_hf.evaluation.figures import comparison
from cosa_hf.evaluation.maps import label_names, predict_maps
from cosa_hf.inference import load_model, require_cams


def main(args: argparse.Namespace, options: DatasetOptions) -> None:
    try:
        check_output(args.output)
        if Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"cannot write {args.output}: unknown kind of picture; end its name in .png or .jpg")
        models = named_directories(args.models)
        config = AutoConfig.from_pretrained(next(iter(models.values())))
        dataset = dataset_of(args, options, config, masks=not args.no_truth)
        chosen = np.linspace(0, len(dataset) - 1, min(args.num_images, len(dataset))).round().astype(int)
        dataset = dataset.select(chosen)
        lines: dict[str, tuple] = {}
        for name, directory in models.items():
            model, processor = load_model(str(directory), PartialState().device)
            if args.source.startswith("cam"):
                require_cams(model)
            for maps in predict_maps(model, processor, dataset, **inference_of(args)):
                truth = {} if args.no_truth else {"truth": maps.truth}
                _, masks = lines.setdefault(maps.image_id, (maps.image, truth))
                masks[name] = maps.label(args.source, getattr(model.config, "cam_threshold", 0.5))[0]
        picture = comparison(list(lines.values()), label_names(config))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        picture.save(args.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{args.output}: {', '.join(lines)}")


def parse_args() -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser(__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="directory of a model; NAME=DIRECTORY names it")
    parser.add_argument("--split", default="val", help="part of the dataset to look at (default: %(default)s)")
    parser.add_argument("--num_images", type=positive, default=6, help="of it (default: %(default)s)")
    parser.add_argument(
        "--source",
        choices=PROTOCOLS,
        default="seg_tags",
        help="; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items()) + " (default: %(default)s)",
    )
    parser.add_argument("--no_truth", action="store_true", help="of data without masks")
    parser.add_argument("--output", type=Path, required=True, help="the picture, PNG or JPEG")
    add_inference(parser)
    options, args = parser.parse_args_into_dataclasses()
    return args, options


if __name__ == "__main__":
    main(*parse_args())
