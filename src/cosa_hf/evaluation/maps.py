"""What a model says about each image of a dataset, filtered by tags, and the labels that follow from it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from cosa_hf.data.images import read_image, read_mask, undecoded
from cosa_hf.data.tags import class_names, multi_hot
from cosa_hf.evaluation.crf import DenseCRF
from cosa_hf.inference import forward_multiscale
from cosa_hf.objective.pseudo_labels import cam_pseudo_labels, normalize_cams

__all__ = ["SCALES", "ImageMaps", "check_classes", "ignore_index", "label_names", "predict_maps"]

#: Relative input sizes of the paper's evaluation (Sec. 4.1).
SCALES = (1.0, 0.5, 1.5, 0.75, 1.25)


@dataclass(frozen=True)
class ImageMaps:
    """One image and the model's maps of it, on the token grid.

    Attributes:
        image_id: the dataset's id of the image.
        image: RGB, H x W.
        truth: (H, W) int64 ids, 255 = ignore; None where the dataset has no masks.
        labels: (C,) multi-hot tags that filter the maps.
        seg_logits: S, (K, h, w), not filtered.
        cam: (C, h, w) normalised CAM of the last layer in [0, 1]; classes without a tag are zero. None, like the
            other, of a network that only segments.
        aux_cam: the same of the auxiliary layer.

    Example:
        >>> cam = torch.tensor([0.0, 0.0, 0.8, 0.4]).reshape(2, 1, 2)
        >>> tags, image = torch.tensor([0.0, 1.0]), Image.new("RGB", (4, 1))
        >>> maps = ImageMaps("a", image, None, tags, torch.zeros(3, 1, 2), cam, cam)
        >>> ids, confidence = maps.label("cam", threshold=0.6)
        >>> ids.tolist(), [round(value, 2) for value in confidence[0].tolist()]
        ([[2, 2, 0, 0]], [0.8, 0.7, 0.5, 0.4])
    """

    image_id: str
    image: Image.Image
    truth: torch.Tensor | None
    labels: torch.Tensor
    seg_logits: torch.Tensor
    cam: Any
    aux_cam: Any

    def label(
        self, source: str, threshold: float = 0.5, crf: DenseCRF | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The image's pixels labelled, at its own size: maps are upsampled bilinearly, then decided on.

        Args:
            source: "cam", "cam_aux" or "cam_mean" for CAM pseudo-labels (Eq. 3); "seg_tags" or "seg" for the
                argmax of S over background and tags, or over all classes.
            threshold: xi, from where on a CAM is foreground; a segmentation does not use it.
            crf: refines a segmentation, over the classes that `source` leaves; a CAM does not use it.

        Returns:
            (H, W) int64 ids and (H, W) float32 confidences in [0, 1]: nu, the strongest CAM, whichever side of
            the threshold it is on; for a segmentation the softmax probability of the label.
        """
        ids = torch.arange(len(self.seg_logits), device=self.labels.device)
        if source != "seg":
            ids = ids[F.pad(self.labels.bool(), (1, 0), value=True)]
        if source in ("seg", "seg_tags"):
            logits = self.upsample(self.seg_logits[ids])
            if crf is not None:
                probability, winner = crf(logits, self.image).max(0)
                return ids[winner], probability
            highest, winner = logits.max(0)
            return ids[winner], (highest - logits.logsumexp(0)).exp()
        tagged = ids[1:] - 1
        if not len(tagged):
            nothing = torch.zeros(self.image.height, self.image.width, device=ids.device)
            return nothing.long(), nothing
        if source == "cam_mean":
            cams = (self.upsample(self.cam[tagged]) + self.upsample(self.aux_cam[tagged])) / 2
        else:
            cams = self.upsample({"cam": self.cam, "cam_aux": self.aux_cam}[source][tagged])
        return ids[cam_pseudo_labels(cams[None], threshold)[0]], cams.amax(0)

    def upsample(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (N, h, w) at the size of the image, (N, H, W)."""
        size = (self.image.height, self.image.width)
        return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def predict_maps(
    model: PreTrainedModel,
    processor: Any,
    dataset: Dataset,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    batch_size: int = 8,
    class_threshold: float | None = None,
) -> Iterator[ImageMaps]:
    """Run the model on every image of `dataset`, in order.

    The processor resizes the images for the model, which runs on the device it is on, in eval mode, and is
    returned to the mode it was in when the iteration ends.

    Args:
        model: CoSA, or any network that segments; on the device to run on.
        processor: the model's; its `size` is the input size.
        dataset: with the columns image, labels and image_id; a column mask is read where there is one.
        scales: relative input sizes whose outputs are fused.
        flip: also fuse the outputs for the mirrored image.
        batch_size: images per forward; changes speed and memory only.
        class_threshold: give an image without a tag the classes whose probability, sigmoid(Z), reaches this;
            None leaves it without.

    Yields:
        An `ImageMaps` per image.

    Raises:
        ValueError: the dataset's classes are not the model's, or an image or mask cannot be read or do not fit
            each other.

    Source: paper Sec. 4.1 (scales, flip).
    """
    check_classes(dataset, model.config)
    device = next(model.parameters()).device
    batches = DataLoader(undecoded(dataset), batch_size=batch_size, collate_fn=_Collate(processor, model.config))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for batch in batches:
            with torch.inference_mode():
                labels = batch["labels"].to(device)
                fused = forward_multiscale(model, batch["pixel_values"].to(device), scales=scales, flip=flip)
                if class_threshold is not None:
                    predicted = (fused.cls_logits.sigmoid() >= class_threshold).to(labels.dtype)
                    labels = torch.where(labels.any(dim=1, keepdim=True), labels, predicted)
                cams, aux_cams = (
                    [None] * len(labels) if maps is None else normalize_cams(maps, labels)
                    for maps in (fused.cam_logits, fused.aux_cam_logits)
                )
            for original, *maps in zip(batch["originals"], labels, fused.seg_logits, cams, aux_cams, strict=True):
                yield ImageMaps(*original, *maps)
    finally:
        for module in training:  # not model.train(): a part of it may have been in eval mode
            module.training = True


def label_names(config: Any) -> list[str]:
    """The K label names of a model's config in the order of their ids, background first.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> label_names(CoSAConfig(id2label={1: "cat", 0: "background"}))
        ['background', 'cat']
    """
    return [config.id2label[index] for index in range(config.num_labels)]


def ignore_index(config: Any) -> int:
    """The id that a model's config leaves out of masks; 255, everybody's, where it names none.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> ignore_index(CoSAConfig())
        255
    """
    return getattr(config, "semantic_loss_ignore_index", 255)


def check_classes(dataset: Dataset, config: Any) -> None:
    """Refuse a dataset whose classes are not the model's, in the same order.

    Raises:
        ValueError: shows both lists.
    """
    known = label_names(config)[1:]
    found = class_names(dataset)
    if known != found:
        raise ValueError(
            f"the dataset's classes are not the model's, in order:\n  dataset: {found}\n  model:    {known}"
        )


class _Collate:
    """Rows to a batch: pixel values for the model, tags as multi-hot, and the originals to compare with."""

    def __init__(self, processor: Any, config: Any):
        self.processor = processor
        self.num_classes = config.num_labels - 1
        self.ignore_index = ignore_index(config)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        originals = []
        for row in rows:
            image, truth = read_image(row), None
            if "mask" in row:
                mask = read_mask(row, image.size, self.num_classes, self.ignore_index)
                truth = torch.from_numpy(np.array(mask)).long()
            originals.append((row["image_id"], image, truth))
        images = [image for _, image, _ in originals]
        return {
            "pixel_values": self.processor(images, return_tensors="pt")["pixel_values"],
            "labels": torch.stack([multi_hot(row["labels"], self.num_classes) for row in rows]),
            "originals": originals,
        }
