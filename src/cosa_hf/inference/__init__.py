"""From images to logits, CAMs and masks."""

from cosa_hf.inference.multiscale import SCALES, MultiScaleOutput, forward_multiscale
from cosa_hf.inference.networks import (
    MASK_SETS,
    auto_class,
    check_classes,
    eval_mode,
    has_cams,
    ignore_index,
    label_names,
    load_model,
    require_cams,
    save_model,
    segmentation_logits,
    stride_of,
)
from cosa_hf.inference.segmentation import CRF, Segmentation, crf_size
from cosa_hf.inference.segmenter import Segmenter

__all__ = [
    "CRF",
    "MASK_SETS",
    "SCALES",
    "MultiScaleOutput",
    "Segmentation",
    "Segmenter",
    "auto_class",
    "check_classes",
    "crf_size",
    "eval_mode",
    "forward_multiscale",
    "has_cams",
    "ignore_index",
    "label_names",
    "load_model",
    "require_cams",
    "save_model",
    "segmentation_logits",
    "stride_of",
]
