"""Views per second on one core: the work of a data loader's process, from JPEG bytes to two normalised crops.

    python research/benchmarks/views.py --images VOC2012/JPEGImages

The photos are 500 x 375 pixels, as most of VOC and COCO; without --images they are drawn: smooth colours with grain,
saved at quality 90, about as large as VOC's files.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cosa_hf.data.dataset import training_item
from cosa_hf.data.views import Views
from cosa_hf.image_processing_cosa import to_rgb


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)  # as in a process of the loader
    files = photos(args.images)
    views = Views(args.crop_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    images = [decode(content) for content in files]
    torch.manual_seed(0)

    def item(index: int) -> None:
        row = {"image": {"bytes": files[index], "path": None}, "labels": [0], "image_id": "photo"}
        training_item(row, views, num_classes=20, seed=0, position=index)

    rows = (
        ("decode JPEG", rate(lambda index: decode(files[index]), len(files), args.seconds)),
        ("both views of a decoded photo", rate(lambda index: views(images[index]), len(files), args.seconds)),
        ("whole training item", rate(item, len(files), args.seconds)),
    )
    width, height = np.mean([image.size for image in images], axis=0)
    kilobytes = np.mean([len(content) for content in files]) / 1000
    print(
        f"{len(files)} photos of {width:.0f} x {height:.0f} pixels, {kilobytes:.0f} kB (means); crop {args.crop_size}"
    )
    for name, images_per_second in rows:
        print(f"{name:30}  {images_per_second:6.1f} images/s  {1000 / images_per_second:6.2f} ms")
    print(f"16 such cores, if nothing else limits them: {16 * rows[-1][1]:.0f} images/s (extrapolated)")


def photos(directory: Path | None, count: int = 32) -> list[bytes]:
    if directory is not None:
        return [path.read_bytes() for path in sorted(directory.glob("*.jpg"))[:count]]
    rng = np.random.default_rng(0)
    return [_drawn(rng) for _ in range(4)]


def _drawn(rng: np.random.Generator) -> bytes:
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 12, (375, 500, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def decode(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as file:
        return to_rgb(file)


def rate(work: Callable[[int], object], count: int, seconds: float) -> float:
    """Calls per second of this process's CPU time, which does not count other programs on the core."""
    for index in range(3):
        work(index % count)
    done, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        work(done % count)
        done += 1
    return done / (time.process_time() - started)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, help="directory of JPEGs, of which the first 32 are used (default: drawn)"
    )
    parser.add_argument("--crop_size", type=int, default=448, help="side in pixels (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU seconds for each row (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
