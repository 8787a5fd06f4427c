"""Configuration of a network of CoSA-MS that transformers does not have itself."""

from huggingface_hub.dataclasses import strict

from .configuration_cosa import CoSAConfig, SegmentationConfig


@strict
class CoSAMSConfig(SegmentationConfig):
    r"""
    A timm encoder under a decoder: LargeFOV, or any that segmentation_models_pytorch has.

    Args:
        architecture: "largefov", or an architecture of segmentation_models_pytorch as its `create_model` spells it.
        encoder: Name of a timm model with a pyramid of features.
        output_stride: Pixels per position of the encoder's last map, by dilation, where encoder and architecture can:
            8, 16 or 32.
        decoder_channels: Width of the decoder; its usual one when None.
        decoder_dilation: Of LargeFOV.
        coexistence_classes, semantic_loss_ignore_index: As in `SegmentationConfig`.

    Raises:
        ValueError: as `SegmentationConfig`.

    Example:

    ```python
    >>> from cosa_hf.configuration_cosa_ms import CoSAMSConfig

    >>> CoSAMSConfig(architecture="largefov", encoder="test_resnet", num_labels=3).num_classes
    2

    ```
    """

    model_type = "cosa-ms"
    model_code = "modeling_cosa_ms.CoSAMSForSemanticSegmentation"
    code_files = (*CoSAConfig.code_files, "configuration_cosa_ms.py", "modeling_cosa_ms.py", "wide_resnet38.py")

    architecture: str = "deeplabv3plus"
    encoder: str = "resnet101.tv_in1k"
    decoder_channels: int | None = None
    decoder_dilation: int = 5


__all__ = ["CoSAMSConfig"]
