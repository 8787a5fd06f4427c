"""What a frozen encoder costs, side by side: encoding beside a bare forward pass of timm, a training step on cached
features beside one that encodes, and the memory of the cache's reader.

    python research/benchmarks/frozen.py
    python research/benchmarks/frozen.py --frozen_blocks 10
    python research/benchmarks/frozen.py --backbone test_vit --affinity_blocks -2 --size 64 --images 100 --steps 3

CPU time of one thread, so that other load hardly counts; in bf16 where the processor computes it, as the recipe. Random
weights and drawn images, so nothing is downloaded.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image

from cosa_hf.data import SHAPES_CLASSES
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.features import FeatureStore
from cosa_hf.training.precision import settle_precision
from cosa_hf.training.setup import build_student
from cosa_hf.training.trainer import Trainer

BATCH = 4  # images encoded at a time, as training does


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)
    changes = {
        "dataset": "folder", "train_split": "train", "backbone": args.backbone, "pretrained": False,
        "crop_size": args.size, "input_size": args.size, "num_workers": 0, "tracker": "none",
        "affinity_blocks": args.affinity_blocks, "frozen_blocks": args.frozen_blocks,
    }  # fmt: skip
    # First: the peak of a process never falls.
    print(f"reading {args.images} images of a cache: {reader_memory(args.images, args.size):.2f} GB more\n")
    print("| encoding | images/s | of a bare forward pass |\n|---|---|---|")
    encoding(changes, args)
    print("\n| training step | s | |\n|---|---|---|")
    steps(changes, args.steps)


def encoding(changes: dict[str, Any], args: argparse.Namespace) -> None:
    bare = timm.create_model(args.backbone, num_classes=0, dynamic_img_size=True).eval()
    config = settle_precision(TrainingConfig.named("voc-clip", **changes))
    model = build_student(config, list(SHAPES_CLASSES)).eval()
    images = torch.rand(BATCH, 3, args.size, args.size)
    variants: dict[str, Callable[[], Any]] = {
        "timm, bare": lambda: bare(images),
        "F and F†": lambda: model.backbone(images),
        "F, F† and attention": lambda: model.backbone(images, affinity=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        for _ in range(args.steps + 1):  # in turns; the first does not count
            for name, forward in variants.items():
                start = time.process_time()
                forward()
                seconds[name].append((time.process_time() - start) / BATCH)
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    for name, median in medians.items():
        print(f"| {name} | {1 / median:.2f} | {medians['timm, bare'] / median:.2f} |")


def draw(directory: Path, size: int) -> None:
    """Two photos of noise for each of two tags."""
    for tag in ("cat", "dog"):
        (directory / tag).mkdir(parents=True)
        for number in range(2):
            Image.effect_noise((size, size), 60).convert("RGB").save(directory / tag / f"{tag}{number}.png")


class Timed(Trainer):
    """A run that notes when its steps end: what lies between is a step and the reading of its batch."""

    ends: list[float]

    def training_step(self, batch: dict[str, Any]) -> None:
        super().training_step(batch)
        self.ends.append(time.process_time())


def steps(changes: dict[str, Any], count: int) -> None:
    medians = {}
    for name, cache in (("encodes its images", "never"), ("reads cached features", "directory")):
        with tempfile.TemporaryDirectory() as directory:
            draw(Path(directory) / "photos", changes["input_size"])
            config = TrainingConfig.named(
                "voc-clip", **changes, data_dir=f"{directory}/photos", max_steps=count + 1, warmup_steps=0,
                lr_warmup_steps=1, eval_every=0,
                cache_features="never" if cache == "never" else directory, output_dir=f"{directory}/run",
            )  # fmt: skip
            run = Timed(config)
            run.ends = []
            run.train()
        medians[name] = statistics.median(b - a for a, b in zip(run.ends, run.ends[1:], strict=False))
    encodes = medians["encodes its images"]
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.2f} | {encodes / seconds:.1f} x |")


def reader_memory(images: int, size: int) -> float:
    """By how many GB the peak of this process grows while it reads records as ViT-B/16 makes them, all zeros."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = (size // 16) ** 2
    shapes = dict.fromkeys(("features", "aux_features"), (2, 768, size // 16, size // 16))
    with tempfile.TemporaryDirectory() as directory:
        store = FeatureStore(Path(directory), {}, shapes | {"affinity": (2, tokens, tokens)})
        (store.directory / "part.jsonl").write_text("".join(f'["{n}", {n}]\n' for n in range(images)))
        with (store.directory / "part.f16").open("wb") as file:
            file.truncate(images * store.bytes_per_image)
        for n in range(images):
            store.read(str(n))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_base_patch16_clip_quickgelu_224", help="a plain ViT of timm")
    parser.add_argument(
        "--affinity_blocks",
        type=int,
        nargs="+",
        default=[-7, -6, -5, -4, -3],
        help="(default: %(default)s)",
    )
    parser.add_argument("--frozen_blocks", default="all", help="of the training step: N or all (default: %(default)s)")
    parser.add_argument("--size", type=int, default=352, help="side of an image in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="counted measurements of each (default: %(default)s)")
    parser.add_argument("--images", type=int, default=10_000, help="that the reader reads (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
