"""Pseudo-labels that leave the package: datasets of masks for any network, and what they are worth."""

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
