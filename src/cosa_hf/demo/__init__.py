"""A small trained model, three free photos, and the embedded demo (`run.py`)."""

from pathlib import Path


def demo_model() -> str:
    """Directory of a small trained model that comes with the package: 20 classes of PASCAL VOC, for a first try.

    Its card, `README.md` in that directory, says what it was trained on and what it scores.

    Example:
        >>> from transformers import pipeline
        >>> segmenter = pipeline("image-segmentation", model=demo_model())
        >>> segmenter.model.config.id2label[8]
        'cat'
    """
    return str(Path(__file__).parent / "model")
