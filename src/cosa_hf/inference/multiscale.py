"""One network on scaled and mirrored copies of images, and how their maps become one (Sec. 3.3)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_hf.inference.networks import has_cams, segmentation_logits, stride_of
from cosa_hf.objective.affinity import affinity_settings
from cosa_hf.objective.precision import at_least_float32

#: Relative input sizes of the paper's evaluation (Sec. 4.1), each with its mirror image.
SCALES = (1.0, 0.5, 1.5, 0.75, 1.25)


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


def forward_multiscale(
    model: Any,
    pixel_values: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    flip: bool = True,
    cam_fusion: Literal["max", "sum"] = "max",
    encoded: Mapping[str, Tensor] | None = None,
) -> MultiScaleOutput:
    """Run the model on scaled and mirrored copies; CAMs by maximum, logits by mean (Sec. 3.3, Alg. 1 lines 7-8).

    A copy and its mirror image share one forward pass. Gradients and train/eval mode are left to the caller.

    Args:
        model: CoSA, or any network whose output `segmentation_logits` takes.
        pixel_values: normalised images, (B, 3, H, W).
        scales: factors on H and W, each rounded to the model's stride, or to 32 pixels where it has none.
        flip: add the mirror image of each scale.
        cam_fusion: `max`, the paper's; `sum`, the released code's: of what is positive in the maximum over flips.
        encoded: what `backbone.encode` made of the images and of their mirror images at scale 1, if that is known:
            maps (B, 2, ...), in the place of a pass through the frozen part.

    Raises:
        ValueError: no scale, or one that is not positive.

    Example:
        >>> import torch
        >>> from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation
        >>> config = CoSAConfig(backbone="test_vit", aux_layer=-2, num_labels=4)
        >>> model = CoSAForWeaklySupervisedSegmentation(config).eval()
        >>> with torch.no_grad():
        ...     fused = forward_multiscale(model, torch.zeros(2, 3, 64, 64), scales=(1.0, 1.5))
        >>> fused.cam_logits.shape, fused.seg_logits.shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 4, 4, 4]))
    """
    check_scales(scales)
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
        if scale == 1 and encoded is not None:
            run = partial(model, encoded={name: _in_one_batch(views, flip) for name, views in encoded.items()})
        else:
            run = partial(model, torch.cat([images, images.flip(-1)]) if flip else images)
        if spreads and scale == 1:
            outputs = run(output_affinity=True)
            affinity = outputs.affinity[:batch]
        else:
            outputs = run()
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


def _in_one_batch(views: Tensor, flip: bool) -> Tensor:
    """From (B, 2, ...) to all plain ones and then, with `flip`, all mirrored ones."""
    return views.transpose(0, 1).flatten(0, 1) if flip else views[:, 0]


def check_scales(scales: Sequence[float]) -> None:
    """Refuse scales that no image can be brought to.

    Raises:
        ValueError: no scale, or one that is not positive.

    Example:
        >>> check_scales([1.0, 0.5])
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be positive numbers, at least one, got {list(scales)}")


__all__ = ["SCALES", "MultiScaleOutput", "check_scales", "forward_multiscale"]
