"""What a model scores on a dataset with masks, under both protocols and for both CAMs.

The paper's headline numbers restrict predictions to the classes of the image's tags; a photograph without
tags does not get that help. Every report therefore carries both, by name: `seg_tags` (tags given) and `seg`
(tags unknown).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from cosa_hf.data.ground_truth import require_ground_truth
from cosa_hf.data.negatives import teaches
from cosa_hf.digest import weights_sha256
from cosa_hf.evaluation.metrics import SegmentationMetric
from cosa_hf.inference import Segmenter, has_cams, ignore_index
from cosa_hf.objective.affinity import affinity_settings
from cosa_hf.progress import progress as progress_bar

__all__ = ["PROTOCOLS", "evaluate", "format_report", "protocols_of"]

#: What each column of a report predicts from, in the order of the table.
PROTOCOLS = {
    "seg": "tags unknown: argmax of the segmentation logits over all classes",
    "seg_tags": "tags given: argmax of the segmentation logits over background and the image's tags",
    "seg_spread": "tags unknown: probabilities of recognised classes, spread by the encoder's affinity, thresholded",
    "seg_tags_spread": "tags given: probabilities of the tags, spread by the encoder's affinity, thresholded",
    "cam": "tags given: normalised CAM of the last layer, thresholded",
    "cam_aux": "tags given: normalised CAM of the auxiliary layer, thresholded",
    "cam_mean": "tags given: mean of the two normalised CAMs, thresholded",
    "cam_spread": "tags given: mean of the two normalised CAMs, spread by the encoder's affinity, thresholded",
}


def protocols_of(model: Any) -> dict[str, str]:
    """The `PROTOCOLS` of a model: `seg` and `seg_tags`, with CAMs theirs, with an affinity all that it spreads."""
    cams, spreads = has_cams(model), has_cams(model) and affinity_settings(model.config) is not None
    return {
        name: text
        for name, text in PROTOCOLS.items()
        if name in ("seg", "seg_tags") or (spreads if name.endswith("_spread") else cams)
    }


def evaluate(
    segmenter: Segmenter,
    dataset: Dataset,
    *,
    cam_threshold: float | None = None,
    progress: bool = True,
    dataset_name: str | None = None,
    split: str | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """Score segmentation (tags unknown, tags given), CAM, auxiliary CAM and their mean; if the model's config names an
    affinity, what it spreads of them too; and the classification.

    Masks are compared at each image's own resolution, pixels with the ignored id are left out, and every image counts
    exactly once towards one confusion matrix per protocol, whatever the batch size and the number of processes.

    Args:
        segmenter: its CRF, if any, refines every mask, each over the classes that it leaves. The paper's numbers are of
            `scales=SCALES, flip=True`, without one.
        dataset: with the columns image, labels, image_id and mask.
        cam_threshold: CAM values from here on are foreground; default: the model's own `cam_threshold`.
        progress: show a bar on stderr.
        dataset_name: written into the report, as is `split`.
        split: of the dataset.
        accelerator: shares the images among its processes; each process returns the same report.

    Returns:
        JSON-serialisable: for each key of `protocols_of` the model a dict of `miou`, `per_class` and `coexistence_miou`
        (percent; None where nothing could be counted), plus `cls_map`, the mean over classes of the average precision
        of the class logits over images with tags and true negatives (percent; None without such logits), `cls_ap`, the
        same per class, `images` (how many), `untagged` (ids of images of which neither is known, for which the
        tags-given protocols can only answer background), `weights_sha256` and `protocol` (how all of it was measured).

    Raises:
        ValueError: the dataset is empty, has no masks or other classes than the model, no mask shows an object or none
            one of the tagged classes, or a file cannot be read.

    Source: paper Tab. 1-2 (CAM and segmentation), Tab. 4b (C-mIoU), Fig. 1a (classification), Sec. 4.1 (threshold).

    Example:
        >>> from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
        >>> from cosa_hf.data import SHAPES_CLASSES, load_shapes
        >>> config = CoSAConfig(backbone="test_vit", id2label=dict(enumerate(["background", *SHAPES_CLASSES])))
        >>> model = CoSAForWeaklySupervisedSegmentation(config)
        >>> segmenter = Segmenter(model, CoSAImageProcessor(size={"height": 32, "width": 32}))
        >>> report = evaluate(segmenter, load_shapes("val", 2, masks=True), progress=False)
        >>> report["images"], 0 <= report["seg_tags"]["miou"] <= 100
        (2, True)
    """
    if len(dataset) == 0:
        raise ValueError("the dataset is empty: nothing to score")
    if "mask" not in dataset.column_names:
        raise ValueError(
            f"evaluation needs a mask column (load with masks=True), the dataset has {dataset.column_names}"
        )
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    if accelerator is not None:
        # Not through DistributedDataParallel: its forward synchronises buffers and hangs on uneven counts.
        segmenter = dataclasses.replace(segmenter, model=accelerator.unwrap_model(segmenter.model))
    require_ground_truth(dataset, ignore_index(segmenter.model.config), rank, processes)
    share = dataset.select(range(rank, len(dataset), processes))
    config, names, protocols = segmenter.model.config, segmenter.names, protocols_of(segmenter.model)
    coexistence_classes = list(getattr(config, "coexistence_classes", ()))
    if cam_threshold is None:
        cam_threshold = getattr(config, "cam_threshold", None)
    metrics = {protocol: SegmentationMetric(names, ignore_index=ignore_index(config)) for protocol in protocols}
    known = {row["image_id"] for row in dataset.remove_columns(["image", "mask"]) if teaches(row)}
    classified: list[tuple[Tensor, Tensor]] = []
    segmentations = segmenter.predict(share)
    for one in progress_bar(segmentations, "evaluate", len(share), unit="image", disable=not progress or rank > 0):
        for protocol, metric in metrics.items():
            metric.add(prediction=one.label(protocol, cam_threshold)[0], reference=one.ground_truth)
        if one.cls_logits is not None and one.image_id in known:
            classified.append((one.labels.cpu(), one.cls_logits.cpu()))
    report: dict[str, Any] = {}
    for protocol, metric in metrics.items():
        if accelerator is not None:
            counts = metric.confusion_matrix.to(accelerator.device)
            metric.confusion_matrix = accelerator.reduce(counts, reduction="sum")
        coexistence = metric.coexistence(coexistence_classes)
        report[protocol] = {**metric.compute(), "coexistence_miou": coexistence}
    report["cls_map"], report["cls_ap"] = _average_precision(
        gather_object(classified) if accelerator else classified, names[1:]
    )
    report["images"] = len(dataset)
    report["untagged"] = [image_id for image_id in dataset["image_id"] if image_id not in known]
    report["weights_sha256"] = weights_sha256(segmenter.model)
    report["protocol"] = {
        **protocols,
        **segmenter.settings,
        "cam_threshold": cam_threshold,
        "ignore_index": ignore_index(config),
        "coexistence_classes": coexistence_classes,
        "dataset": dataset_name,
        "split": split,
        "model": config.name_or_path or None,
    }
    if segmenter.crf is not None:
        report["protocol"] |= {column: said.replace(":", ", CRF:", 1) for column, said in protocols.items()}
    return report


def _average_precision(
    classified: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]
) -> tuple[float | None, dict[str, float | None] | None]:
    """Percent: the mean over the classes that occur, and each class's; labels and logits are (C,) of each image."""
    if not classified:
        return None, None
    from sklearn.metrics import average_precision_score  # takes a second, which every command would wait for

    labels, scores = (torch.stack(each).double().numpy() for each in zip(*classified, strict=True))
    precision = {
        name: 100 * float(average_precision_score(there, score)) if there.any() else None
        for name, there, score in zip(names, labels.T, scores.T, strict=True)
    }
    known = [value for value in precision.values() if value is not None]
    return sum(known) / len(known), precision


