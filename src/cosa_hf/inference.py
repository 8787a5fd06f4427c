"""From images to logits, CAMs and masks: the one path of prediction, evaluation, label export and the app."""

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
)

from cosa_hf.data.images import Reading, ignored_id, open_image, read_image, read_mask, undecoded
from cosa_hf.data.tags import class_names, multi_hot, parse_tags, tag_ids
from cosa_hf.image_processing_cosa import upsampled_argmax
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective.affinity import affinity_settings, foreground, spread_cams
from cosa_hf.objective.precision import at_least_float32
from cosa_hf.objective.pseudo_labels import cam_pseudo_labels, normalize_cams

#: Relative input sizes of the paper's evaluation (Sec. 4.1), each with its mirror image.
SCALES = (1.0, 0.5, 1.5, 0.75, 1.25)

#: Refines a segmentation: logits (K, H, W) at the size of an RGB image, and that image, to probabilities (K, H, W).
CRF = Callable[[Tensor, Image.Image], Tensor]
#: At most so many pixels, and so many values of all classes, go through a CRF: its memory grows with both, and 12
#: megapixels of a phone and 21 classes would take 12 GB. VOC's and COCO's images have less.
CRF_PIXELS, CRF_VALUES = 320_000, 32_000_000

#: Networks whose answer is a set of masks with classes. Others of their auto class want more than images, or images of
#: one size alone.
MASK_SETS = ("maskformer", "mask2former")
LEAST_SCORE = 1e-6  # of a class at a pixel: its logarithm is finite


@dataclass(frozen=True)
class MultiScaleOutput:
    """Fused maps on the token grid of scale 1, or one position in 4 x 4 pixels for a network without tokens.

    Attributes:
        seg_logits: S, (B, K, h, w), mean.
        cls_logits: (B, C), mean; None, like the CAMs, of a network that only segments.
        cam_logits: M, (B, C, h, w), maximum (Alg. 1) or sum.
        aux_cam_logits: M†, (B, C, h, w), likewise.
        affinity: what tokens of the plain image at scale 1 are alike by, if the model's config names it: features
            (B, D, h, w), or attention (B, N, N).
    """

    seg_logits: Tensor
    cls_logits: Any = None
    cam_logits: Any = None
    aux_cam_logits: Any = None
    affinity: Any = None


def has_cams(model: Any) -> bool:
    """Whether a model has class activation maps, as CoSA's have; others only segment.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> has_cams(CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit")))
        True
    """
    return getattr(model.config, "model_type", None) == CoSAForWeaklySupervisedSegmentation.config_class.model_type


def require_cams(model: Any) -> None:
    """Refuse a model that only segments, for what is about CAMs.

    Raises:
        ValueError: it has no CAMs.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> require_cams(CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit")))
    """
    if not has_cams(model):
        raise ValueError(f"a {type(model).__name__} only segments and has no CAMs; give a model that CoSA trained")


def stride_of(model: Any) -> int:
    """What the sides of a network's images are multiples of, in pixels.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> stride_of(CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit")))
        16
    """
    return model.backbone.stride if has_cams(model) else 32  # every common encoder takes multiples of 32


def auto_class(config: Any) -> Any:
    """Of transformers, what loads the segmentation network of a config.

    Example:
        >>> from transformers import SegformerConfig
        >>> auto_class(SegformerConfig()).__name__
        'AutoModelForSemanticSegmentation'
    """
    return AutoModelForUniversalSegmentation if config.model_type in MASK_SETS else AutoModelForSemanticSegmentation


def segmentation_logits(outputs: Any) -> Tensor:
    """S, (B, K, h, w), of any segmentation network's output: its logits, or what a set of masks says of each pixel.

    A class's score is the sum over masks of sigmoid(mask) times the probability that the mask is of that class, as in
    Mask2Former's semantic inference; its logarithm is a logit whose softmax divides the scores by their sum.

    Example:
        >>> from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput
        >>> masks, classes = torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]]]), torch.tensor([[[9.0, 0, 0], [0, 9.0, 0]]])
        >>> outputs = Mask2FormerForUniversalSegmentationOutput(
        ...     masks_queries_logits=masks, class_queries_logits=classes
        ... )
        >>> segmentation_logits(outputs).argmax(1).tolist()  # the first mask is of class 0, the second of class 1
        [[[0, 1]]]
    """
    if not hasattr(outputs, "class_queries_logits"):
        return outputs.logits
    classes = at_least_float32(outputs.class_queries_logits).softmax(-1)[..., :-1]  # the last is "no object"
    masks = at_least_float32(outputs.masks_queries_logits).sigmoid()
    return torch.einsum("bqk,bqhw->bkhw", classes, masks).clamp_min(LEAST_SCORE).log()


