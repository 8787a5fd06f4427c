"""Segment photos: for each image a PNG of class ids and an overlay of the mask on the image.

The masks are those of `transformers.pipeline("image-segmentation", model=MODEL)`: one forward pass at the
processor's size, tags unknown. With --tags the classes that are not named are ruled out,
and with --crf a fully connected CRF refines what is left. No file is replaced without --overwrite.

    cosa-hf predict runs/voc/assignment cat.jpg street.png --output_dir masks
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cosa_hf.commands.arguments import command_parser
from cosa_hf.commands.inputs import add_crf, add_model, add_reading, crf_of, reading_of
from cosa_hf.data.images import UnreadableImageError
from cosa_hf.data.palette import mask_image
from cosa_hf.evaluation.figures import overlay
from cosa_hf.files import check_output
from cosa_hf.inference import Segmenter


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    check_names(args.images, args.output_dir, args.overwrite)
    segmenter = Segmenter.from_pretrained(args.model, crf=crf_of(args), spread=args.spread, reading=reading_of(args))
    tags = None if args.tags is None else known_tags(args.tags, segmenter.names)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    failed = []
    for path in args.images:
        try:
            found = segmenter(path, tags)
        except UnreadableImageError as error:
            failed.append(str(path))
            print(f"error: {error}", file=sys.stderr)
            continue
        mask = found.mask.cpu().numpy().astype(np.uint16)  # of a phone's photo int64 would take half a gigabyte
        mask_image(mask, len(segmenter.names) - 1).save(args.output_dir / f"{path.stem}.png")
        overlay(found.image, mask, segmenter.names).save(args.output_dir / f"{path.stem}_overlay.png")
        print(f"{path}: {', '.join(segmenter.names[index] for index in np.unique(mask))}")
        if args.crf and found.crf_size != found.image.size:
            print("  CRF at {} x {}, its result upsampled to {} x {}".format(*found.crf_size, *found.image.size))
    print(f"{len(args.images) - len(failed)} of {len(args.images)} images segmented into {args.output_dir}")
    if failed:
        raise ValueError(f"not segmented: {', '.join(failed)}")
    return 0


def check_names(paths: Sequence[Path], output_dir: Path, overwrite: bool) -> None:
    """Refuse directories, and inputs whose results would overwrite one another, an input or what is there already."""
    inputs = {path.resolve() for path in paths}
    written: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a directory; name the image files, for instance {path}/*.jpg")
        for name in (f"{path.stem}.png", f"{path.stem}_overlay.png"):
            if name in written:
                raise ValueError(f"{written[name]} and {path} would both be written to {name}; rename one of them")
            if (output_dir / name).resolve() in inputs:
                raise ValueError(f"input {output_dir / name} would be overwritten; choose another directory")
            written[name] = path
    for name in written:
        instead = "choose another --output_dir, pass --overwrite"
        check_output(output_dir / name, instead=instead, replace=overwrite)


def known_tags(text: str, names: Sequence[str]) -> list[str]:
    """Tags as they were typed, separated by commas, checked against the model's classes."""
    parts, tags = text.split(","), []
    while parts:
        # A class may have commas in its name: the longest that fits.
        joined = [",".join(parts[:count]).strip() for count in range(len(parts), 0, -1)]
        tags.append(next((name for name in joined if name in names[1:]), joined[-1]))
        del parts[: tags[-1].count(",") + 1]
    if unknown := [tag for tag in tags if tag not in names[1:]]:
        raise ValueError(f"unknown tags {unknown}; this model's classes are {'; '.join(names[1:])}")
    return tags


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("predict", __doc__)
    add_model(parser)
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="image files")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory for STEM.png and STEM_overlay.png")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there already")
    parser.add_argument(
        "--tags", help="comma-separated classes known to be in the images, e.g. cat,dog (default: unknown)"
    )
    add_reading(parser)
    add_crf(parser)
    parser.add_argument(
        "--spread", action="store_true", help="spread the masks by the encoder's affinity, of a model that names one"
    )
    return parser.parse_args(arguments)
