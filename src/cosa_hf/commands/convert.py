"""Convert what others released into what this package reads.

    cosa-hf convert checkpoint voc_weights.pth runs/voc-released --dataset voc      the authors' weights, as a model
    cosa-hf convert coco-masks --data_dir coco --split val2014                      COCO's annotations, as masks

The weights are a download of your own; this package ships none. The file is read without running code in it. The way
back is `cosa-hf export --format official`.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from cosa_hf.commands.arguments import HelpFormatter, command_parser
from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.data.coco import write_masks
from cosa_hf.files import check_output
from cosa_hf.inference import save_model
from cosa_hf.publishing.official import DATASETS, from_official


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    {"checkpoint": convert_checkpoint, "coco-masks": convert_coco_masks}[args.what](args)


def convert_checkpoint(args: argparse.Namespace) -> None:
    check_output(args.target, directory=True)
    model, processor = from_official(args.source, args.dataset, args.backbone, args.aux_layer)
    save_model(model, processor, args.target)
    print(
        f"{args.target}: {model.num_parameters() / 1e6:.1f} M parameters, {model.config.num_classes} classes, "
        f"auxiliary layer {args.aux_layer}\n"
        "size and normalisation are the released evaluation's; scales and flips are flags of `cosa-hf evaluate`, which "
        "has the released ones by default:\n"
        f"  cosa-hf evaluate {args.target} --dataset {args.dataset} --data_dir DIR --split val"
    )


def convert_coco_masks(args: argparse.Namespace) -> None:
    counts = write_masks(args.data_dir, args.split, args.num_workers)
    print(
        f"{counts.images} masks in {counts.directory}: {counts.written} written, "
        f"{counts.images - counts.written} were there; {counts.untagged} images have no annotation"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("convert", __doc__)
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True, help="checkpoint or coco-masks")

    checkpoint = kinds.add_parser(
        "checkpoint",
        description="A checkpoint of the authors' code into a directory that from_pretrained loads.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    checkpoint.add_argument("source", metavar="SOURCE", help="checkpoint of the authors' code")
    checkpoint.add_argument("target", metavar="OUT", type=Path, help="directory to write")
    checkpoint.add_argument(
        "--dataset", choices=sorted(DATASETS), required=True, help="whose class names the model gets: the file has none"
    )
    checkpoint.add_argument("--backbone", default=CoSAConfig.backbone, help="timm name of the ViT")
    checkpoint.add_argument("--aux_layer", type=int, default=-3, help="layer of the auxiliary head")

    masks = kinds.add_parser(
        "coco-masks",
        description="The masks of a COCO split as palette PNGs in DATA_DIR/masks/SPLIT, where the reader looks.\n"
        "Needs pycocotools (pip install 'cosa-hf[coco]'). Run again after an interruption: masks that are there stay.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    masks.add_argument("--data_dir", type=Path, required=True, help="directory with annotations/ and train2014/")
    masks.add_argument("--split", required=True, help="train2014, val2014, or any with its annotations")
    masks.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that draw")
    return parser.parse_args(arguments)
