"""The quality of CAM pseudo-labels where masks exist (paper, Tab. 1): M', M†' and their mean at every threshold.

python research/label_quality.py runs/voc/assignment --dataset voc --data_dir VOC2012 --split train_aug
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from arguments import dataset_parser, one_line_errors, segmenter_of
from datasets import Dataset

from cosa_hf.commands.inputs import add_inference, add_model, dataset_of, parse_dataset_args
from cosa_hf.data import DatasetOptions
from cosa_hf.evaluation.metrics import SegmentationMetric
from cosa_hf.files import check_output
from cosa_hf.inference import Segmenter, require_cams
from cosa_hf.progress import progress

__all__ = ["CAM_SOURCES", "THRESHOLDS", "format_quality", "pseudo_label_quality"]

#: The sources of CAM pseudo-labels: M', M†' and their mean.
CAM_SOURCES = ("cam", "cam_aux", "cam_mean")

#: The thresholds of a sweep: 0.1 to 0.9.
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(2, 19))


@one_line_errors()
def main(arguments: list[str] | None = None) -> None:
    args, options = parse(arguments)
    check_output(args.report)
    segmenter = segmenter_of(args, args.model)
    dataset = dataset_of(args, options, segmenter, masks=True)
    report = pseudo_label_quality(segmenter, dataset, args.thresholds)
    print(format_quality(report))
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"report: {args.report}")


def pseudo_label_quality(
    segmenter: Segmenter, dataset: Dataset, thresholds: Sequence[float] = THRESHOLDS, show_progress: bool = True
) -> dict[str, Any]:
    """Score CAM pseudo-labels, tags given, at every threshold in one pass.

    A pixel is counted once: by its strongest class, its ground truth and the number of thresholds that its confidence
    reaches. The confusion matrices of all thresholds are sums of these counts, and are those that `evaluate` finds
    threshold by threshold.

    Args:
        segmenter: CoSA, with the scales and flips to measure at.
        dataset: with the columns image, labels, image_id and mask.
        thresholds: the values of xi, rising.
        show_progress: show a bar on stderr.

    Returns:
        JSON-serialisable: for each of `CAM_SOURCES` a list with, for each threshold, `threshold`, `miou`,
        `per_class`, `precision` and `recall` (percent; None where nothing could be counted), plus `images` and
        `protocol`. Precision is the share of the pixels labelled as an object whose class is correct, recall the
        share of the true object pixels that are labelled with the correct class.

    Raises:
        ValueError: thresholds that do not rise within (0, 1), a dataset that is empty or without masks; or as
            `Segmenter.predict`.

    Source: paper Tab. 1 (CPL from M' and M†', and their ensemble).
    """
    if not thresholds or list(thresholds) != sorted(set(thresholds)) or not 0 < thresholds[0] <= thresholds[-1] < 1:
        raise ValueError(f"thresholds must rise, strictly between 0 and 1, got {list(thresholds)}")
    model, names = segmenter.model, segmenter.names
    require_cams(model)
    if len(dataset) == 0 or "mask" not in dataset.column_names:
        raise ValueError(
            f"quality is measured on images with masks; the dataset has {len(dataset)} images and the columns "
            f"{dataset.column_names}"
        )
    ignore = model.config.semantic_loss_ignore_index
    bounds = torch.tensor(thresholds, dtype=torch.float32, device=model.device)
    shape = (len(thresholds) + 1, len(names), len(names))  # thresholds reached, ground truth, strongest class
    counts = {source: torch.zeros(shape, dtype=torch.int64, device=model.device) for source in CAM_SOURCES}
    images = segmenter.predict(dataset)
    for image in progress(images, "quality", total=len(dataset), unit="image", disable=not show_progress):
        ground_truth = image.ground_truth.to(model.device)
        counted = ground_truth != ignore
        for source, count in counts.items():
            strongest, confidence = image.label(source, threshold=0.0)
            reached = torch.bucketize(confidence, bounds, right=True)
            cell = (reached * len(names) + ground_truth) * len(names) + strongest
            count += torch.bincount(cell[counted], minlength=count.numel()).reshape(shape)
    report: dict[str, Any] = {
        source: [
            {"threshold": threshold, **_scores(_confusion(count, position), names, ignore)}
            for position, threshold in enumerate(thresholds)
        ]
        for source, count in counts.items()
    }
    report["images"] = len(dataset)
    report["protocol"] = {
        "tags": "given",
        **segmenter.settings,
        "ignore_index": ignore,
        "model": model.config.name_or_path or None,
    }
    return report


def format_quality(report: dict[str, Any]) -> str:
    """The report of `pseudo_label_quality` as a table, percent; the best mIoU of each source has a star.

    Example:
        >>> rows = [{"threshold": 0.4, "miou": 50.0, "precision": 60.0, "recall": 70.0, "per_class": {}},
        ...         {"threshold": 0.5, "miou": 55.0, "precision": None, "recall": 0.0, "per_class": {}}]
        >>> print(format_quality(dict.fromkeys(CAM_SOURCES, rows) | {"images": 3}))
        CPL, 3 images        cam                    cam_aux                cam_mean
        threshold    mIoU    prec.  recall    mIoU    prec.  recall    mIoU    prec.  recall
        0.40         50.0     60.0    70.0    50.0     60.0    70.0    50.0     60.0    70.0
        0.50         55.0 *      -     0.0    55.0 *      -     0.0    55.0 *      -     0.0
    """
    head = f"CPL, {report['images']} images"
    lines = [
        head.ljust(21) + "".join(source.ljust(23) for source in CAM_SOURCES).rstrip(),
        "threshold" + "    mIoU    prec.  recall" * len(CAM_SOURCES),
    ]
    best = {source: max((row["miou"] or 0.0) for row in report[source]) for source in CAM_SOURCES}
    for rows in zip(*(report[source] for source in CAM_SOURCES), strict=True):
        line = f"{rows[0]['threshold']:<9.2f}"
        for source, row in zip(CAM_SOURCES, rows, strict=True):
            miou, precision, recall = (
                "-" if row[part] is None else f"{row[part]:.1f}" for part in ("miou", "precision", "recall")
            )
            star = "*" if row["miou"] == best[source] else ""
            line += f"{miou:>8} {star:<1}{precision:>7}{recall:>8}"
        lines.append(line)
    return "\n".join(lines)


def _confusion(count: torch.Tensor, position: int) -> torch.Tensor:
    """(K, K), rows the ground truth: pixels that reach the threshold have their strongest class, others background."""
    confusion = count[position + 1 :].sum(0)
    confusion[:, 0] += count[: position + 1].sum((0, 2))
    return confusion


def _scores(confusion: torch.Tensor, names: list[str], ignore_index: int) -> dict[str, Any]:
    correct = confusion.diagonal()[1:].sum()
    labelled, existing = confusion[:, 1:].sum(), confusion[1:].sum()
    metric = SegmentationMetric(names, ignore_index=ignore_index)
    metric.confusion_matrix = confusion
    return {
        **metric.compute(),
        "precision": 100 * float(correct / labelled) if labelled else None,
        "recall": 100 * float(correct / existing) if existing else None,
    }


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser(__doc__)
    add_model(parser)
    parser.add_argument("--split", required=True, help="split of the dataset to score")
    parser.add_argument("--report", type=Path, default=Path("quality.json"), help="JSON file to write")
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="values of xi")
    add_inference(parser)
    return parse_dataset_args(parser, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