def forward_multiscale(
    model: Any,
    pixel_values: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    flip: bool = True,
    cam_fusion: Literal["max", "sum"] = "max",
) -> MultiScaleOutput:
    """Run the model on scaled and mirrored copies; CAMs by maximum, logits by mean (Sec. 3.3, Alg. 1 lines 7-8).

    A copy and its mirror image share one forward pass. Gradients and train/eval mode are left to the caller.

    Args:
        model: CoSA, or any network whose output `segmentation_logits` takes.
        pixel_values: normalised images, (B, 3, H, W).
        scales: factors on H and W, each rounded to the model's stride, or to 32 pixels where it has none.
        flip: add the mirror image of each scale.
        cam_fusion: `max`, the paper's; `sum`, the released code's: of what is positive in the maximum over flips.

    Raises:
        ValueError: no scale, or one that is not positive.

    Example:
        >>> import torch
        >>> from cosa_hf import CoSAConfig
        >>> config = CoSAConfig(backbone="test_vit", aux_layer=-2, num_labels=4)
        >>> model = CoSAForWeaklySupervisedSegmentation(config).eval()
        >>> with torch.no_grad():
        ...     fused = forward_multiscale(model, torch.zeros(2, 3, 64, 64), scales=(1.0, 1.5))
        >>> fused.cam_logits.shape, fused.seg_logits.shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 4, 4, 4]))
    """
    _check_scales(scales)
    cams_too = has_cams(model)
    if not (cams_too or flip) and tuple(scales) == (1.0,):
        return MultiScaleOutput(at_least_float32(segmentation_logits(model(pixel_values))))  # at the network's own size
    stride = stride_of(model)
    batch, _, *size = pixel_values.shape

    def tokens(side: float) -> int:
        """How many tokens the model makes of a side."""
        return max(1, math.floor(side / stride + 0.5))

    grid = [tokens(side) * (1 if cams_too else 8) for side in size]
    cls_logits: list[Tensor] = []
    # A tuple for each scale: the maps and, flipped back, those of the mirror image.
    cams: list[tuple[Tensor, ...]] = []
    aux_cams: list[tuple[Tensor, ...]] = []
    seg_logits: list[tuple[Tensor, ...]] = []
    spreads, affinity = cams_too and affinity_settings(model.config) is not None, None
    for scale in scales:
        scaled_size = [tokens(side * scale) * stride for side in size]
        images = pixel_values
        if scaled_size != size:
            images = F.interpolate(pixel_values, size=scaled_size, mode="bilinear", align_corners=False)
        inputs = torch.cat([images, images.flip(-1)]) if flip else images
        if spreads and scale == 1:
            outputs = model(inputs, output_affinity=True)
            affinity = outputs.affinity[:batch]
        else:
            outputs = model(inputs)
        fused = [(segmentation_logits(outputs), seg_logits)]
        if cams_too:
            cls_logits.append(outputs.cls_logits.unflatten(0, (-1, batch)))
            fused += [(outputs.cam_logits, cams), (outputs.aux_cam_logits, aux_cams)]
        for maps, collected in fused:
            plain, *mirrored = maps.unflatten(0, (-1, batch))
            collected.append((plain, *(twin.flip(-1) for twin in mirrored)))

    def on_grid(collected: list[tuple[Tensor, ...]]) -> Tensor:
        """All copies on the grid of scale 1: (copies, B, ..., h, w)."""
        return torch.stack(
            [
                F.interpolate(at_least_float32(copy), size=grid, mode="bilinear", align_corners=False)
                for twins in collected
                for copy in twins
            ]
        )

    def fused_cams(collected: list[tuple[Tensor, ...]]) -> Tensor:
        copies = on_grid(collected)
        if cam_fusion == "max":
            return copies.amax(dim=0)
        return copies.unflatten(0, (len(scales), -1)).amax(dim=1).relu().sum(dim=0)

    segmentation = on_grid(seg_logits).mean(dim=0)
    if not cams_too:
        return MultiScaleOutput(segmentation)
    if spreads and affinity is None:
        affinity = model(pixel_values, output_affinity=True).affinity
    scores = at_least_float32(torch.cat(cls_logits)).mean(dim=0)
    return MultiScaleOutput(segmentation, scores, fused_cams(cams), fused_cams(aux_cams), affinity)