def format_report(report: dict[str, Any]) -> str:
    """The report of `evaluate` as a table: classes as rows, protocols as columns, percent.

    Example:
        >>> column = {"miou": 75.0, "per_class": {"background": 75.0, "cat": None}, "coexistence_miou": None}
        >>> report = dict.fromkeys(PROTOCOLS, column) | {"images": 1, "untagged": [], "protocol": {"crf": None}}
        >>> report["cls_map"] = 87.5
        >>> print(format_report(report))  # doctest: +NORMALIZE_WHITESPACE
        IoU (%), 1 images    seg  seg_tags  seg_spread  seg_tags_spread   cam  cam_aux  cam_mean  cam_spread
        background          75.0      75.0        75.0             75.0  75.0     75.0      75.0        75.0
        cat                    -         -           -                -     -        -         -           -
        mIoU                75.0      75.0        75.0             75.0  75.0     75.0      75.0        75.0
        C-mIoU                 -         -           -                -     -        -         -           -
        tags unknown: seg, seg_spread; tags given: all others; -: nothing to count
        classification: mean average precision 87.5
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
    unknown = ", ".join(column for column in columns if PROTOCOLS[column].startswith("tags unknown"))
    lines.append(f"tags unknown: {unknown}; tags given: all others; -: nothing to count")
    if report["cls_map"] is not None:
        lines.append(f"classification: mean average precision {report['cls_map']:.1f}")
    if report["untagged"]:
        lines.append(f"{len(report['untagged'])} images without tags: {', '.join(report['untagged'][:10])}")
    if report["protocol"]["crf"]:
        crf = report["protocol"]["crf"]
        lines.append(f"all masks: after a CRF ({crf['backend']}), at {crf['max_pixels'] / 1e6} megapixels at most")
    return "\n".join(lines)
