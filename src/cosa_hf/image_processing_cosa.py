"""Image processors of CoSA, Pillow's and torchvision's: photos of any kind in, segmentation masks out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.utils import logging, requires_backends

logger = logging.get_logger(__name__)

STRIP = 1 << 22  # values that are converted at a time: float64 of a whole large image would take gigabytes


def to_rgb(image: Image.Image, value_range: Sequence[float] | None = None) -> Image.Image:
    """
    Any image as 8-bit RGB, the way a viewer shows it.

    The EXIF orientation is applied, transparency is laid over white, and more than 8 bits are scaled down, from
    `value_range` (low, high), which 8-bit images do not need. Without one, 16-bit greys (`I;16`) are scaled from their
    whole range; 32-bit integers and floats from 0..1 (floats only), 0..255 or 0..65535, the first that holds the
    image's maximum, and beyond that from 0..maximum: a guess for each image by itself, so give the range of the set.

    Raises:
        ValueError: a range that is not two numbers, low < high.

    Example:

    ```python
    >>> from PIL import Image
    >>> from cosa_hf.image_processing_cosa import to_rgb

    >>> to_rgb(Image.new("I;16", (1, 1), 257 * 200)).getpixel((0, 0))
    (200, 200, 200)
    >>> to_rgb(Image.new("I;16", (1, 1), 3000), value_range=(0, 4095)).getpixel((0, 0))
    (187, 187, 187)
    >>> to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)

    ```
    """
    image = ImageOps.exif_transpose(image)
    if is_deep(image):
        values = np.asarray(image)
        return Image.fromarray(to_8_bit(values, value_range or _guessed_range(image.mode, values))).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # a copy already, and of a large photo one is enough
    rgb.info.pop("exif", None)  # followed. Damaged, Pillow ignores it in a JPEG file, but not in a copy
    return rgb


def is_deep(image: Image.Image) -> bool:
    """
    Whether an image has more than 8 bits a value.

    Example:

    ```python
    >>> from PIL import Image
    >>> from cosa_hf.image_processing_cosa import is_deep

    >>> is_deep(Image.new("I;16", (1, 1))), is_deep(Image.new("RGB", (1, 1)))
    (True, False)

    ```
    """
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def to_8_bit(values: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    """
    Values from low..high as 0..255, in any layout; beyond the range they are clipped, and what is not finite is low.

    Raises:
        ValueError: a range that is not two numbers, low < high.

    Example:

    ```python
    >>> import numpy as np
    >>> from cosa_hf.image_processing_cosa import to_8_bit

    >>> to_8_bit(np.array([-1000.0, 80.0, 400.0, np.nan]), (-160, 240)).tolist()
    [0, 153, 255, 0]

    ```
    """
    if isinstance(value_range, str) or len(value_range) != 2 or not value_range[0] < value_range[1]:
        raise ValueError(f"value_range must be two numbers, low < high, got {value_range!r}")
    low, high = value_range
    values = np.atleast_1d(values)
    scaled = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, STRIP * len(values) // max(1, values.size))
    for start in range(0, len(values), rows):
        strip = values[start : start + rows].astype(np.float64)
        strip = np.nan_to_num(strip, nan=low, posinf=low, neginf=low)
        scaled[start : start + rows] = np.clip(np.rint((strip - low) * (255.0 / (high - low))), 0, 255)
    return scaled


def _guessed_range(mode: str, values: np.ndarray) -> tuple[float, float]:
    if mode.startswith("I;"):
        return 0.0, 65535.0
    logger.warning_once(
        "the value range of images with more than 8 bits is guessed, for each by itself: give the model's image "
        "processor the range of your images (value_range)"
    )
    ranges = [1.0, 255.0, 65535.0] if mode == "F" else [255.0, 65535.0]
    maximum = float(values.max(initial=0, where=np.isfinite(values)))
    return 0.0, next((limit for limit in ranges if maximum <= limit), maximum)


class CoSAImageProcessing(BaseImageProcessor):
    """What the processors have in common, whichever backend comes after it: settings, kinds of images, masks."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 (the library's own spelling)
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 448, "width": 448}  # noqa: RUF012
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    value_range: Sequence[float] | str | None = None
    bands: Sequence[int] | None = None

    fetch_images = BaseImageProcessor.fetch_images  # by Pillow: torchvision would open fewer kinds of files itself

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(image, Image.Image):
            image = self._rgb(image)
        elif self.value_range is not None and isinstance(image, np.ndarray) and image.dtype != np.uint8:
            image = to_8_bit(image, self.value_range)  # type: ignore[arg-type]
        return super().process_image(image, *args, **kwargs)

    def _rgb(self, image: Image.Image) -> Image.Image:
        return to_rgb(image, self.value_range if is_deep(image) else None)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        # Without a type in its file, loaders ask the model's config beside it, which names class and code.
        # With the code named here (`auto_map`), the pipeline stops to ask although the package is installed.
        settings.pop("image_processor_type", None)
        settings.pop("auto_map", None)
        return settings

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Sequence[Sequence[int]] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """
        Label ids per pixel from a model's output.

        Args:
            outputs: Anything with `logits` of shape `(B, K, h, w)`.
            target_sizes: `(height, width)` of every image. The logits are upsampled to it, bilinearly, before
                the argmax. Without it the masks keep the resolution of the logits.

        Returns:
            B tensors of shape `(height, width)`, `torch.int64`, 0 for background.

        Raises:
            ValueError: if there are not as many target sizes as images.

        Example:

        ```python
        >>> import torch
        >>> from cosa_hf import CoSAImageProcessor, CoSAOutput

        >>> outputs = CoSAOutput(logits=torch.eye(2).reshape(1, 2, 1, 2))
        >>> CoSAImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=[(1, 4)])
        [tensor([[0, 0, 1, 1]])]

        ```
        """
        logits = outputs.logits
        if target_sizes is None:
            return list(logits.argmax(dim=1))
        if len(target_sizes) != len(logits):
            raise ValueError(
                f"{len(target_sizes)} target sizes for {len(logits)} images: give one (height, width) each."
            )
        return [
            upsampled_argmax(image_logits, (int(height), int(width)))[0].long()
            for image_logits, (height, width) in zip(logits, target_sizes, strict=True)
        ]


