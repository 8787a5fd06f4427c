"""Defect or no defect, from tags alone: what true negatives give (research/notes/small-data.md).

Cuts the quarters of NEU_Seg's photos, every one of which has a defect, into two folders with the same images: quarters
with at least 5 % of defect are tagged, quarters without any are marked "-" in the one and untagged in the other. Trains
heads on the features of a frozen EfficientNet-lite0, kept on disk. Masks serve to cut and to score; training sees none.

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


def cut(source: Path, target: Path, counts: dict[str, int], mark: str) -> None:
    """`counts` quarters with a defect and as many without in each split, the latter with `mark` for tags."""
    rows, taken = [], Counter()
    for row in csv.DictReader((source / "metadata.csv").read_text().splitlines()):
        image, mask = Image.open(source / row["file_name"]), Image.open(source / row["mask_file_name"])
        split, half = row["split"], image.width // 2
        for number in range(4):
            box = (number % 2 * half, number // 2 * half, (number % 2 + 1) * half, (number // 2 + 1) * half)
            ids = np.array(mask.crop(box))
            share = (ids > 0).mean()
            kind = (split, share > 0)
            if 0 < share < LEAST_DEFECT or taken[kind] == counts[split]:
                continue
            taken[kind] += 1
            name = f"{split}/{Path(row['file_name']).stem}-{number}"
            for directory in ("images", "masks"):
                (target / directory / split).mkdir(parents=True, exist_ok=True)
            image.crop(box).convert("RGB").save(target / f"images/{name}.png")
            Image.fromarray((ids > 0).astype(np.uint8)).save(target / f"masks/{name}.png")
            rows.append((f"images/{name}.png", "defect" if share else mark, split, f"masks/{name}.png"))
    with (target / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "labels", "split", "mask_file_name"), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--backbone_weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    for seed in args.seeds:
        for name, mark in (("with", "-"), ("without", "")):
            folder, run = args.output / name, args.output / f"{name}-{seed}"
            if not folder.exists():
                cut(args.source, folder, {"train": 200, "test": 60}, mark)
            model = train(
                TrainingConfig.named(
                    "folder-lite0", data_dir=str(folder), output_dir=str(run), seed=seed, num_workers=0,
                    input_size=128, output_stride=16, frozen_blocks="all", cache_features=str(args.output / "cache"),
                    pooling="lse", classifier_bias=True, standardize_features=True, decoder="mlp",
                    decoder_inputs="concat", max_steps=args.steps, warmup_steps=args.steps // 2, lr_warmup_steps=20,
                    learning_rate=1e-3, head_lr_multiplier=1, batch_size=16, images_per_step=16, ema_momentum=0.95,
                    checkpoint_every=0, eval_every=0, log_every=50, tracker="none",
                    backbone_weights=args.backbone_weights,
                )
            )  # fmt: skip
            test = load_folder(args.output / "with", "test", masks=True)
            segmenter = Segmenter.from_pretrained(run / "assignment", scales=[1.0])
            report = evaluate(segmenter, test, progress=False)
            masks = zip(segmenter.predict(test), test["negative"], strict=True)
            shares = [one.label("seg")[0].bool().float().mean().item() for one, negative in masks if negative]
            result = {
                "seed": seed,
                "negatives": name,
                "recommended": model.name,
                **{protocol: report[protocol]["miou"] for protocol in ("seg", "seg_tags", "cam")},
                "seg_defect": report["seg"]["per_class"]["defect"],
                "cam_defect": report["cam"]["per_class"]["defect"],
                "cls_ap": report["cls_map"],
                "called_defect_where_there_is_none": float(np.mean(shares)),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
