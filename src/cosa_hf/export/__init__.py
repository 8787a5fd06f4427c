"""What leaves the package: pseudo-labels and what they are worth, published models, ONNX."""

from cosa_hf.export.formats import FORMATS, PseudoLabel
from cosa_hf.export.pseudo_labels import SOURCES, export_pseudo_labels
from cosa_hf.export.quality import format_quality, pseudo_label_quality

__all__ = [
    "FORMATS",
    "SOURCES",
    "PseudoLabel",
    "export_pseudo_labels",
    "format_quality",
    "pseudo_label_quality",
]
