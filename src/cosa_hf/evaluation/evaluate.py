"""What a model scores on a dataset with masks, under both protocols and for both CAMs.

The paper's headline numbers restrict predictions to the classes of the image's tags; a photograph without
tags does not get that help. Every report therefore carries both, by name: `seg_tags` (tags given) and `seg`
(tags unknown).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cosa_hf.evaluation.crf import DenseCRF
from cosa_hf.evaluation.maps import SCALES, ignore_index, label_names, predict_maps
from cosa_hf.evaluation.metrics import SegmentationMetric
from cosa_hf.inference import has_cams

__all__ = ["PROTOCOLS", "ImagePrediction", "evaluate_model", "format_report", "predict_dataset", "protocols_of"]

#: What each column of a report predicts from, in the order of the table.
PROTOCOLS = {
    "seg": "tags unknown: argmax of the segmentation logits over all classes",
    "seg_tags": "tags given: argmax of the segmentation logits over background and the image's tags",
    "cam": "tags given: normalised CAM of the last layer, thresholded",
    "cam_aux": "tags given: normalised CAM of the auxiliary layer, thresholded",
    "cam_mean": "tags given: mean of the two normalised CAMs, thresholded",
}


def protocols_of(model: Any) -> dict[str, str]:
    """The `PROTOCOLS` that a model can be scored under: all, or `seg` and `seg_tags` without CAMs."""
    return {name: text for name, text in PROTOCOLS.items() if name.startswith("seg") or has_cams(model)}


@dataclass
class ImagePrediction:
    """One scored image, everything at its own resolution.

    Attributes:
        image_id: the dataset's id of the image.
        image: RGB, H x W.
        truth: (H, W) int64 ids, 255 = ignore.
        cam: (C, H, W) float32 normalised CAM of the last layer in [0, 1]; classes without a tag are zero. None, like
            the other, of a network that only segments.
        aux_cam: the same of the auxiliary layer.
        masks: {protocol: (H, W) int64 ids} for every key of `protocols_of` the model.
    """

    image_id: str
    image: Image.Image
    truth: torch.Tensor
    cam: Any
    aux_cam: Any
    masks: dict[str, torch.Tensor]


def predict_dataset(
    model: PreTrainedModel,
    processor: Any,
    dataset: Dataset,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    batch_size: int = 8,
    cam_threshold: float | None = None,
    crf: DenseCRF | None = None,
) -> Iterator[ImagePrediction]:
    """Predict every image of `dataset` in order, under every protocol that the model allows.

    Args:
        model: and `processor`, `scales`, `flip`, `batch_size`: as in `predict_maps`.
        dataset: with the columns image, labels, image_id and mask.
        cam_threshold: CAM values from here on are foreground; the model's own `cam_threshold` when None.
        crf: refines `seg` and `seg_tags`, each over the classes that it leaves; the CAMs stay as they are.

    Yields:
        An `ImagePrediction` per image.

    Raises:
        ValueError: the dataset has no masks; or as `predict_maps`.

    Source: paper Sec. 4.1 (threshold).
    """
    _check_masks(dataset)
    protocols, threshold = protocols_of(model), _threshold(model, cam_threshold)
    for maps in predict_maps(model, processor, dataset, scales, flip, batch_size):
        assert maps.truth is not None  # the dataset has masks
        yield ImagePrediction(
            maps.image_id,
            maps.image,
            maps.truth,
            None if maps.cam is None else maps.upsample(maps.cam),
            None if maps.aux_cam is None else maps.upsample(maps.aux_cam),
            {protocol: maps.label(protocol, threshold, crf)[0] for protocol in protocols},
        )


def evaluate_model(
    model: PreTrainedModel,
    processor: Any,
    dataset: Dataset,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    batch_size: int = 8,
    cam_threshold: float | None = None,
    crf: DenseCRF | None = None,
    progress: bool = True,
    dataset_name: str | None = None,
    split: str | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """Score segmentation (tags unknown, tags given), CAM, auxiliary CAM and their mean against masks.

    Masks are compared at each image's own resolution, pixels with id 255 are ignored, and every image counts
    exactly once towards one confusion matrix per protocol, whatever the batch size and the number of
    processes.

    Args:
        model: wrapped by the accelerator or not.
        dataset: and all up to `crf`: as in `predict_dataset`.
        progress: show a bar on stderr.
        dataset_name: written into the report, as is `split`.
        split: which part of it.
        accelerator: shares the images among its processes; each process returns the same report.

    Returns:
        JSON-serialisable: for each key of `protocols_of` the model a dict of `miou`, `per_class` and `coexistence_miou`
        (percent; None where nothing could be counted), plus `images` (how many), `untagged` (ids of images
        without a tag, for which the tags-given protocols can only answer background) and `protocol` (how all
        of it was measured).

    Raises:
        ValueError: the dataset is empty; or as `predict_dataset`.

    Source: paper Tab. 1-2 (CAM and segmentation), Tab. 4b (C-mIoU).
    """
    if accelerator is not None:
        # Not through DistributedDataParallel: its forward synchronises buffers and hangs on uneven shares.
        model = accelerator.unwrap_model(model)
    config = model.config
    if len(dataset) == 0:
        raise ValueError("the dataset is empty: nothing to score")
    _check_masks(dataset)
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    share = dataset.select(range(rank, len(dataset), processes))
    names, ignored, protocols = label_names(config), ignore_index(config), protocols_of(model)
    coexistence_classes = list(getattr(config, "coexistence_classes", ()))
    metrics = {protocol: SegmentationMetric(names, ignore_index=ignored) for protocol in protocols}
    predictions = predict_dataset(model, processor, share, scales, flip, batch_size, cam_threshold, crf)
    for prediction in tqdm(predictions, "evaluate", total=len(share), unit="image", disable=not progress or rank > 0):
        for protocol, metric in metrics.items():
            metric.add(prediction=prediction.masks[protocol], reference=prediction.truth)
    report: dict[str, Any] = {}
    for protocol, metric in metrics.items():
        if accelerator is not None:
            counts = metric.confusion_matrix.to(accelerator.device)
            metric.confusion_matrix = accelerator.reduce(counts, reduction="sum")
        coexistence = metric.coexistence(coexistence_classes)
        report[protocol] = {**metric.compute(), "coexistence_miou": coexistence}
    report["images"] = len(dataset)
    report["untagged"] = [
        row["image_id"] for row in dataset.select_columns(["image_id", "labels"]) if not row["labels"]
    ]
    report["protocol"] = {
        **protocols,
        **{column: PROTOCOLS[column].replace(":", ", CRF:", 1) for column in ("seg", "seg_tags") if crf is not None},
        "crf": None if crf is None else asdict(crf),
        "scales": list(scales),
        "flip": flip,
        "input_size": [processor.size["height"], processor.size["width"]],
        "cam_threshold": _threshold(model, cam_threshold) if has_cams(model) else None,
        "ignore_index": ignored,
        "coexistence_classes": coexistence_classes,
        "dataset": dataset_name,
        "split": split,
        "model": config.name_or_path or None,
    }
    return report


def format_report(report: dict[str, Any]) -> str:
    """The report of `evaluate_model` as a table: classes as rows, protocols as columns, percent.

    Example:
        >>> column = {"miou": 75.0, "per_class": {"background": 75.0, "cat": None}, "coexistence_miou": None}
        >>> report = dict.fromkeys(PROTOCOLS, column) | {"images": 1, "untagged": [], "protocol": {"crf": None}}
        >>> print(format_report(report))  # doctest: +NORMALIZE_WHITESPACE
        IoU (%), 1 images    seg  seg_tags   cam  cam_aux  cam_mean
        background          75.0      75.0  75.0     75.0      75.0
        cat                    -         -     -        -         -
        mIoU                75.0      75.0  75.0     75.0      75.0
        C-mIoU                 -         -     -        -         -
        seg: tags unknown; seg_tags, cam, cam_aux, cam_mean: tags given; -: nothing to count
    """
    columns = [protocol for protocol in PROTOCOLS if protocol in report]
    rows = [[name, *(report[column]["per_class"][name] for column in columns)] for name in report["seg"]["per_class"]]
    rows.append(["mIoU", *(report[column]["miou"] for column in columns)])
    rows.append(["C-mIoU", *(report[column]["coexistence_miou"] for column in columns)])
    head = f"IoU (%), {report['images']} images"
    name_width = max(len(name) for name in (head, *(row[0] for row in rows)))

    def line(name: str, cells: list[str]) -> str:
        padded = [cell.rjust(max(5, len(column))) for cell, column in zip(cells, columns, strict=True)]
        return "  ".join([name.ljust(name_width), *padded])

    lines = [line(head, columns)]
    for name, *values in rows:
        lines.append(line(name, ["-" if value is None else f"{value:.1f}" for value in values]))
    lines.append(f"seg: tags unknown; {', '.join(columns[1:])}: tags given; -: nothing to count")
    if report["untagged"]:
        lines.append(f"{len(report['untagged'])} images without tags: {', '.join(report['untagged'][:10])}")
    if report["protocol"]["crf"]:
        lines.append(f"seg, seg_tags: after a CRF ({report['protocol']['crf']['backend']})")
    return "\n".join(lines)


def _threshold(model: Any, cam_threshold: float | None) -> float:
    return getattr(model.config, "cam_threshold", 0.5) if cam_threshold is None else cam_threshold


def _check_masks(dataset: Dataset) -> None:
    if "mask" not in dataset.column_names:
        raise ValueError(
            f"evaluation needs a mask column (load with masks=True), the dataset has {dataset.column_names}"
        )
