"""Weak and strong view of an image: Tables 8-9 and Sec. 3.2."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter

from cosa_hf.data.appearance import AppearanceConfig, apply_appearance, draw_appearance
from cosa_hf.data.images import IGNORE_INDEX, WIDE_IGNORE_INDEX
from cosa_hf.settings import Settings, setting

BLUR_PROBABILITY = 0.5
# The paper gives the probability only. These are pixels of its 448-pixel crop; a smaller crop is blurred less, so that
# the same share of an object's detail is lost.
BLUR_SIGMA = (0.1, 2.0)
BLUR_CROP = 448


@dataclass(kw_only=True)
class ViewConfig(Settings):
    """How large images and crops are (Sec. 3.2, Tab. 8). The defaults are the paper's."""

    _argument_group_name = "Views (Sec. 3.2)"

    crop_size: int = setting(448, "side of the training crop, pixels", least=1)
    input_size: int = setting(448, "side that images are resized to at inference, pixels", least=1)
    scale_min: float = setting(0.5, "least random rescale", above=0)
    scale_max: float = setting(2.0, "greatest random rescale", above=0)
    num_workers: int = setting(4, "processes that read and augment images", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min must be at most scale_max = {self.scale_max}, got {self.scale_min}")


@dataclass(frozen=True)
class Geometry:
    """Where a crop comes from and where it lands: one draw, shared by both views and the mask."""

    box: tuple[float, float, float, float]  # left, upper, right, lower of the source region, in source pixels
    size: tuple[int, int]  # width, height of that region after rescaling
    offset: tuple[int, int]  # left, upper corner of the region inside the crop
    flip: bool

    def apply(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """The region, rescaled and flipped, without any padding."""
        # Resizing only the crop's source box equals resizing the whole image and cropping: Pillow's filters
        # read beyond the box. At scale 2 it saves most of the work.
        region = image.resize(self.size, resample, box=self.box)
        return region.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else region


class Views:
    """Turns an image into the weak view (for the AN), the strong view (for the ON) and the valid mask V.

    Geometry is shared: rescale by U(*scale_range) (bilinear, antialiased), horizontal flip with p .5, random
    crop. Where the rescaled image is smaller than the crop it lands at a random place and the rest is
    padding: zeros after normalisation, i.e. the mean colour, and V is False there. A Gaussian blur with p .5
    and sigma U(.1, 2) * crop_size / 448 pixels is shared too. The weak view stops there (Tab. 8); the strong view
    adds exactly one operation of Tab. 10 (Tab. 9). Blur and photometry see the image's own pixels only, never the
    padding.

    All randomness comes from torch's global generator: seed it, or use `TrainingDataset`.

    Args:
        crop_size: side of the square crop in pixels (paper: 448).
        mean, std: per channel, on the 0..1 scale; those of the pretrained backbone.
        scale_range: bounds of the rescaling factor. Narrow it for images already near the crop size.
        appearance: how strong the operations of Tab. 10 are; default: as in the paper.

    Raises:
        ValueError: an argument is out of range; at call, the image is not RGB or the mask has another size.

    Example:
        >>> views = Views(crop_size=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> item = views(Image.new("RGB", (80, 60)))
        >>> {name: tuple(tensor.shape) for name, tensor in item.items()}
        {'weak': (3, 64, 64), 'strong': (3, 64, 64), 'valid': (64, 64)}
    """

    def __init__(
        self,
        crop_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        scale_range: tuple[float, float] = (ViewConfig.scale_min, ViewConfig.scale_max),
        appearance: AppearanceConfig | None = None,
    ):
        if crop_size < 1:
            raise ValueError(f"crop_size must be at least 1 pixel, got {crop_size}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std need three values each, std positive; got {mean} and {std}")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range must be 0 < smallest <= largest, got {scale_range}")
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.appearance = appearance or AppearanceConfig()
        # (uint8 / 255 - mean) / std as one multiply-add
        self._gain = 1 / (255 * torch.tensor(std).view(3, 1, 1))
        self._bias = -(torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1)

    def __call__(
        self, image: Image.Image, mask: Image.Image | None = None, confidence: Image.Image | None = None
    ) -> dict[str, torch.Tensor]:
        """Draw the views of one image.

        Args:
            image: RGB, any size.
            mask: class ids as `read_mask` returns them, the image's size. It takes the same geometry (nearest
                neighbour).
            confidence: of the mask, mode "L", likewise.

        Returns:
            weak (3, H, W) float32, strong (3, H, W) float32, valid (H, W) bool and, given a mask, mask (H, W)
            int64 with the ignored id outside the image, given its confidence, confidence (H, W) float32 in [0, 1]
            with 0 there; H = W = crop_size.
        """
        if image.mode != "RGB":
            raise ValueError(f"expected an RGB image, got mode {image.mode!r}: convert it with to_rgb first")
        if mask is not None and mask.size != image.size:
            raise ValueError(f"mask is {mask.size} (width, height), its image is {image.size}")

        geometry = self.draw_geometry(image.size)
        weak = geometry.apply(image, Image.Resampling.BILINEAR)
        if torch.rand(()).item() < BLUR_PROBABILITY:
            low, high = BLUR_SIGMA
            sigma = low + (high - low) * torch.rand(()).item()
            weak = weak.filter(ImageFilter.GaussianBlur(sigma * self.crop_size / BLUR_CROP))
        strong = apply_appearance(weak, *draw_appearance(self.appearance))

        side = self.crop_size
        (left, upper), (width, height) = geometry.offset, geometry.size
        inside = (..., slice(upper, upper + height), slice(left, left + width))
        views = {
            "weak": torch.zeros(3, side, side),
            "strong": torch.zeros(3, side, side),
            "valid": torch.zeros(side, side, dtype=torch.bool),
        }
        views["weak"][inside] = self._normalize(weak)
        views["strong"][inside] = self._normalize(strong)
        views["valid"][inside] = True
        if mask is not None:
            ignored = IGNORE_INDEX if mask.mode == "L" else WIDE_IGNORE_INDEX
            views["mask"] = torch.full((side, side), ignored, dtype=torch.int64)
            views["mask"][inside] = torch.from_numpy(
                np.array(geometry.apply(mask, Image.Resampling.NEAREST), dtype=np.int64)
            )
        if confidence is not None:
            views["confidence"] = torch.zeros(side, side)
            views["confidence"][inside] = torch.from_numpy(
                np.array(geometry.apply(confidence, Image.Resampling.NEAREST), dtype=np.float32) / 255
            )
        return views

    def draw_geometry(self, size: tuple[int, int]) -> Geometry:
        """Draw scale, flip and crop for an image of `size` (width, height), from torch's global RNG."""
        low, high = self.scale_range
        scale = low + (high - low) * torch.rand(()).item()
        spans = [self._draw_span(length, max(1, round(length * scale))) for length in size]
        (left, right, width, x), (upper, lower, height, y) = spans
        flip = torch.rand(()).item() < 0.5
        return Geometry((left, upper, right, lower), (width, height), (x, y), flip)

    def _draw_span(self, length: int, scaled: int) -> tuple[float, float, int, int]:
        """Along one axis: start and end in the source, pixels kept after rescaling, position in the crop."""
        spare = scaled - self.crop_size
        start = int(torch.randint(abs(spare) + 1, ()).item())
        if spare < 0:
            return 0.0, float(length), scaled, start
        ratio = length / scaled
        end = min(float(length), (start + self.crop_size) * ratio)
        return start * ratio, end, self.crop_size, 0

    def _normalize(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, h, w) uint8
        return torch.addcmul(self._bias, pixels.float(), self._gain)
