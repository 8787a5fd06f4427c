"""What a model scores on a dataset with masks, under both protocols and for both CAMs.

The paper's headline numbers restrict predictions to the classes of the image's tags; a photograph without
tags does not get that help. Every report therefore carries both, by name: `seg_tags` (tags given) and `seg`
(tags unknown).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.data.images import read_image, read_mask, undecoded
from cosa_hf.data.tags import class_names, multi_hot
from cosa_hf.evaluation.metrics import SegmentationMetric
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.inference import forward_multiscale
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective.pseudo_labels import cam_pseudo_labels, normalize_cams, restrict_to_labels

__all__ = [
    "PROTOCOLS",
    "SCALES",
    "ImagePrediction",
    "evaluate_model",
    "format_report",
    "label_names",
    "predict_dataset",
]

#: What each column of a report predicts from, in the order of the table.
PROTOCOLS = {
    "seg": "tags unknown: argmax of the segmentation logits over all classes",
    "seg_tags": "tags given: argmax of the segmentation logits over background and the image's tags",
    "cam": "tags given: normalised CAM of the last layer, thresholded",
    "cam_aux": "tags given: normalised CAM of the auxiliary layer, thresholded",
    "cam_mean": "tags given: mean of the two normalised CAMs, thresholded",
}

#: Relative input sizes of the paper's evaluation (Sec. 4.1).
SCALES = (1.0, 0.5, 1.5, 0.75, 1.25)


@dataclass
class ImagePrediction:
    """One scored image, everything at its own resolution.

    Attributes:
        image_id: the dataset's id of the image.
        image: RGB, H x W.
        truth: (H, W) int64 ids, 255 = ignore.
        cam: (C, H, W) float32 normalised CAM of the last layer in [0, 1]; classes without a tag are zero.
        aux_cam: the same of the auxiliary layer.
        masks: {protocol: (H, W) int64 ids} for every key of `PROTOCOLS`.
    """

    image_id: str
    image: Image.Image
    truth: torch.Tensor
    cam: torch.Tensor
    aux_cam: torch.Tensor
    masks: dict[str, torch.Tensor]


def predict_dataset(
    model: CoSAForWeaklySupervisedSegmentation,
    processor: CoSAImageProcessor,
    dataset: Dataset,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    batch_size: int = 8,
    cam_threshold: float | None = None,
) -> Iterator[ImagePrediction]:
    """Predict every image of `dataset` in order, under every protocol.

    The processor resizes the images for the model; logits and CAMs go back to each image's own size by
    bilinear interpolation before the argmax or threshold. The model runs on the device it is on, in eval
    mode, and is returned to the mode it was in when the iteration ends.

    Args:
        model: on the device to run on.
        processor: the model's; its `size` is the input size.
        dataset: with the columns image, labels, image_id and mask.
        scales: relative input sizes whose outputs are fused.
        flip: also fuse the outputs for the mirrored image.
        batch_size: images per forward; changes speed and memory only.
        cam_threshold: CAM values from here on are foreground; the model's own `cam_threshold` when None.

    Yields:
        An `ImagePrediction` per image.

    Raises:
        ValueError: the dataset has no masks, its classes are not the model's, or an image or mask
            cannot be read or do not fit each other.

    Source: paper Sec. 4.1 (scales, flip, threshold).
    """
    config = model.config
    _check_dataset(dataset, config)
    threshold = config.cam_threshold if cam_threshold is None else cam_threshold
    device = next(model.parameters()).device
    batches = DataLoader(undecoded(dataset), batch_size=batch_size, collate_fn=_Collate(processor, config))
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            with torch.inference_mode():
                labels = batch["labels"].to(device)
                fused = forward_multiscale(model, batch["pixel_values"].to(device), scales=scales, flip=flip)
                seg_logits = fused.seg_logits.float()
                cams = normalize_cams(fused.cam_logits.float(), labels)
                aux_cams = normalize_cams(fused.aux_cam_logits.float(), labels)
            for index, (image_id, image, truth) in enumerate(batch["originals"]):
                one = slice(index, index + 1)
                with torch.inference_mode():
                    size = (image.height, image.width)
                    logits = _upsample(seg_logits[one], size)
                    cam, aux_cam = _upsample(cams[one], size), _upsample(aux_cams[one], size)
                    masks = {
                        "seg": logits.argmax(1),
                        "seg_tags": restrict_to_labels(logits, labels[one]).argmax(1),
                        "cam": cam_pseudo_labels(cam, threshold),
                        "cam_aux": cam_pseudo_labels(aux_cam, threshold),
                        "cam_mean": cam_pseudo_labels((cam + aux_cam) / 2, threshold),
                    }
                yield ImagePrediction(
                    image_id,
                    image,
                    truth,
                    cam[0],
                    aux_cam[0],
                    {name: mask[0] for name, mask in masks.items()},
                )
    finally:
        model.train(was_training)


def evaluate_model(
    model: CoSAForWeaklySupervisedSegmentation,
    processor: CoSAImageProcessor,
    dataset: Dataset,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    batch_size: int = 8,
    cam_threshold: float | None = None,
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
        processor: the model's; its `size` is the input size.
        dataset: with the columns image, labels, image_id and mask.
        scales: relative input sizes whose outputs are fused.
        flip: also fuse the outputs for the mirrored image.
        batch_size: images per forward; changes speed and memory only.
        cam_threshold: CAM values from here on are foreground; the model's own `cam_threshold` when None.
        progress: show a bar on stderr.
        dataset_name: written into the report, as is `split`.
        split: which part of it.
        accelerator: shares the images among its processes; each process returns the same report.

    Returns:
        JSON-serialisable: for each key of `PROTOCOLS` a dict of `miou`, `per_class` and `coexistence_miou`
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
    _check_dataset(dataset, config)
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    share = dataset.select(range(rank, len(dataset), processes))
    names = label_names(config)
    metrics = {
        protocol: SegmentationMetric(names, ignore_index=config.semantic_loss_ignore_index) for protocol in PROTOCOLS
    }
    predictions = predict_dataset(model, processor, share, scales, flip, batch_size, cam_threshold)
    for prediction in tqdm(predictions, "evaluate", total=len(share), unit="image", disable=not progress or rank > 0):
        for protocol, metric in metrics.items():
            metric.add(prediction=prediction.masks[protocol], reference=prediction.truth)
    report: dict[str, Any] = {}
    for protocol, metric in metrics.items():
        if accelerator is not None:
            counts = metric.confusion_matrix.to(accelerator.device)
            metric.confusion_matrix = accelerator.reduce(counts, reduction="sum")
        coexistence = metric.coexistence(config.coexistence_classes)
        report[protocol] = {**metric.compute(), "coexistence_miou": coexistence}
    report["images"] = len(dataset)
    report["untagged"] = [
        row["image_id"] for row in dataset.select_columns(["image_id", "labels"]) if not row["labels"]
    ]
    report["protocol"] = {
        **PROTOCOLS,
        "scales": list(scales),
        "flip": flip,
        "input_size": [processor.size["height"], processor.size["width"]],
        "cam_threshold": config.cam_threshold if cam_threshold is None else cam_threshold,
        "ignore_index": config.semantic_loss_ignore_index,
        "coexistence_classes": list(config.coexistence_classes),
        "dataset": dataset_name,
        "split": split,
        "model": config.name_or_path or None,
    }
    return report


def format_report(report: dict[str, Any]) -> str:
    """The report of `evaluate_model` as a table: classes as rows, protocols as columns, percent.

    Example:
        >>> column = {"miou": 75.0, "per_class": {"background": 75.0, "cat": None}, "coexistence_miou": None}
        >>> report = dict.fromkeys(PROTOCOLS, column) | {"images": 1, "untagged": []}
        >>> print(format_report(report))  # doctest: +NORMALIZE_WHITESPACE
        IoU (%), 1 images    seg  seg_tags   cam  cam_aux  cam_mean
        background          75.0      75.0  75.0     75.0      75.0
        cat                    -         -     -        -         -
        mIoU                75.0      75.0  75.0     75.0      75.0
        C-mIoU                 -         -     -        -         -
        seg: tags unknown; seg_tags, cam, cam_aux, cam_mean: tags given; -: nothing to count
    """
    columns = list(PROTOCOLS)
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
    lines.append("seg: tags unknown; seg_tags, cam, cam_aux, cam_mean: tags given; -: nothing to count")
    if report["untagged"]:
        lines.append(f"{len(report['untagged'])} images without tags: {', '.join(report['untagged'][:10])}")
    return "\n".join(lines)


class _Collate:
    """Rows to a batch: pixel values for the model, tags as multi-hot, and the originals to compare with."""

    def __init__(self, processor: CoSAImageProcessor, config: CoSAConfig):
        self.processor = processor
        self.num_classes = config.num_classes
        self.ignore_index = config.semantic_loss_ignore_index

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        originals = []
        for row in rows:
            image = read_image(row)
            mask = read_mask(row, image.size, self.num_classes, self.ignore_index)
            originals.append((row["image_id"], image, torch.from_numpy(np.array(mask)).long()))
        images = [image for _, image, _ in originals]
        return {
            "pixel_values": self.processor(images, return_tensors="pt")["pixel_values"],
            "labels": torch.stack([multi_hot(row["labels"], self.num_classes) for row in rows]),
            "originals": originals,
        }


def label_names(config: Any) -> list[str]:
    """The K label names of a model's config in the order of their ids, background first.

    Example:
        >>> label_names(CoSAConfig(id2label={1: "cat", 0: "background"}))
        ['background', 'cat']
    """
    return [config.id2label[index] for index in range(config.num_labels)]


def _upsample(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _check_dataset(dataset: Dataset, config: CoSAConfig) -> None:
    if "mask" not in dataset.column_names:
        raise ValueError(
            f"evaluation needs a mask column (load with masks=True), the dataset has {dataset.column_names}"
        )
    known = label_names(config)[1:]
    found = class_names(dataset)
    if known != found:
        raise ValueError(
            f"the dataset's classes are not the model's, in order:\n  dataset: {found}\n  model:    {known}"
        )
