"""CoSA: image-level tags in, segmentation masks out.

Importing the package registers the model with the auto classes of transformers.
"""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
)

from cosa_hf._version import __version__
from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.configuration_cosa_ms import CoSAMSConfig
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation, CoSAOutput
from cosa_hf.modeling_cosa_ms import CoSAMSForSemanticSegmentation

for _config, _model in (
    (CoSAConfig, CoSAForWeaklySupervisedSegmentation),
    (CoSAMSConfig, CoSAMSForSemanticSegmentation),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto_class in (AutoModel, AutoModelForSemanticSegmentation, AutoModelForImageSegmentation):
        _auto_class.register(_config, _model, exist_ok=True)
    # One class for both backends: with the Pillow entry alone the library warns that torchvision's is missing.
    AutoImageProcessor.register(
        _config,
        image_processor_classes={"pil": CoSAImageProcessor, "torchvision": CoSAImageProcessor},
        exist_ok=True,
    )


def demo_model() -> str:
    """Directory of a small trained model that comes with the package: 20 classes of PASCAL VOC, for a first try.

    Its card, `README.md` in that directory, says what it was trained on and what it scores.

    Example:
        >>> from transformers import pipeline
        >>> segmenter = pipeline("image-segmentation", model=demo_model())
        >>> segmenter.model.config.id2label[8]
        'cat'
    """
    return str(Path(__file__).parent / "demo")


__all__ = [
    "CoSAConfig",
    "CoSAForWeaklySupervisedSegmentation",
    "CoSAImageProcessor",
    "CoSAOutput",
    "__version__",
    "demo_model",
]
