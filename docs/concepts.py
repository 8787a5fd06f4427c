"""Draws the figures of docs/concepts.md.

make demo && python docs/concepts.py runs/demo/model --photos_model runs/long/assignment --voc_dir VOC2012
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from cosa_hf.assignment.threshold import BINS, LEAST, fit_mixture
from cosa_hf.data import load_dataset_by_name, load_shapes
from cosa_hf.data.palette import to_palette_image
from cosa_hf.inference import Segmenter
from cosa_hf.objective.pseudo_labels import cam_pseudo_labels, segmentation_pseudo_labels
from cosa_hf.objective.reliability import perplexity

SCALES = (1.0, 0.5, 1.5)  # of the assignment network in training
SHOWN = (1, 3, 5)  # images of the unseen split with a boat or a train


def draw_labels(model: str, path: Path) -> None:
    """One row for each image: image, M', CPL, its weight, SPL, ground truth."""
    segmenter = teacher(model)
    shapes = load_shapes("val", num_images=max(SHOWN) + 1, masks=True).select(SHOWN)
    threshold = segmenter.model.config.cam_threshold
    figure = Figure(figsize=(10.2, 1.75 * len(SHOWN) + 0.3), layout="constrained")
    axes = figure.subplots(len(SHOWN), 6)
    for row, one in zip(axes, segmenter.predict(shapes), strict=True):
        cams = one.upsample(one.cam)[None]
        confidence = cams.amax(1)
        reliability = 1 / perplexity(confidence, threshold)
        spl = segmentation_pseudo_labels(one.upsample(one.seg_logits)[None], one.labels[None])
        for place, (title, image, options) in zip(
            row,
            (
                ("image", one.image, {}),
                ("M', strongest class", confidence[0], {"cmap": "viridis", "vmin": 0, "vmax": 1}),
                (f"CPL, xi = {threshold:g}", _colours(cam_pseudo_labels(cams, threshold)[0]), {}),
                ("its weight (RAW)", reliability[0] / reliability.mean(), {"cmap": "magma", "vmin": 0}),
                ("SPL", _colours(spl[0].argmax(0)), {}),
                ("ground truth, never seen", _colours(one.ground_truth), {}),
            ),
            strict=True,
        ):
            place.imshow(image, **options)
            place.set_axis_off()
            if row[0] is axes[0, 0]:
                place.set_title(title, fontsize=9)
    _save(figure, path)


def draw_threshold(confidences: dict[str, torch.Tensor], path: Path) -> None:
    """The confidences of some CAMs with the mixture of Eq. 6, and what a pixel weighs on either side of xi."""
    figure = Figure(figsize=(3.4 * (len(confidences) + 1), 2.7), layout="constrained")
    *histograms, curve = figure.subplots(1, len(confidences) + 1)
    centers = np.linspace(LEAST, 1, BINS)
    for axes, (title, values) in zip(histograms, confidences.items(), strict=True):
        mixture = fit_mixture(torch.histc(values, BINS, LEAST, 1.0).double())
        assert mixture is not None
        kept = values[values > LEAST]
        axes.hist(kept, 60, range=(LEAST, 1), density=True, color="0.8")
        for weight, mean, variance, colour in zip(*mixture[:3], ("tab:blue", "tab:orange"), strict=True):
            bell = weight * np.exp(-((centers - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
            axes.plot(centers, bell, color=colour)
        axes.axvline(mixture.split, color="black", linestyle=":")
        axes.set_title(f"{title}: xi* = {mixture.split:.2f}", fontsize=9)
        axes.set(xlabel=f"confidence nu ({len(kept) / len(values):.0%} of the tokens)", yticks=[])
    nu = torch.linspace(0, 1, 401)
    curve.plot(nu, perplexity(nu, 0.5).reciprocal())
    curve.set_title("reliability 1 / P at xi = 0.5", fontsize=9)
    curve.set(xlabel="confidence nu")
    _save(figure, path)


def confidences(model: str, dataset: Any) -> torch.Tensor:
    """nu = max_c M' of every token of a dataset."""
    return torch.cat([one.cam.amax(0).flatten() for one in teacher(model).predict(dataset)])


def teacher(model: str) -> Segmenter:
    """A model that looks at images as the assignment network does in training."""
    return Segmenter.from_pretrained(model, device="cpu", scales=SCALES, flip=True)


def _colours(ids: Any) -> np.ndarray:
    return np.asarray(to_palette_image(np.asarray(ids)).convert("RGB"))


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)
    print(path, f"{path.stat().st_size / 1e3:.0f} kB")


def main(args: argparse.Namespace) -> None:
    draw_labels(args.model, args.output_dir / "labels.png")
    found = {"drawn shapes": confidences(args.model, load_shapes("val", num_images=args.num_images))}
    if args.photos_model:
        photos = load_dataset_by_name("voc", args.voc_dir, args.split)
        found["photos"] = confidences(args.photos_model, photos.select(range(min(args.num_images, len(photos)))))
    draw_threshold(found, args.output_dir / "threshold.png")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="the model that `make demo` leaves, runs/demo/model")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(__file__).with_name("concepts"),
        help="for the PNGs (default: %(default)s)",
    )
    parser.add_argument(
        "--photos_model", help="a model of VOC's classes, for the histogram of photos (default: no such histogram)"
    )
    parser.add_argument("--voc_dir", default="VOC2012", help="the photos (default: %(default)s)")
    parser.add_argument("--split", default="train_aug", help="split of VOC (default: %(default)s)")
    parser.add_argument("--num_images", type=int, default=60, help="images in a histogram (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
