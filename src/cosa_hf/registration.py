"""The models in the auto classes of transformers: importing this module registers them."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
)

from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.configuration_cosa_ms import CoSAMSConfig
from cosa_hf.image_processing_cosa import CoSAImageProcessor, CoSAImageProcessorTorchvision
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.modeling_cosa_ms import CoSAMSForSemanticSegmentation

for _config, _model in (
    (CoSAConfig, CoSAForWeaklySupervisedSegmentation),
    (CoSAMSConfig, CoSAMSForSemanticSegmentation),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto_class in (AutoModel, AutoModelForSemanticSegmentation, AutoModelForImageSegmentation):
        _auto_class.register(_config, _model, exist_ok=True)
    AutoImageProcessor.register(
        _config,
        image_processor_classes={"pil": CoSAImageProcessor, "torchvision": CoSAImageProcessorTorchvision},
        exist_ok=True,
    )
