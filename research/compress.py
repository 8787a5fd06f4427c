"""A smaller copy of a model: fewer decoder channels, weights stored as float16 and computed with as float32.

Channels are chosen and fitted on a few hundred images, without labels and without training. CAMs change by the rounding
alone; score the segmentation again with scripts/evaluate.py.

Example:
    python research/compress.py runs/voc/assignment small --decoder_channels 384 --dataset voc --data_dir VOC2012
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from arguments import add_model, check_output, dataset_of, dataset_parser, positive
from narrowing import narrow_decoder, save_half
from torch import Tensor

from cosa_hf.data import DatasetOptions, read_image, undecoded
from cosa_hf.inference import load_model


def main(args: argparse.Namespace, options: DatasetOptions) -> None:
    try:
        check_output(args.target, directory=True)
        if args.target.is_dir() and any(args.target.iterdir()):  # perhaps MODEL itself
            raise ValueError(f"{args.target} is not empty: name a new directory for the copy")
        model, processor = load_model(args.model, "cpu")
        dataset = undecoded(dataset_of(args, options, model.config))
        chosen = dataset.shuffle(seed=0).select(range(min(args.num_images, len(dataset))))

        def images() -> Iterator[Tensor]:
            for row in chosen:
                yield processor(read_image(row), return_tensors="pt").pixel_values

        small = narrow_decoder(model, images(), args.decoder_channels)
        save_half(small, args.target)
        processor.save_pretrained(args.target)
        size = (args.target / "model.safetensors").stat().st_size
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{args.target}: {size / 1e6:.1f} MB, {small.num_parameters() / 1e6:.2f} M parameters")


def parse_args() -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser(__doc__)
    add_model(parser)
    parser.add_argument("target", metavar="OUT", type=Path, help="directory to write, new or empty")
    parser.add_argument("--decoder_channels", type=positive, required=True, help="of the copy")
    parser.add_argument("--split", default="train_aug", help="part of the dataset to fit to (default: %(default)s)")
    parser.add_argument("--num_images", type=positive, default=128, help="drawn from the split (default: %(default)s)")
    options, args = parser.parse_args_into_dataclasses()
    return args, options


if __name__ == "__main__":
    main(*parse_args())
