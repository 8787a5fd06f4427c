"""From images to logits, CAMs and masks: the one path of prediction, evaluation, label export and the app."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from cosa_hf.data.encoded import image_keys
from cosa_hf.data.images import Reading, open_image, read_image, read_mask, undecoded
from cosa_hf.data.tags import multi_hot, parse_tags, tag_ids
from cosa_hf.inference.multiscale import check_scales, forward_multiscale
from cosa_hf.inference.networks import check_classes, eval_mode, ignore_index, label_names, load_model, require_cams
from cosa_hf.inference.segmentation import CRF, CRF_PIXELS, CRF_SHARPNESS, CRF_VALUES, Segmentation
from cosa_hf.objective.affinity import affinity_settings, foreground, spread_cams
from cosa_hf.objective.pseudo_labels import normalize_cams


class _Input(NamedTuple):
    image_id: str
    image: Image.Image
    labels: Tensor
    ground_truth: Tensor | None = None
    encoded: Mapping[str, Tensor] | None = None


@dataclass(eq=False)
class Segmenter:
    """A network and how images go through it; by default as in `pipeline("image-segmentation")`, with the same mask.

    Args:
        model: CoSA, or any network that segments, on the device to run on. It runs in eval mode and gets its mode back.
        processor: the model's; images of any size become inputs of its size.
        scales: relative input sizes whose outputs are fused (Sec. 3.3). `SCALES` and `flip` are the paper's evaluation.
        flip: also fuse the outputs for the mirrored images.
        batch_size: images per forward pass; changes speed and memory only.
        crf: refines masks of every source, of large images at a bounded size (`crf_size`); `evaluation.crf.DenseCRF()`.
        spread: masks are spread by the affinity that the model's config names, as the CAMs are.

    Raises:
        ValueError: no scale, or one that is not positive; a batch size below 1; `spread` for a model without an
            affinity.

    Example:
        >>> from cosa_hf import demo_model
        >>> segmenter = Segmenter.from_pretrained(demo_model(), device="cpu", size=64)
        >>> photo = Image.new("RGB", (80, 60), "gray")
        >>> segmenter(photo).mask.shape
        torch.Size([60, 80])
        >>> cats, unknown = segmenter([photo, photo], tags=[["cat"], None])
        >>> set(cats.mask.unique().tolist()) <= {0, segmenter.names.index("cat")}
        True
    """

    model: Any
    processor: Any
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    batch_size: int = 8
    crf: CRF | None = None
    spread: bool = False

    def __post_init__(self) -> None:
        check_scales(self.scales)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")
        if self.spread and affinity_settings(self.model.config) is None:
            raise ValueError(
                "spread masks need a model whose config names an affinity, as recipes like folder-clip make"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: torch.device | str | None = None,
        size: int | None = None,
        reading: Reading | None = None,
        **settings: Any,
    ) -> "Segmenter":
        """A saved model as a segmenter.

        Args:
            name: a directory of a saved model, or its name on the Hub.
            device: default: an accelerator if there is one.
            size: side of the square that images are resized to, in pixels; default: the processor's own.
            reading: what of it is set replaces the processor's own value range and bands.
            settings: `scales`, `flip`, `batch_size`, `crf` and `spread`, as above.

        Raises:
            FileNotFoundError, ValueError: as `load_model`; or as above.
        """
        device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        resized = {} if size is None else {"size": {"height": size, "width": size}}
        model, processor = load_model(str(name), device, **resized)
        if reading is not None:
            reading.keep(processor)
        return cls(model, processor, **settings)

    @property
    def reading(self) -> Reading:
        """What values and bands of image files become colours."""
        return Reading.of(self.processor)

    @property
    def names(self) -> list[str]:
        """The K label names in the order of their ids, background first."""
        return label_names(self.model.config)

    @property
    def settings(self) -> dict[str, Any]:
        """How images become maps, as reports and exports record it."""
        crf: Any = self.crf
        if crf is not None:
            named = {"backend": getattr(crf, "__name__", type(crf).__name__)}
            crf = asdict(crf) if hasattr(crf, "__dataclass_fields__") else named
            crf |= {"cam_sharpness": CRF_SHARPNESS, "max_pixels": CRF_PIXELS, "max_values": CRF_VALUES}
        affinity = affinity_settings(self.model.config)
        return (
            ({} if affinity is None else {"affinity": affinity})
            | self.reading.settings
            | {
                "scales": list(self.scales),
                "flip": self.flip,
                "input_size": [self.processor.size["height"], self.processor.size["width"]],
                "crf": crf,
            }
        )

    @overload
    def __call__(self, images: "str | Path | Image.Image", tags: Any = None) -> Segmentation: ...
    @overload
    def __call__(self, images: Sequence[Any], tags: Any = None) -> list[Segmentation]: ...
    def __call__(self, images: Any, tags: Any = None) -> Segmentation | list[Segmentation]:
        """Segment an image, or a list of them in batches.

        Args:
            images: a path or a PIL image, of any mode and size, or a list of such. EXIF orientation is applied,
                transparency laid over white, 16 bits scaled to 8 as in training.
            tags: the names of the classes in the image; None where they are unknown. A list of these for a list.

        Raises:
            ValueError: an image cannot be read (an `UnreadableImageError`), a tag is not a class of the model, or there
                are not as many tags as images.
        """
        if not isinstance(images, (list, tuple)):
            return self([images], [tags])[0]
        given = [None] * len(images) if tags is None else tags
        if len(given) != len(images):
            raise ValueError(f"{len(given)} lists of tags for {len(images)} images: give one each, None for unknown")
        image_ids = [
            Path(image).stem if isinstance(image, (str, Path)) else f"image {n}" for n, image in enumerate(images)
        ]
        labels = tag_ids([parse_tags(each) for each in given], self.names[1:], image_ids)

        def read(index: int) -> _Input:
            return _Input(
                image_ids[index], open_image(images[index], self.reading), multi_hot(labels[index], len(self.names) - 1)
            )

        return list(self._run(len(images), read))

    def predict(
        self,
        dataset: Dataset,
        class_threshold: float | None = None,
        encoded: Callable[[str], Mapping[str, Tensor]] | None = None,
    ) -> Iterator[Segmentation]:
        """Segment every image of a dataset, in order.

        Args:
            dataset: with the columns image, labels and image_id; a column mask is read where there is one.
            class_threshold: give an image without a tag the classes whose probability, sigmoid(Z), reaches this;
                None leaves it without.
            encoded: from an image's key (`data.encoded.image_keys`) to what the encoder's frozen part made of it and of
                its mirror image at scale 1, as `training.features.EncodedImages.read` has it: these passes are spared.

        Raises:
            ValueError: the dataset's classes are not the model's, or an image or mask cannot be read or they do not
                fit each other.
        """
        config = self.model.config
        check_classes(dataset, config)
        if class_threshold is not None:
            require_cams(self.model)
        rows, num_classes = undecoded(dataset), config.num_labels - 1
        keys = [] if encoded is None else image_keys(dataset)

        def read(index: int) -> _Input:
            row = rows[index]
            image, ground_truth = read_image(row, self.reading), None
            if "mask" in row:
                mask = read_mask(row, image.size, num_classes, ignore_index(config))
                ground_truth = torch.from_numpy(np.array(mask)).long()
            known = None if encoded is None else encoded(keys[index])
            return _Input(row["image_id"], image, multi_hot(row["labels"], num_classes), ground_truth, known)

        yield from self._run(len(rows), read, class_threshold)

    def _run(
        self, count: int, read: Callable[[int], _Input], class_threshold: float | None = None
    ) -> Iterator[Segmentation]:
        with eval_mode(self.model):
            for start in range(0, count, self.batch_size):
                inputs = [read(index) for index in range(start, min(start + self.batch_size, count))]
                # One at a time: processors that keep the aspect ratio would pad images to the largest of a batch.
                pixels = [self.processor(each.image, return_tensors="pt")["pixel_values"] for each in inputs]
                for _, same_size in itertools.groupby(zip(inputs, pixels, strict=True), lambda pair: pair[1].shape):
                    members, values = zip(*same_size, strict=True)
                    yield from self._forward(members, torch.cat(values), class_threshold)

    @torch.inference_mode()
    def _forward(
        self, inputs: Sequence[_Input], pixel_values: Tensor, class_threshold: float | None
    ) -> list[Segmentation]:
        weight = next(self.model.parameters())
        known = [each.encoded for each in inputs if each.encoded is not None]
        encoded = {name: torch.stack([maps[name] for maps in known]).to(weight) for name in known[0]} if known else None
        fused = forward_multiscale(self.model, pixel_values.to(weight), self.scales, self.flip, encoded=encoded)
        labels = torch.stack([each.labels for each in inputs]).to(weight.device)
        if class_threshold is not None:
            predicted = (fused.cls_logits.sigmoid() >= class_threshold).to(labels.dtype)
            labels = torch.where(labels.any(dim=1, keepdim=True), labels, predicted)
        nothing: Any = [None] * len(inputs)
        cams, aux_cams = (
            nothing if maps is None else normalize_cams(maps, labels)
            for maps in (fused.cam_logits, fused.aux_cam_logits)
        )
        spread = spread_seg = spread_seg_tags = nothing
        if fused.affinity is not None:
            recognised = (fused.cls_logits >= 0).to(labels.dtype)
            parts = [foreground(fused.seg_logits, tags) for tags in (recognised, labels)]
            joined = torch.cat([(cams + aux_cams) / 2, *parts], dim=1)  # the affinity is made once for all
            spread, spread_seg, spread_seg_tags = spread_cams(joined, fused.affinity, self.model.config).chunk(3, dim=1)
        scores = nothing if fused.cls_logits is None else fused.cls_logits
        maps: dict[str, Any] = {"labels": labels, "seg_logits": fused.seg_logits, "cls_logits": scores}
        maps |= {"cam": cams, "aux_cam": aux_cams, "spread_cam": spread}
        maps |= {"spread_seg": spread_seg, "spread_seg_tags": spread_seg_tags}
        threshold = getattr(self.model.config, "cam_threshold", 0.5)
        return [
            Segmentation(
                each.image_id,
                each.image,
                **{name: values[index] for name, values in maps.items()},
                ground_truth=each.ground_truth,
                cam_threshold=threshold,
                crf=self.crf,
                spread=self.spread,
            )
            for index, each in enumerate(inputs)
        ]


__all__ = ["Segmenter"]
