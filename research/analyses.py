"""The quality of pseudo-labels, and how well confidence and perplexity predict it (Fig. 3, 4, 6, 7, Tab. 4b).

Each analysis takes what one network predicts for a dataset and returns a table, a list of dicts. The ground truth is
only compared with.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosa_hf.data.images import IGNORE_INDEX
from cosa_hf.evaluation.metrics import SegmentationMetric
from cosa_hf.inference import Segmentation
from cosa_hf.objective.reliability import perplexity

__all__ = [
    "ANALYSES",
    "Labelling",
    "accuracy_in_bins",
    "coexistence",
    "cpl_accuracy",
    "distance_to_ideal",
    "filtered_miou",
    "pseudo_label_miou",
    "reliability_per_image",
    "truth_where_certain",
]

CONFIDENCE_EDGES = torch.linspace(0, 1, 21)
# One bin holds all perplexities above 4: confidences within 2.3 % of the way from the threshold to 0 or 1, with the
# paper's constants.
PERPLEXITY_EDGES = torch.cat([torch.linspace(0, 4, 17), torch.tensor([torch.inf])])


@dataclass(frozen=True)
class Labelling:
    """How a network's CAMs become pseudo-labels and how certain these are, as in its training.

    Attributes:
        names: the K class names, background first.
        threshold: xi of M'.
        aux_threshold: xi of M†'.
        alpha: lambda_alpha of Eq. 4.
        beta: lambda_beta of Eq. 4.
        epsilon: the highest perplexity that counts as certain (Eq. 9).
        coexistence_classes: classes whose mean IoU is C-mIoU.

    Example:
        >>> Labelling(["background", "cat"]).threshold
        0.5
    """

    names: Sequence[str]
    threshold: float = 0.5
    aux_threshold: float = 0.5
    alpha: float = 0.8
    beta: float = 1.0
    epsilon: float = 1.0
    coexistence_classes: Sequence[str] = ()

    def of(self, image: Segmentation, source: str = "cam") -> tuple[Tensor, Tensor, Tensor]:
        """Label, confidence nu and perplexity of each pixel, (H, W) each, by M' ("cam") or M†' ("cam_aux")."""
        threshold = self.threshold if source == "cam" else self.aux_threshold
        ids, confidence = (values.cpu() for values in image.label(source, threshold))
        return ids, confidence, perplexity(confidence, threshold, self.alpha, self.beta)


def accuracy_in_bins(values: Tensor, prediction: Tensor, ground_truth: Tensor, edges: Tensor) -> Tensor:
    """How many pixels fall into each bin of `values`, and how many of them are labelled correctly.

    Args:
        values: confidence or perplexity, any shape.
        prediction: class ids, the same shape.
        ground_truth: class ids, the same shape; 255 is not counted.
        edges: (N + 1,) rising; a bin holds its lower edge, the last one its upper edge too.

    Returns:
        (2, N) int64 counts: all pixels, and correct pixels. Sums over images are those of a dataset.

    Example:
        >>> values, edges = torch.tensor([0.1, 0.4, 0.6, 1.0]), torch.tensor([0.0, 0.5, 1.0])
        >>> accuracy_in_bins(values, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 255]), edges).tolist()
        [[2, 1], [1, 1]]
    """
    counted = ground_truth != IGNORE_INDEX
    bins = torch.bucketize(values[counted], edges[1:-1], right=True)
    correct = (prediction == ground_truth)[counted]
    return torch.stack([torch.bincount(chosen, minlength=len(edges) - 1) for chosen in (bins, bins[correct])])


def truth_where_certain(ground_truth: Tensor, perplexity: Tensor, epsilon: float = 1.0) -> Tensor:
    """Ground truth with every pixel of a perplexity above epsilon set to 255, so that no metric counts it (Fig. 4b).

    Example:
        >>> truth_where_certain(torch.tensor([3, 4]), torch.tensor([0.5, 2.0])).tolist()
        [3, 255]
    """
    return ground_truth.masked_fill(perplexity > epsilon, IGNORE_INDEX)


def distance_to_ideal(miou: float, perplexity: float) -> float:
    """Mean absolute error of a pseudo-label's (mIoU, perplexity) to the ideal (1, 0), mIoU as a fraction (Fig. 7).

    Example:
        >>> distance_to_ideal(0.5, 1.5)
        1.0
    """
    return (abs(1 - miou) + abs(perplexity)) / 2


def cpl_accuracy(images: Iterable[Segmentation], labelling: Labelling) -> list[dict[str, Any]]:
    """Fig. 3: pixels and accuracy of the CPL by confidence (a, b; the pixels are e, f) and by perplexity (c, d).

    Returns:
        For each bin: against, low, high, pixels, accuracy (percent; None in an empty bin), threshold.
    """
    counts = {
        "confidence": torch.zeros(2, len(CONFIDENCE_EDGES) - 1, dtype=torch.long),
        "perplexity": torch.zeros(2, len(PERPLEXITY_EDGES) - 1, dtype=torch.long),
    }
    for image in images:
        ids, confidence, uncertainty = labelling.of(image)
        counts["confidence"] += accuracy_in_bins(confidence, ids, image.ground_truth, CONFIDENCE_EDGES)
        counts["perplexity"] += accuracy_in_bins(uncertainty, ids, image.ground_truth, PERPLEXITY_EDGES)
    return [
        {
            "against": against,
            "low": round(low, 4),
            "high": round(high, 4),
            "pixels": pixels,
            "accuracy": 100 * correct / pixels if pixels else None,
            "threshold": labelling.threshold,
        }
        for against, edges in (("confidence", CONFIDENCE_EDGES), ("perplexity", PERPLEXITY_EDGES))
        for low, high, pixels, correct in zip(
            edges[:-1].tolist(), edges[1:].tolist(), *counts[against].tolist(), strict=True
        )
    ]


def filtered_miou(images: Iterable[Segmentation], labelling: Labelling) -> list[dict[str, Any]]:
    """Fig. 4: mIoU of the CPL from M' and from M†', over all pixels and over those with a perplexity up to epsilon.

    Each map is filtered by its own perplexity, so the two do not have the same certain pixels; `share` says how many
    there are.

    Returns:
        Four rows: map, pixels ("all" or "certain"), share (percent of the pixels with ground truth), miou.
    """
    metrics = {
        (cam, pixels): SegmentationMetric(labelling.names) for cam in ("M", "M†") for pixels in ("all", "certain")
    }
    for image in images:
        for cam, source in (("M", "cam"), ("M†", "cam_aux")):
            ids, _, uncertainty = labelling.of(image, source)
            certain = truth_where_certain(image.ground_truth, uncertainty, labelling.epsilon)
            metrics[cam, "all"].add(prediction=ids, reference=image.ground_truth)
            metrics[cam, "certain"].add(prediction=ids, reference=certain)
    total = int(metrics["M", "all"].confusion_matrix.sum())
    return [
        {
            "map": cam,
            "pixels": pixels,
            "share": 100 * int(metric.confusion_matrix.sum()) / total if total else None,
            "miou": metric.compute()["miou"],
        }
        for (cam, pixels), metric in metrics.items()
    ]


def pseudo_label_miou(images: Iterable[Segmentation], labelling: Labelling) -> list[dict[str, Any]]:
    """Fig. 6: mIoU of the pseudo-labels, SPL (the segmentation, tags given) and CPL (the CAM at the training's xi).

    Returns:
        Two rows: labels, miou.
    """
    spl, cpl = SegmentationMetric(labelling.names), SegmentationMetric(labelling.names)
    for image in images:
        spl.add(prediction=image.label("seg_tags")[0], reference=image.ground_truth)
        cpl.add(prediction=labelling.of(image)[0], reference=image.ground_truth)
    return [{"labels": "SPL", "miou": spl.compute()["miou"]}, {"labels": "CPL", "miou": cpl.compute()["miou"]}]


def reliability_per_image(images: Iterable[Segmentation], labelling: Labelling) -> list[dict[str, Any]]:
    """Fig. 7: mIoU and mean perplexity of each image's CPL, and their distance to the ideal.

    Returns:
        For each image: image_id, miou (percent, over the classes in its CPL or ground truth; None where no pixel has
        ground truth), perplexity, mae.
    """
    metric, rows = SegmentationMetric(labelling.names), []
    for image in images:
        ids, _, uncertainty = labelling.of(image)
        metric.add(prediction=ids, reference=image.ground_truth)
        miou, mean = metric.compute()["miou"], float(uncertainty.mean())
        mae = None if miou is None else distance_to_ideal(miou / 100, mean)
        rows.append({"image_id": image.image_id, "miou": miou, "perplexity": mean, "mae": mae})
    return rows


def coexistence(images: Iterable[Segmentation], labelling: Labelling) -> list[dict[str, Any]]:
    """Tab. 4b: C-mIoU, the mean over the classes that are usually seen with the same surroundings, and mIoU of the CPL.

    The labels are the `cam` protocol's, at the model's own `cam_threshold`, as in the paper's Tab. 1 and 4.

    Returns:
        One row: c_miou (None if no such class is known or occurs), miou.
    """
    metric = SegmentationMetric(labelling.names)
    for image in images:
        metric.add(prediction=image.label("cam")[0], reference=image.ground_truth)
    return [{"c_miou": metric.coexistence(labelling.coexistence_classes), "miou": metric.compute()["miou"]}]


ANALYSES: dict[str, Callable[[Iterable[Segmentation], Labelling], list[dict[str, Any]]]] = {
    "3": cpl_accuracy,
    "4": filtered_miou,
    "6": pseudo_label_miou,
    "7": reliability_per_image,
    "4b": coexistence,
}
"""By the number of the paper's figure; 4b is Tab. 4b. Those that need no image are in `records`."""
