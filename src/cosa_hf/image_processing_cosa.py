"""Image processor of CoSA: photos of any kind in, segmentation masks out. Needs no torchvision."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Any image as 8-bit RGB, the way a viewer shows it.

    The EXIF orientation is applied, transparency is laid over white, and more than 8 bits are scaled down:
    16-bit greys (`I;16`) from their whole range; 32-bit integers and floats from 0..1 (floats only), 0..255
    or 0..65535, the first that holds the image's maximum, and beyond that from 0..maximum.

    Example:

    ```python
    >>> from PIL import Image
    >>> from cosa_hf.image_processing_cosa import to_rgb

    >>> to_rgb(Image.new("I;16", (1, 1), 257 * 200)).getpixel((0, 0))
    (200, 200, 200)
    >>> to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)

    ```
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_to_8_bit(image)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> np.ndarray:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    if image.mode.startswith("I;"):
        top = 65535.0
    else:
        ranges = [1.0, 255.0, 65535.0] if image.mode == "F" else [255.0, 65535.0]
        maximum = values.max(initial=0.0)
        top = next((limit for limit in ranges if maximum <= limit), maximum)
    return np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)


class CoSAImageProcessor(PilBackend):
    r"""
    Turns images into the `pixel_values` of a CoSA model, and its logits into masks.

    The default is the paper's evaluation input: 448 x 448 without keeping the aspect ratio (Sec. 4.1). Mean
    and std should be those the backbone was trained with: `model.backbone.data_config` has them.

    Args:
        size: `{"height", "width"}` in pixels.
        image_mean, image_std: Per channel, for values in [0, 1]. ImageNet's by default.
        resample: Pillow filter, bilinear by default.
        do_resize, do_rescale, do_normalize: Which steps to take, all by default.

    Example:

    ```python
    >>> from PIL import Image
    >>> from cosa_hf import CoSAImageProcessor

    >>> processor = CoSAImageProcessor(size={"height": 64, "width": 64})
    >>> processor(Image.new("L", (100, 50)), return_tensors="pt").pixel_values.shape
    torch.Size([1, 3, 64, 64])

    ```
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (the library's own spelling)
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 448, "width": 448}  # noqa: RUF012
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        if isinstance(image, Image.Image):
            image = to_rgb(image)
        return super().process_image(image, *args, **kwargs)

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


def upsampled_argmax(logits: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The largest upsampled logit at every pixel: its label id, `torch.int32`, and its value, `(height, width)` each.

    One label at a time: all of them at once would take 4 GB for a phone's photo and COCO's 81 labels.

    Example:

    ```python
    >>> import torch
    >>> from cosa_hf.image_processing_cosa import upsampled_argmax

    >>> ids, highest = upsampled_argmax(torch.eye(2).reshape(2, 1, 2), (1, 4))
    >>> ids.tolist(), highest.tolist()
    ([[0, 0, 1, 1]], [[1.0, 0.75, 0.75, 1.0]])

    ```
    """
    best = torch.full(size, -torch.inf, device=logits.device)
    ids = torch.zeros(size, dtype=torch.int32, device=logits.device)
    for label, plane in enumerate(logits.detach().float()):
        scores = F.interpolate(plane[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        ids[scores > best] = label
        torch.maximum(best, scores, out=best)
    return ids, best


__all__ = ["CoSAImageProcessor"]
