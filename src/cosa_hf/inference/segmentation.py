"""One image and its maps: masks at the image's size, by whatever source and with whatever tags."""

import ctypes
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cosa_hf.image_processing_cosa import upsampled_argmax
from cosa_hf.objective.pseudo_labels import cam_pseudo_labels

#: Refines a segmentation: logits (K, H, W) at the size of an RGB image, and that image, to probabilities (K, H, W).
CRF = Callable[[Tensor, Image.Image], Tensor]
#: At most so many pixels, and so many values of all classes, go through a CRF: its memory grows with both, and 12
#: megapixels of a phone and 21 classes would take 12 GB. VOC's and COCO's images have less.
CRF_PIXELS, CRF_VALUES = 320_000, 32_000_000
#: How much a CRF trusts a CAM: the logit of a class is so many times what its CAM is above xi, that of background 0.
CRF_SHARPNESS = 8.0


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
        crf: refines masks of every source.
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
            return self.label(self._source)[0]
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
            the threshold it is; the probability of the class in a segmentation, and after a CRF.

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
        maps, possible = self._maps(source), self._possible(source)
        if len(possible) == 1:
            nothing = torch.zeros(self.image.height, self.image.width, device=possible.device)
            return nothing.long(), nothing
        xi = self.cam_threshold if threshold is None else threshold
        image = self._shrunk(len(possible))
        mean = torch.stack([_resized(each[possible[1:] - 1], image) for each in maps]).mean(0)
        if self.crf is None:
            return possible[cam_pseudo_labels(mean[None], xi)[0]], mean.amax(0)
        ids, highest = self._refined(F.pad(CRF_SHARPNESS * (mean - xi), (0, 0, 0, 0, 1, 0)), image, possible)
        return ids.long(), highest

    def _maps(self, source: str) -> list[Tensor]:
        """The maps (C, h, w) whose mean is thresholded."""
        sources = {"cam": [self.cam], "cam_aux": [self.aux_cam], "cam_mean": [self.cam, self.aux_cam]}
        sources |= {name: [maps] for name, maps in self._spread.items()}
        maps = sources.get(source, [None])
        if maps[0] is None:
            raise ValueError(
                f"no {source!r}: sources are seg, seg_tags and, of a network with CAMs, cam, cam_aux, cam_mean, and "
                f"{', '.join(self._spread)} where its config names an affinity"
            )
        return maps

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
        return ("seg_tags" if self.labels.any() else "seg") + ("_spread" if self.spread else "")

    def _possible(self, source: str) -> Tensor:
        """The ids that pixels may get, background first."""
        if source not in ("seg", "seg_tags"):
            shown = torch.stack([each.flatten(1).any(dim=1) for each in self._maps(source)]).any(dim=0)
            return F.pad(shown, (1, 0), value=True).nonzero().flatten()
        ids = torch.arange(len(self.seg_logits), device=self.labels.device)
        return ids if source == "seg" else ids[F.pad(self.labels.bool(), (1, 0), value=True)]

    def _segment(self, source: str) -> tuple[Tensor, Tensor]:
        """Ids, of few bits, and their probabilities after a CRF or their logits without one."""
        ids = self._possible(source)
        logits = self.seg_logits[ids]  # dropping classes, rather than setting -inf, keeps nan out of the interpolation
        if self.crf is not None:
            image = self._shrunk(len(ids))
            return self._refined(_resized(logits, image), image, ids)
        return upsampled_argmax(logits, (self.image.height, self.image.width), ids.tolist())

    def _shrunk(self, num_labels: int) -> Image.Image:
        """The image as a CRF of so many labels sees it; as it is without one."""
        if self.crf is None:
            return self.image
        return self.image.resize(crf_size(self.image.size, num_labels), Image.Resampling.BOX)

    def _refined(self, logits: Tensor, image: Image.Image, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids, of few bits, and their probabilities after the CRF; logits (K, h, w) of K ids, of the image's size."""
        probabilities = self.crf(logits, image)  # type: ignore[misc]
        _trim_heap()
        return upsampled_argmax(probabilities, (self.image.height, self.image.width), ids.tolist())


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


__all__ = ["CRF", "CRF_PIXELS", "CRF_SHARPNESS", "CRF_VALUES", "Segmentation", "crf_size"]
