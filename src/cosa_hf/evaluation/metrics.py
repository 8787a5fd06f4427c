"""Mean intersection over union from one confusion matrix for the whole data set, as an `evaluate` metric."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

__all__ = ["SegmentationMetric"]


class SegmentationMetric(evaluate.Metric):
    """IoU per class and mIoU in percent, over all pixels that were ever added.

    One running (K, K) confusion matrix is kept instead of the masks themselves, so the memory does not grow
    with the dataset, nothing is written to disk and nothing is downloaded. The mean is taken over
    dataset-level IoUs (a mean of per-image IoUs is another number), and only over classes that occur in a
    prediction or a reference.

    Args:
        label_names: the K class names, background first; the index is the id in the masks.
        ignore_index: reference pixels with this id are not counted.

    Raises:
        ValueError: `label_names` has fewer than two names or a duplicate, or `ignore_index` is the id of one.

    Example:
        >>> metric = SegmentationMetric(["background", "cat", "dog"])
        >>> metric.add_batch(predictions=[[[0, 1], [1, 1]]], references=[[[0, 0], [1, 255]]])
        >>> metric.compute()
        {'miou': 50.0, 'per_class': {'background': 50.0, 'cat': 50.0, 'dog': None}}
    """

    def __init__(self, label_names: Sequence[str], ignore_index: int = 255, **kwargs: Any):
        self.label_names = list(label_names)
        self.num_labels = len(self.label_names)
        self.ignore_index = ignore_index
        if self.num_labels < 2 or len(set(self.label_names)) != self.num_labels:
            raise ValueError(f"label_names must be two or more different names, got {self.label_names}")
        if 0 <= ignore_index < self.num_labels:
            raise ValueError(
                f"ignore_index={ignore_index} is also the id of {self.label_names[ignore_index]!r}; "
                f"choose one outside 0..{self.num_labels - 1}"
            )
        self._confusion = torch.zeros(self.num_labels, self.num_labels, dtype=torch.int64)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        mask = datasets.List(datasets.List(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Dataset-level intersection over union of semantic segmentation masks, in percent.",
            citation="",
            inputs_description="predictions, references: class ids of equal shape; arrays or lists of them.",
            features=datasets.Features({"predictions": mask, "references": mask}),
        )

    def _build_data_dir(self) -> str:
        # The base class creates a cache folder under the home directory here; no mask is ever cached.
        return self._data_dir_root

    @property
    def confusion_matrix(self) -> torch.Tensor:
        """(K, K) int64 pixel counts, row = reference, column = prediction; assign a sum to merge."""
        return self._confusion

    @confusion_matrix.setter
    def confusion_matrix(self, matrix: torch.Tensor) -> None:
        if matrix.shape != self._confusion.shape:
            raise ValueError(
                f"a confusion matrix of {self.num_labels} classes has shape {tuple(self._confusion.shape)}, "
                f"got {tuple(matrix.shape)}"
            )
        self._confusion = matrix.detach().to("cpu", torch.int64)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count a batch of masks.

        Args:
            predictions: class ids 0..K-1; one array or tensor (B, H, W), or a list of (H, W) of any sizes.
            references: class ids 0..K-1 or `ignore_index`, shaped like `predictions`.

        Raises:
            ValueError: shapes differ, or an id is outside the range.
        """
        if kwargs:
            raise ValueError(f"unknown inputs {sorted(kwargs)}; this metric takes predictions= and references=")
        if predictions is None or references is None:
            raise ValueError("give both predictions= and references=")
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        for prediction, reference in zip(predictions, references, strict=True):
            self._count(prediction, reference)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count one (H, W) mask; see `add_batch`."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Scores of all that was added since the last `compute`; then starts afresh, as in any metric.

        Args:
            predictions: a last batch to add first, with its references, or None.

        Returns:
            `miou` (percent, None when nothing was counted) and `per_class`, {name: percent, or None where the
            class occurs in no prediction and no reference}.
        """
        if predictions is not None or references is not None or kwargs:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        iou = self._iou()
        self._confusion = torch.zeros_like(self._confusion)
        return {"miou": _mean(list(iou.values())), "per_class": iou}

    def coexistence(self, names: Sequence[str]) -> float | None:
        """Mean IoU in percent over the named classes (the paper's C-mIoU); ask before `compute`.

        Returns:
            The mean over those that occur; None when none does.

        Raises:
            ValueError: a name is not among the label names.

        Example:
            >>> metric = SegmentationMetric(["background", "boat", "train"])
            >>> metric.add_batch(predictions=[[0, 1, 2, 2]], references=[[0, 1, 2, 1]])
            >>> metric.coexistence(["boat", "train"])
            50.0
        """
        unknown = [name for name in names if name not in self.label_names]
        if unknown:
            raise ValueError(f"unknown classes {unknown}; the metric knows {self.label_names}")
        iou = self._iou()
        return _mean([iou[name] for name in names])

    def _count(self, prediction: Any, reference: Any) -> None:
        prediction, reference = _ids(prediction), _ids(reference)
        if prediction.shape != reference.shape:
            raise ValueError(
                f"prediction of shape {tuple(prediction.shape)} for a reference of shape "
                f"{tuple(reference.shape)}; resize the prediction to the reference"
            )
        reference = reference.to(prediction.device)
        valid = reference != self.ignore_index
        self._check_range("prediction", prediction)
        self._check_range("reference", reference[valid])
        pairs = reference[valid] * self.num_labels + prediction[valid]
        counts = torch.bincount(pairs, minlength=self.num_labels**2)
        self._confusion += counts.reshape(self.num_labels, self.num_labels).cpu()

    def _check_range(self, what: str, ids: torch.Tensor) -> None:
        outside = ids[(ids < 0) | (ids >= self.num_labels)]
        if outside.numel():
            raise ValueError(
                f"{what} holds the ids {outside.unique()[:8].tolist()}, outside 0..{self.num_labels - 1}"
                + (f" and not the ignored {self.ignore_index}" if what == "reference" else "")
            )

    def _iou(self) -> dict[str, float | None]:
        matrix = self._confusion.double()
        intersection = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - intersection
        return {
            name: 100 * float(i / u) if u > 0 else None
            for name, i, u in zip(self.label_names, intersection, union, strict=True)
        }


def _ids(mask: Any) -> torch.Tensor:
    ids = mask if isinstance(mask, torch.Tensor) else torch.from_numpy(np.array(mask))
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"masks hold class ids, got {ids.dtype}; take the argmax of logits first")
    return ids.long()


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
