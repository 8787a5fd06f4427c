"""Segment photographs: for each image a palette PNG of class ids and a picture of the mask over the image.

The masks are those of `transformers.pipeline("image-segmentation", model=MODEL)`: one forward pass at the
processor's size, tags unknown. With --tags the classes that are not named are ruled out,
and with --crf a fully connected CRF refines what is left. No file is replaced without --overwrite.

Example:
    python scripts/predict.py runs/voc cat.jpg street.png --output_dir masks
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from arguments import check_output
from PIL import Image

from cosa_hf import CoSAImageProcessor, CoSAOutput
from cosa_hf.evaluation.crf import DenseCRF
from cosa_hf.evaluation.figures import overlay
from cosa_hf.evaluation.maps import label_names
from cosa_hf.evaluation.palette import to_palette_image
from cosa_hf.image_processing_cosa import to_rgb
from cosa_hf.inference import load_model, segmentation_logits


def main(args: argparse.Namespace) -> None:
    try:
        check_names(args.images, args.output_dir, args.overwrite)
        model, processor = load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
        names = label_names(model.config)
        allowed = allowed_ids(args.tags, names)
        crf = DenseCRF() if args.crf else None
        args.output_dir.mkdir(parents=True, exist_ok=True)
        failed = []
        for path in args.images:
            try:
                with Image.open(path) as file:
                    image = to_rgb(file)
            except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, DecompressionBombError ...
                failed.append(path)
                print(f"error: cannot read {path}: {error}", file=sys.stderr)
                continue
            mask = segment(model, processor, image, allowed, crf)
            to_palette_image(mask).save(args.output_dir / f"{path.stem}.png")
            overlay(image, mask, names).save(args.output_dir / f"{path.stem}_overlay.png")
            print(f"{path}: {', '.join(names[index] for index in np.unique(mask))}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{len(args.images) - len(failed)} of {len(args.images)} images segmented into {args.output_dir}")
    if failed:
        raise SystemExit(f"error: not segmented: {', '.join(map(str, failed))}")


@torch.inference_mode()
def segment(model, processor, image: Image.Image, allowed: list[int], crf: DenseCRF | None) -> np.ndarray:
    """(H, W) class ids of one RGB image, out of the `allowed` ids only."""
    inputs = processor(image, return_tensors="pt").to(model.device)
    # Dropping a class, rather than lowering its logit to -inf, keeps the interpolation free of nan.
    logits = segmentation_logits(model(**inputs))[:, allowed]
    size = (image.height, image.width)
    if crf is not None:
        logits = crf(F.interpolate(logits, size=size, mode="bilinear")[0], image)[None]
    # Ours takes the logits of any network, and little memory for a large photo.
    (choice,) = CoSAImageProcessor().post_process_semantic_segmentation(CoSAOutput(logits=logits), target_sizes=[size])
    return np.array(allowed)[choice.cpu().numpy()]


def check_names(paths: list[Path], output_dir: Path, overwrite: bool) -> None:
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
        if not overwrite and (output_dir / name).exists():
            raise FileExistsError(f"{output_dir / name} exists: choose another directory, or pass --overwrite")
        check_output(output_dir / name)


def allowed_ids(tags: str | None, names: list[str]) -> list[int]:
    """Ids that may be predicted: all without tags, else background and the tagged classes."""
    if tags is None:
        return list(range(len(names)))
    wanted = [tag.strip() for tag in tags.split(",")]
    unknown = [tag for tag in wanted if tag not in names[1:]]
    if unknown:
        raise ValueError(f"unknown tags {unknown}; this model's classes are {', '.join(names[1:])}")
    return [0, *sorted({names.index(tag) for tag in wanted})]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="directory of a saved model, or its name on the Hub")
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="image files")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory for STEM.png and STEM_overlay.png")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there already")
    parser.add_argument("--tags", help="comma-separated classes known to be in the images, e.g. cat,dog; any without")
    parser.add_argument("--crf", action="store_true", help="refine the masks with a dense CRF; seconds per megapixel")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
