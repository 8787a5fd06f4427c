"""What CAM pseudo-labels are worth where masks exist (paper, Tab. 1), for every threshold in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cosa_hf.evaluation.maps import SCALES, label_names, predict_maps
from cosa_hf.evaluation.metrics import SegmentationMetric
from cosa_hf.inference import require_cams

__all__ = ["CAM_SOURCES", "THRESHOLDS", "format_quality", "pseudo_label_quality"]

#: What CAM pseudo-labels are made from: M', M†' and their mean.
CAM_SOURCES = ("cam", "cam_aux", "cam_mean")

#: The thresholds of a sweep: 0.1 to 0.9.
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(2, 19))


def pseudo_label_quality(
    model: PreTrainedModel,
    processor: Any,
    dataset: Dataset,
    thresholds: Sequence[float] = THRESHOLDS,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Score CAM pseudo-labels, tags given, at every threshold.

    A pixel is counted once, by its strongest class, its truth and how many thresholds its confidence reaches;
    the confusion matrices of all thresholds are sums of these counts. They are those that `evaluate_model`
    finds threshold by threshold.

    Args:
        model: and all from `scales` to `batch_size`: as in `predict_maps`.
        dataset: with the columns image, labels, image_id and mask.
        thresholds: the values of xi, rising.
        progress: show a bar on stderr.

    Returns:
        JSON-serialisable: for each of `CAM_SOURCES` a list with, for each threshold, `threshold`, `miou`,
        `per_class`, `precision` and `recall` (percent; None where nothing could be counted), plus `images` and
        `protocol`. Precision is the share of the pixels labelled as an object whose class is right, recall the
        share of the true object pixels that are labelled, with the right class.

    Raises:
        ValueError: thresholds that do not rise within (0, 1), a dataset that is empty or without masks; or as
            `predict_maps`.

    Source: paper Tab. 1 (CPL from M' and M†', and their ensemble).
    """
    if not thresholds or list(thresholds) != sorted(set(thresholds)) or not 0 < thresholds[0] <= thresholds[-1] < 1:
        raise ValueError(f"thresholds must rise, strictly between 0 and 1, got {list(thresholds)}")
    require_cams(model)
    if len(dataset) == 0 or "mask" not in dataset.column_names:
        raise ValueError(
            f"quality is measured on images with masks; the dataset has {len(dataset)} images and the columns "
            f"{dataset.column_names}"
        )
    names, ignore = label_names(model.config), model.config.semantic_loss_ignore_index
    device = next(model.parameters()).device
    bounds = torch.tensor(thresholds, dtype=torch.float32, device=device)
    shape = (len(thresholds) + 1, len(names), len(names))  # thresholds reached, truth, strongest class
    counts = {source: torch.zeros(shape, dtype=torch.int64, device=device) for source in CAM_SOURCES}
    images = predict_maps(model, processor, dataset, scales, flip, batch_size)
    for maps in tqdm(images, "quality", total=len(dataset), unit="image", disable=not progress):
        assert maps.truth is not None  # the dataset has masks
        truth = maps.truth.to(device)
        counted = truth != ignore
        for source, count in counts.items():
            strongest, confidence = maps.label(source, threshold=0.0)
            reached = torch.bucketize(confidence, bounds, right=True)
            cell = (reached * len(names) + truth) * len(names) + strongest
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
        "scales": list(scales),
        "flip": flip,
        "input_size": [processor.size["height"], processor.size["width"]],
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
    """(K, K), rows the truth: pixels that reach the threshold by their strongest class, the others background."""
    confusion = count[position + 1 :].sum(0)
    confusion[:, 0] += count[: position + 1].sum((0, 2))
    return confusion


def _scores(confusion: torch.Tensor, names: list[str], ignore_index: int) -> dict[str, Any]:
    right = confusion.diagonal()[1:].sum()
    labelled, existing = confusion[:, 1:].sum(), confusion[1:].sum()
    metric = SegmentationMetric(names, ignore_index=ignore_index)
    metric.confusion_matrix = confusion
    return {
        **metric.compute(),
        "precision": 100 * float(right / labelled) if labelled else None,
        "recall": 100 * float(right / existing) if existing else None,
    }
