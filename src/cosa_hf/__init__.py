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
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation, CoSAOutput
from cosa_hf.multistage.configuration import CoSAMSConfig
from cosa_hf.multistage.modeling import CoSAMSForSemanticSegmentation

AutoConfig.register(CoSAConfig.model_type, CoSAConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForSemanticSegmentation, AutoModelForImageSegmentation):
    _auto_class.register(CoSAConfig, CoSAForWeaklySupervisedSegmentation, exist_ok=True)
AutoConfig.register(CoSAMSConfig.model_type, CoSAMSConfig, exist_ok=True)
AutoModelForSemanticSegmentation.register(CoSAMSConfig, CoSAMSForSemanticSegmentation, exist_ok=True)
# One class for both backends: with the Pillow entry alone the library warns that torchvision's is missing.
for _config in (CoSAConfig, CoSAMSConfig):
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
