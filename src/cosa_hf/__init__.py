"""CoSA: image-level tags in, segmentation masks out.

Importing the package registers the model with the auto classes of transformers.
"""

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

AutoConfig.register(CoSAConfig.model_type, CoSAConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForSemanticSegmentation, AutoModelForImageSegmentation):
    _auto_class.register(CoSAConfig, CoSAForWeaklySupervisedSegmentation, exist_ok=True)
# One class for both backends: with the Pillow entry alone the library warns that torchvision's is missing.
AutoImageProcessor.register(
    CoSAConfig,
    image_processor_classes={"pil": CoSAImageProcessor, "torchvision": CoSAImageProcessor},
    exist_ok=True,
)

__all__ = [
    "CoSAConfig",
    "CoSAForWeaklySupervisedSegmentation",
    "CoSAImageProcessor",
    "CoSAOutput",
    "__version__",
]