class CoSAImageProcessor(CoSAImageProcessing, PilBackend):
    r"""
    Turns images into the `pixel_values` of a CoSA model, and its logits into masks. By Pillow, without torchvision.

    The default is the paper's evaluation input: 448 x 448 without keeping the aspect ratio (Sec. 4.1). Mean
    and std should be those the backbone was trained with: `model.backbone.data_config` has them.

    Args:
        size: `{"height", "width"}` in pixels.
        image_mean, image_std: Per channel, for values in [0, 1]. ImageNet's by default.
        resample: Pillow filter, bilinear by default.
        do_resize, do_rescale, do_normalize: Which steps to take, all by default.
        value_range: (low, high), which values of more than 8 bits are scaled from, the same for all images: that of
            the training images. "window" stands for the window in each DICOM file, which is applied where the file is
            opened. None: `to_rgb` guesses, image by image. Arrays of other types than `uint8` are scaled only where
            there is a range.
        bands: One or three numbers, from 1, of the bands of a file that are grey or red, green and blue. They are
            selected where the file is opened (`cosa_hf.Segmenter`).

    Example:

    ```python
    >>> from PIL import Image
    >>> from cosa_hf import CoSAImageProcessor

    >>> processor = CoSAImageProcessor(size={"height": 64, "width": 64})
    >>> processor(Image.new("L", (100, 50)), return_tensors="pt").pixel_values.shape
    torch.Size([1, 3, 64, 64])

    ```
    """

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        size = kwargs.get("size")
        if isinstance(image, Image.Image) and kwargs.get("do_resize") and size and size.height and size.width:
            # Before it becomes an array, which of a large photo takes three more copies; the result is the same.
            return self.resize(self._rgb(image), size, kwargs["resample"])  # type: ignore[arg-type]
        return super().process_image(image, *args, **kwargs)


class CoSAImageProcessorTorchvision(CoSAImageProcessing, TorchvisionBackend):
    r"""
    The same by torchvision: batches at once, on a GPU where `device` names one, or where the tensors are that it gets.

    Resized photos are within 1/255 of Pillow's. `AutoImageProcessor.from_pretrained(..., backend="torchvision")` loads
    any saved processor as this one; its default is Pillow's, with which scores are measured.

    Args:
        kwargs: As in `CoSAImageProcessor`.

    Raises:
        ImportError: without torchvision.

    Example:

    ```python
    >>> import torch
    >>> from cosa_hf import CoSAImageProcessorTorchvision

    >>> processor = CoSAImageProcessorTorchvision(size={"height": 64, "width": 64})
    >>> photos = torch.zeros(8, 3, 50, 100, dtype=torch.uint8)
    >>> processor(photos, return_tensors="pt", device="cpu").pixel_values.shape
    torch.Size([8, 3, 64, 64])

    ```
    """

    def __init__(self, **kwargs: Any) -> None:
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)


def upsampled_argmax(
    logits: torch.Tensor, size: tuple[int, int], label_ids: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The largest upsampled logit at every pixel: its label id and its value, `(height, width)` each.

    One label at a time, and ids that fit into them in 8 bits: all at once would take 4 GB for a phone's photo and
    COCO's 81 labels, and `torch.int64` half a gigabyte.

    Args:
        logits: `(K, h, w)`.
        size: `(height, width)`.
        label_ids: of the K logits, by default 0 to K - 1.

    Returns:
        Ids, `torch.uint8` or, above 255, `torch.int32`, and logits, `torch.float32`.

    Example:

    ```python
    >>> import torch
    >>> from cosa_hf.image_processing_cosa import upsampled_argmax

    >>> ids, highest = upsampled_argmax(torch.eye(2).reshape(2, 1, 2), (1, 4))
    >>> ids.tolist(), highest.tolist()
    ([[0, 0, 1, 1]], [[1.0, 0.75, 0.75, 1.0]])

    ```
    """
    label_ids = range(len(logits)) if label_ids is None else label_ids
    ids = torch.zeros(size, dtype=torch.uint8 if max(label_ids) < 256 else torch.int32, device=logits.device)
    best = torch.full(size, -torch.inf, device=logits.device)
    for label_id, plane in zip(label_ids, logits.detach().float(), strict=True):
        scores = F.interpolate(plane[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        ids.masked_fill_(scores > best, label_id)  # indexing would list the pixels, 16 bytes each
        torch.maximum(best, scores, out=best)
        del scores  # before the next are made
    return ids, best


__all__ = ["CoSAImageProcessor", "CoSAImageProcessorTorchvision"]
