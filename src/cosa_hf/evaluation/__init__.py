"""What a trained model is worth: metric, protocols, pictures."""

from cosa_hf.evaluation.maps import ImageMaps, predict_maps
from cosa_hf.evaluation.metrics import SegmentationMetric
from cosa_hf.evaluation.palette import to_palette_image, voc_palette
from cosa_hf.evaluation.panels import overlay, panel
from cosa_hf.evaluation.protocols import evaluate_model, format_report, predict_dataset

__all__ = [
    "ImageMaps",
    "SegmentationMetric",
    "evaluate_model",
    "format_report",
    "overlay",
    "panel",
    "predict_dataset",
    "predict_maps",
    "to_palette_image",
    "voc_palette",
]
