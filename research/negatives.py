"""Defect or no defect, from tags alone: what true negatives give (research/notes/small-data.md).

Cuts the quarters of NEU_Seg's photos, every one of which has a defect. Those with at least 5 % of defect are tagged;
those without any are marked "-" in one table and untagged in another, of the same images. Trains heads on the features
of a frozen EfficientNet-lite0, kept on disk. Masks serve to cut and to score; training sees none.

    python research/negatives.py NEU_Seg runs/negatives --backbone_weights WEIGHTS
"""

import argparse
import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from cosa_hf import Segmenter, TrainingConfig, evaluate, train
from cosa_hf.data import load_folder

LEAST_DEFECT = 0.05  # of a quarter's pixels
COUNTS = {"train": 200, "test": 60}  # quarters with a defect, and as many without
MARKS = {"with": "-", "without": ""}


def cut(source: Path, target: Path) -> None:
    """The quarters in `target/with`, and the same in `target/without`, tagged in the two ways."""
    rows, taken = [], Counter()
    for row in csv.DictReader((source / "metadata.csv").read_text().splitlines()):
        image, mask = Image.open(source / row["file_name"]), Image.open(source / row["mask_file_name"])
        split, half = row["split"], image.width // 2
        for number in range(4):
            box = (number % 2 * half, number // 2 * half, (number % 2 + 1) * half, (number // 2 + 1) * half)
            ids = np.array(mask.crop(box))
            share = (ids > 0).mean()
            if 0 < share < LEAST_DEFECT or taken[split, share > 0] == COUNTS[split]:
                continue
            taken[split, share > 0] += 1
            name = f"{split}/{Path(row['file_name']).stem}-{number}.png"
            for directory in ("images", "masks"):
                (target / "with" / directory / split).mkdir(parents=True, exist_ok=True)
            image.crop(box).convert("RGB").save(target / "with/images" / name)
            Image.fromarray((ids > 0).astype(np.uint8)).save(target / "with/masks" / name)
            rows.append((f"images/{name}", share > 0, split, f"masks/{name}"))
    (target / "without").mkdir()
    for directory in ("images", "masks"):
        (target / "without" / directory).symlink_to((target / "with" / directory).resolve())
    for table, mark in MARKS.items():
        with (target / table / "metadata.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("file_name", "labels", "split", "mask_file_name"))
            writer.writerows((name, "defect" if defect else mark, *rest) for name, defect, *rest in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--backbone_weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(arguments)
    if not args.output.exists():
        cut(args.source, args.output)
    for seed in args.seeds:
        for table in MARKS:
            run = args.output / f"{table}-{seed}"
            train(
                TrainingConfig.named(
                    "folder-lite0", data_dir=str(args.output / table), output_dir=str(run), seed=seed, num_workers=0,
                    input_size=128, output_stride=16, frozen_blocks="all", cache_features=str(args.output / "cache"),
                    pooling="lse", classifier_bias=True, standardize_features=True, decoder="mlp",
                    decoder_inputs="concat", max_steps=600, warmup_steps=400, lr_warmup_steps=20, learning_rate=2e-3,
                    head_lr_multiplier=1, ema_momentum=0.98, checkpoint_every=0, eval_every=0, log_every=20,
                    tracker="none", backbone_weights=args.backbone_weights,
                )
            )  # fmt: skip
            test = load_folder(args.output / "with", "test", masks=True)
            segmenter = Segmenter.from_pretrained(run / "assignment", scales=[1.0])
            report = evaluate(segmenter, test, progress=False)
            predicted = zip(segmenter.predict(test), test["negative"], strict=True)
            false = [one.label("seg")[0].bool().float().mean().item() for one, negative in predicted if negative]
            result = {"seed": seed, "negatives": table, "average_precision": report["cls_map"]}
            for protocol in ("seg", "seg_tags", "cam"):
                result[protocol] = report[protocol]["miou"]
                result[f"{protocol} defect"] = report[protocol]["per_class"]["defect"]
            result["called defect where there is none"] = 100 * float(np.mean(false))
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
