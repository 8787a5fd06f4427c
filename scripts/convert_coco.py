"""Write the masks of a COCO split once, as palette PNGs, where the reader looks for them: DATA_DIR/masks/SPLIT.

Needs pycocotools (pip install -e ".[coco]"). Run again after an interruption: masks that are there stay.

Example:
    python scripts/convert_coco.py --data_dir coco --split val2014
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from cosa_hf.data.coco import read_instances, render_mask
from cosa_hf.data.tags import name_some
from cosa_hf.evaluation.palette import to_palette_image
from cosa_hf.files import remove_unfinished, whole_file


def main(args: argparse.Namespace) -> None:
    try:
        instances = read_instances(args.data_dir, args.split)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    sizeless = [
        image["file_name"]
        for image in instances.images
        if not all(isinstance(image.get(side), int) for side in ("height", "width"))
    ]
    if sizeless:
        raise SystemExit(f"error: the annotations give no height and width for {name_some(sizeless, 'image')}")
    directory = args.data_dir / "masks" / args.split
    directory.mkdir(parents=True, exist_ok=True)
    remove_unfinished(directory)
    present = {path.stem for path in directory.glob("*.png")}
    images = [image for image in instances.images if Path(image["file_name"]).stem not in present]
    targets = [directory / f"{Path(image['file_name']).stem}.png" for image in images]
    sizes = [(image["height"], image["width"]) for image in images]
    objects = [instances.objects.get(image["id"], []) for image in images]
    with ProcessPoolExecutor(args.num_workers) as pool:
        written = pool.map(write_mask, targets, sizes, objects, chunksize=32)
        try:
            for _ in tqdm(written, "masks", total=len(targets), unit="mask"):
                pass
        except (ImportError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None
    untagged = sum(not instances.objects.get(image["id"]) for image in instances.images)
    print(
        f"{len(instances.images)} masks in {directory}: {len(targets)} written, {len(present)} were there; "
        f"{untagged} images have no annotation"
    )


def write_mask(target: Path, size: tuple[int, int], objects: list) -> None:
    try:
        mask = render_mask(*size, objects)
    except ValueError as error:
        raise ValueError(f"no mask for {target.stem}: {error}") from error
    with whole_file(target) as unfinished:
        to_palette_image(mask).save(unfinished, "PNG")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", type=Path, required=True, help="directory with annotations/ and train2014/")
    parser.add_argument("--split", required=True, help="train2014, val2014, or any with its annotations")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