def _check_scales(scales: Sequence[float]) -> None:
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be positive numbers, at least one, got {list(scales)}")


def load_model(
    name: str, device: torch.device | str, **processor_settings: Any
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A saved segmentation model, CoSA or another, in eval mode, and its processor.

    Args:
        name: a directory of a saved model, or its name on the Hub.
        device: where to put the model.
        processor_settings: settings of the processor to replace, such as `size`.

    Raises:
        FileNotFoundError: there is no segmentation model of that name, or no processor beside it.
        ValueError: its weights are damaged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from cosa_hf import CoSAConfig, CoSAImageProcessor
        >>> with TemporaryDirectory() as folder:
        ...     CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit")).save_pretrained(folder)
        ...     _ = CoSAImageProcessor().save_pretrained(folder)
        ...     model, processor = load_model(folder, "cpu")
        >>> model.training, processor.size["height"]
        (False, 448)
    """
    try:
        config = AutoConfig.from_pretrained(name)
        model = auto_class(config).from_pretrained(name, config=config)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no model at {name!r}: neither a directory with one nor a name within reach on the Hub\n{error}"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{name}/model.safetensors is damaged ({error}): copy or download it again") from error
    try:
        processor = AutoImageProcessor.from_pretrained(name, **processor_settings)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the model {name!r} has no image processor: save one beside it (processor.save_pretrained), or copy the "
            f"preprocessor_config.json of the run it comes from\n{error}"
        ) from error
    return model.eval().to(device), processor


@dataclass(frozen=True, eq=False)
class Segmentation:
    """One image and what a network says of it, on the network's own grid of h x w.

    Attributes:
        image_id: the dataset's id of the image, or the stem of its file's name.
        image: RGB, H x W.
        labels: (C,) multi-hot tags that filter the maps; all zero where they are unknown.
        seg_logits: S, (K, h, w), of all classes.
        cls_logits: Z, (C,); None, like the CAMs, of a network that only segments.
        cam: (C, h, w) normalised CAM of the last layer in [0, 1]; classes without a tag are zero.
        aux_cam: the same of the auxiliary layer.
        spread_cam: the mean of both, spread by the model's affinity; None without one.
        spread_seg: (C, h, w) class probabilities spread likewise, of the classes that Z recognises (sigmoid(Z) >= 0.5).
        spread_seg_tags: the same of the tags.
        ground_truth: (H, W) int64 ids; None where there is none.
        cam_threshold: xi of the model, from where on a CAM is foreground.
        crf: refines the segmentation, not the CAMs.
        spread: `mask` is of the spread segmentation.

    Example:
        >>> cam = torch.tensor([0.0, 0.0, 0.8, 0.4]).reshape(2, 1, 2)
        >>> tags, image = torch.tensor([0.0, 1.0]), Image.new("RGB", (4, 1))
        >>> one = Segmentation("a", image, tags, torch.zeros(3, 1, 2), cam=cam, aux_cam=cam)
        >>> ids, confidence = one.label("cam", threshold=0.6)
        >>> ids.tolist(), [round(value, 2) for value in confidence[0].tolist()]
        ([[2, 2, 0, 0]], [0.8, 0.7, 0.5, 0.4])
    """

    image_id: str
    image: Image.Image
    labels: Tensor
    seg_logits: Tensor
    cls_logits: Any = None
    cam: Any = None
    aux_cam: Any = None
    spread_cam: Any = None
    spread_seg: Any = None
    spread_seg_tags: Any = None
    ground_truth: Tensor | None = None
    cam_threshold: float = 0.5
    crf: CRF | None = None
    spread: bool = False

    @property
    def mask(self) -> Tensor:
        """(H, W) int64 ids: those of `seg_tags` where there are tags, those of `seg` where there are none; spread ones
        if the segmenter says so."""
        if self.spread:
            return self.label(f"{self._source}_spread")[0]
        return self._segment(self._source)[0].long()

    @property
    def crf_size(self) -> tuple[int, int]:
        """Width and height at which a CRF refines `mask`: the image's, or less (`CRF_PIXELS`), upsampled afterwards."""
        return crf_size(self.image.size, len(self._possible(self._source)))

    def label(self, source: str, threshold: float | None = None) -> tuple[Tensor, Tensor]:
        """Every pixel's class, at the size of the image: maps are upsampled bilinearly, then decided on.

        Args:
            source: "cam", "cam_aux", "cam_mean" or "cam_spread" for CAM pseudo-labels (Eq. 3); "seg_tags" or "seg" for
                the argmax of S over background and tags, or over all classes; "seg_tags_spread" or "seg_spread" for its
                probabilities, spread and thresholded like a CAM.
            threshold: xi, default: `cam_threshold`; a segmentation does not use it.

        Returns:
            (H, W) int64 ids and (H, W) float32 confidences in [0, 1]: nu, the strongest CAM, on whichever side of
            the threshold it is; the probability of the class in a segmentation.

        Raises:
            ValueError: unknown source, a CAM of a network that only segments, or a spread one without an affinity.
        """
        if source in ("seg", "seg_tags"):
            ids, highest = self._segment(source)
            if self.crf is not None:
                return ids.long(), highest
            total = torch.zeros_like(highest)
            for plane in self.seg_logits[self._possible(source)]:
                total += (self.upsample(plane[None])[0] - highest).exp()
            return ids.long(), total.reciprocal()
        sources = {"cam": [self.cam], "cam_aux": [self.aux_cam], "cam_mean": [self.cam, self.aux_cam]}
        sources |= {name: [maps] for name, maps in self._spread.items()}
        maps = sources.get(source, [None])
        if maps[0] is None:
            raise ValueError(
                f"no {source!r}: sources are seg, seg_tags and, of a network with CAMs, cam, cam_aux, cam_mean, and "
                f"{', '.join(self._spread)} where its config names an affinity"
            )
        classes = sum(maps).flatten(1).any(dim=1).nonzero().flatten()
        if not len(classes):
            nothing = torch.zeros(self.image.height, self.image.width, device=classes.device)
            return nothing.long(), nothing
        mean = torch.stack([self.upsample(each[classes]) for each in maps]).mean(0)
        winner = cam_pseudo_labels(mean[None], self.cam_threshold if threshold is None else threshold)[0]
        return F.pad(classes + 1, (1, 0))[winner], mean.amax(0)

    @property
    def _spread(self) -> dict[str, Any]:
        """The maps spread by an affinity, by source."""
        return {
            "cam_spread": self.spread_cam, "seg_spread": self.spread_seg, "seg_tags_spread": self.spread_seg_tags,
        }  # fmt: skip

    def upsample(self, maps: Tensor) -> Tensor:
        """Maps (N, h, w) at the size of the image, (N, H, W)."""
        return _resized(maps, self.image)

    @property
    def _source(self) -> str:
        return "seg_tags" if self.labels.any() else "seg"

    def _possible(self, source: str) -> Tensor:
        """The ids that pixels may get."""
        ids = torch.arange(len(self.seg_logits), device=self.labels.device)
        return ids if source == "seg" else ids[F.pad(self.labels.bool(), (1, 0), value=True)]

    def _segment(self, source: str) -> tuple[Tensor, Tensor]:
        """Ids, of few bits, and their probabilities after a CRF or their logits without one."""
        ids = self._possible(source)
        logits = self.seg_logits[ids]  # dropping classes, rather than setting -inf, keeps nan out of the interpolation
        if self.crf is not None:
            smaller = self.image.resize(crf_size(self.image.size, len(ids)), Image.Resampling.BOX)
            logits = self.crf(_resized(logits, smaller), smaller)
            _trim_heap()
        return upsampled_argmax(logits, (self.image.height, self.image.width), ids.tolist())


def crf_size(size: tuple[int, int], num_labels: int) -> tuple[int, int]:
    """The size, (width, height), at which an image goes through a CRF.

    Example:
        >>> crf_size((640, 480), 81), crf_size((4000, 3000), 21)
        ((640, 480), (653, 490))
    """
    scale = min(1.0, math.sqrt(min(CRF_PIXELS, CRF_VALUES / num_labels) / math.prod(size)))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _trim_heap() -> None:
    """Back to the system with what a CRF has freed: glibc keeps half a gigabyte of it, in pieces that are too small for
    the maps of a large photo."""
    with suppress(AttributeError, OSError, TypeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)


def _resized(maps: Tensor, image: Image.Image) -> Tensor:
    """Maps (N, h, w) at the size of an image."""
    return F.interpolate(maps[None], size=(image.height, image.width), mode="bilinear", align_corners=False)[0]


class _Input(NamedTuple):
    image_id: str
    image: Image.Image
    labels: Tensor
    ground_truth: Tensor | None = None


@dataclass(eq=False)
class Segmenter:
    """A network and how images go through it; by default as in `pipeline("image-segmentation")`, with the same mask.

    Args:
        model: CoSA, or any network that segments, on the device to run on. It runs in eval mode and gets its mode back.
        processor: the model's; images of any size become inputs of its size.
        scales: relative input sizes whose outputs are fused (Sec. 3.3). `SCALES` and `flip` are the paper's evaluation.
        flip: also fuse the outputs for the mirrored images.
        batch_size: images per forward pass; changes speed and memory only.
        crf: refines segmentations, such as `evaluation.crf.DenseCRF()`, of large images at a bounded size (`crf_size`).
        spread: masks are spread by the affinity that the model's config names, as the CAMs are.

    Raises:
        ValueError: no scale, or one that is not positive; a batch size below 1; `spread` with a CRF, or for a model
            without an affinity.

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
        _check_scales(self.scales)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")
        if self.spread and self.crf is not None:
            raise ValueError("masks are spread, or refined by a CRF: choose one")
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
            crf |= {"max_pixels": CRF_PIXELS, "max_values": CRF_VALUES}
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

    def predict(self, dataset: Dataset, class_threshold: float | None = None) -> Iterator[Segmentation]:
        """Segment every image of a dataset, in order.

        Args:
            dataset: with the columns image, labels and image_id; a column mask is read where there is one.
            class_threshold: give an image without a tag the classes whose probability, sigmoid(Z), reaches this;
                None leaves it without.

        Raises:
            ValueError: the dataset's classes are not the model's, or an image or mask cannot be read or they do not
                fit each other.
        """
        config = self.model.config
        check_classes(dataset, config)
        if class_threshold is not None:
            require_cams(self.model)
        rows, num_classes = undecoded(dataset), config.num_labels - 1

        def read(index: int) -> _Input:
            row = rows[index]
            image, ground_truth = read_image(row, self.reading), None
            if "mask" in row:
                mask = read_mask(row, image.size, num_classes, ignore_index(config))
                ground_truth = torch.from_numpy(np.array(mask)).long()
            return _Input(row["image_id"], image, multi_hot(row["labels"], num_classes), ground_truth)

        yield from self._run(len(rows), read, class_threshold)

    def _run(
        self, count: int, read: Callable[[int], _Input], class_threshold: float | None = None
    ) -> Iterator[Segmentation]:
        with _eval_mode(self.model):
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
        fused = forward_multiscale(self.model, pixel_values.to(weight), self.scales, self.flip)
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


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
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
    """The id that a model's config leaves out of masks; that of `ignored_id` where it names none, or one of a label.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> ignore_index(CoSAConfig())
        255
    """
    usual = ignored_id(config.num_labels - 1)
    named = getattr(config, "semantic_loss_ignore_index", usual)
    return usual if 0 <= named < config.num_labels else named


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
