"""A saved model, and its forward pass over scales and flips, fused: what labels, evaluation and export share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
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

from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective.precision import at_least_float32

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
    """

    seg_logits: Tensor
    cls_logits: Any = None
    cam_logits: Any = None
    aux_cam_logits: Any = None


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
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be positive numbers, at least one, got {tuple(scales)}")
    cams_too = has_cams(model)
    stride = model.backbone.stride if cams_too else 32  # every common encoder takes multiples of 32
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
    for scale in scales:
        scaled_size = [tokens(side * scale) * stride for side in size]
        images = pixel_values
        if scaled_size != size:
            images = F.interpolate(pixel_values, size=scaled_size, mode="bilinear", align_corners=False)
        outputs = model(torch.cat([images, images.flip(-1)]) if flip else images)
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
    scores = at_least_float32(torch.cat(cls_logits)).mean(dim=0)
    return MultiScaleOutput(segmentation, scores, fused_cams(cams), fused_cams(aux_cams))


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
