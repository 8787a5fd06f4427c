"""What pseudo-labels are worth, and how far confidence and perplexity tell it (Fig. 3, 4, 6, 7, Tab. 4b).

Each analysis takes the predictions of one network for a dataset and returns a table, a list of dicts. The true masks
are only compared with.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosa_hf.data.images import IGNORE_INDEX
from cosa_hf.evaluation.evaluate import ImagePrediction
from cosa_hf.evaluation.metrics import SegmentationMetric
from cosa_hf.objective.pseudo_labels import cam_pseudo_labels
from cosa_hf.objective.reliability import perplexity

__all__ = [
    "ANALYSES",
    "Labelling",
    "accuracy_in_bins",
    "coexistence",
    "cpl_accuracy",
    "distance_to_ideal",
    "filtered_miou",
    "format_table",
    "pseudo_label_miou",
    "reliability_per_image",
    "truth_where_certain",
]

CONFIDENCE_EDGES = torch.linspace(0, 1, 21)
# Beyond 4, within 2.3 % of the way from the threshold to 0 or 1 at the paper's constants, there is one bin.
PERPLEXITY_EDGES = torch.cat([torch.linspace(0, 4, 17), torch.tensor([torch.inf])])


@dataclass(frozen=True)
class Labelling:
    """How a network's CAMs become pseudo-labels and how certain they are, as in its training.

    Attributes:
        names: the K class names, background first.
        threshold: xi of M'.
        aux_threshold: xi of M†'.
        alpha: lambda_alpha of Eq. 4.
        beta: lambda_beta of Eq. 4.
        epsilon: the highest perplexity that counts as certain (Eq. 9).
        coexistence_classes: whose mean IoU is C-mIoU.

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

    def of(self, prediction: ImagePrediction) -> tuple[Tensor, Tensor, Tensor]:
        """Confidence nu, label and perplexity of each pixel by M', (H, W) each."""
        return self._read(prediction.cam, self.threshold)

    def of_aux(self, prediction: ImagePrediction) -> tuple[Tensor, Tensor, Tensor]:
        """The same by M†'."""
        return self._read(prediction.aux_cam, self.aux_threshold)

    def _read(self, cam: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        confidence = cam.amax(dim=0).cpu()
        labels = cam_pseudo_labels(cam[None], threshold)[0].cpu()
        return confidence, labels, perplexity(confidence, threshold, self.alpha, self.beta)


def accuracy_in_bins(values: Tensor, prediction: Tensor, truth: Tensor, edges: Tensor) -> Tensor:
    """How many pixels fall into each bin of `values`, and how many of them are labelled right.

    Args:
        values: confidence or perplexity, any shape.
        prediction: class ids, the same shape.
        truth: class ids, the same shape; 255 is not counted.
        edges: (N + 1,) rising; a bin holds its lower edge, the last one its upper edge too.

    Returns:
        (2, N) int64 counts: pixels, and right ones. Sums over images are those of a dataset.

    Example:
        >>> values, edges = torch.tensor([0.1, 0.4, 0.6, 1.0]), torch.tensor([0.0, 0.5, 1.0])
        >>> accuracy_in_bins(values, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 255]), edges).tolist()
        [[2, 1], [1, 1]]
    """
    counted = truth != IGNORE_INDEX
    bins = torch.bucketize(values[counted], edges[1:-1], right=True)
    right = (prediction == truth)[counted]
    return torch.stack([torch.bincount(chosen, minlength=len(edges) - 1) for chosen in (bins, bins[right])])


def truth_where_certain(truth: Tensor, perplexity: Tensor, epsilon: float = 1.0) -> Tensor:
    """The truth with every pixel of a perplexity above epsilon set to 255, so that no metric counts it (Fig. 4b).

    Example:
        >>> truth_where_certain(torch.tensor([3, 4]), torch.tensor([0.5, 2.0])).tolist()
        [3, 255]
    """
    return truth.masked_fill(perplexity > epsilon, IGNORE_INDEX)


def distance_to_ideal(miou: float, perplexity: float) -> float:
    """Mean absolute error of a pseudo-label's (mIoU, perplexity) to the ideal (1, 0), mIoU as a fraction (Fig. 7).

    Example:
        >>> distance_to_ideal(0.5, 1.5)
        1.0
    """
    return (abs(1 - miou) + abs(perplexity)) / 2


def cpl_accuracy(predictions: Iterable[ImagePrediction], labelling: Labelling) -> list[dict[str, Any]]:
    """Fig. 3: pixels and accuracy of the CPL by confidence (a, b; the pixels are e, f) and by perplexity (c, d).

    Returns:
        For each bin: against, low, high, pixels, accuracy (percent, None of no pixel), threshold.
    """
    counts = {
        "confidence": torch.zeros(2, len(CONFIDENCE_EDGES) - 1, dtype=torch.long),
        "perplexity": torch.zeros(2, len(PERPLEXITY_EDGES) - 1, dtype=torch.long),
    }
    for prediction in predictions:
        confidence, labels, uncertainty = labelling.of(prediction)
        counts["confidence"] += accuracy_in_bins(confidence, labels, prediction.truth, CONFIDENCE_EDGES)
        counts["perplexity"] += accuracy_in_bins(uncertainty, labels, prediction.truth, PERPLEXITY_EDGES)
    return [
        {
            "against": against,
            "low": round(low, 4),
            "high": round(high, 4),
            "pixels": pixels,
            "accuracy": 100 * right / pixels if pixels else None,
            "threshold": labelling.threshold,
        }
        for against, edges in (("confidence", CONFIDENCE_EDGES), ("perplexity", PERPLEXITY_EDGES))
        for low, high, pixels, right in zip(
            edges[:-1].tolist(), edges[1:].tolist(), *counts[against].tolist(), strict=True
        )
    ]


def filtered_miou(predictions: Iterable[ImagePrediction], labelling: Labelling) -> list[dict[str, Any]]:
    """Fig. 4: mIoU of the CPL from M' and from M†', over all pixels and over those with a perplexity up to epsilon.

    Each map is filtered by its own perplexity, so the certain pixels of the two are not the same; `share` says how many
    they are.

    Returns:
        Four rows: map, pixels ("all" or "certain"), share (percent of the pixels with a truth), miou.
    """
    metrics = {
        (cam, pixels): SegmentationMetric(labelling.names) for cam in ("M", "M†") for pixels in ("all", "certain")
    }
    for prediction in predictions:
        for cam, read in (("M", labelling.of), ("M†", labelling.of_aux)):
            _, labels, uncertainty = read(prediction)
            certain = truth_where_certain(prediction.truth, uncertainty, labelling.epsilon)
            metrics[cam, "all"].add(prediction=labels, reference=prediction.truth)
            metrics[cam, "certain"].add(prediction=labels, reference=certain)
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


def pseudo_label_miou(predictions: Iterable[ImagePrediction], labelling: Labelling) -> list[dict[str, Any]]:
    """Fig. 6: mIoU of the pseudo-labels, SPL (the segmentation, tags given) and CPL (the CAM at the training's xi).

    Returns:
        Two rows: labels, miou.
    """
    spl, cpl = SegmentationMetric(labelling.names), SegmentationMetric(labelling.names)
    for prediction in predictions:
        spl.add(prediction=prediction.masks["seg_tags"], reference=prediction.truth)
        cpl.add(prediction=labelling.of(prediction)[1], reference=prediction.truth)
    return [{"labels": "SPL", "miou": spl.compute()["miou"]}, {"labels": "CPL", "miou": cpl.compute()["miou"]}]


def reliability_per_image(predictions: Iterable[ImagePrediction], labelling: Labelling) -> list[dict[str, Any]]:
    """Fig. 7: mIoU and mean perplexity of each image's CPL, and their distance to the ideal.

    Returns:
        For each image: image_id, miou (percent, over the classes in its CPL or truth; None where the truth has no
        pixel to count), perplexity, mae.
    """
    metric, rows = SegmentationMetric(labelling.names), []
    for prediction in predictions:
        _, labels, uncertainty = labelling.of(prediction)
        metric.add(prediction=labels, reference=prediction.truth)
        miou, mean = metric.compute()["miou"], float(uncertainty.mean())
        mae = None if miou is None else distance_to_ideal(miou / 100, mean)
        rows.append({"image_id": prediction.image_id, "miou": miou, "perplexity": mean, "mae": mae})
    return rows


def coexistence(predictions: Iterable[ImagePrediction], labelling: Labelling) -> list[dict[str, Any]]:
    """Tab. 4b: C-mIoU, the mean over the classes that are usually seen with the same surroundings, and mIoU of the CPL.

    The labels are the `cam` protocol's, at the model's own `cam_threshold`, as in the paper's Tab. 1 and 4.

    Returns:
        One row: c_miou (None where no such class is known or occurs), miou.
    """
    metric = SegmentationMetric(labelling.names)
    for prediction in predictions:
        metric.add(prediction=prediction.masks["cam"], reference=prediction.truth)
    return [{"c_miou": metric.coexistence(labelling.coexistence_classes), "miou": metric.compute()["miou"]}]


ANALYSES: dict[str, Callable[[Iterable[ImagePrediction], Labelling], list[dict[str, Any]]]] = {
    "3": cpl_accuracy,
    "4": filtered_miou,
    "6": pseudo_label_miou,
    "7": reliability_per_image,
    "4b": coexistence,
}
"""By the number of the paper's figure; 4b is Tab. 4b."""


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """A list of equal dicts as text: one line each, numbers to the right, None as a dash.

    Example:
        >>> print(format_table([{"run": "CoSA", "miou": 76.19}, {"run": "no CSC", "miou": None}]))
        run      miou
        CoSA    76.19
        no CSC      -
    """
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = [isinstance(value, str) for value in rows[0].values()]

    def padded(line: list[str]) -> Iterator[str]:
        for cell, width, left in zip(line, widths, words, strict=True):
            yield cell.ljust(width) if left else cell.rjust(width)

    return "\n".join("  ".join(padded(line)).rstrip() for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
