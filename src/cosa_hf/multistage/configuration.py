"""Configuration of a network of CoSA-MS that transformers does not have itself."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class CoSAMSConfig(PreTrainedConfig):
    r"""
    A timm encoder under a decoder: LargeFOV, or any that segmentation_models_pytorch has.

    Args:
        architecture: "largefov", or an architecture of segmentation_models_pytorch as its `create_model` spells it.
        encoder: Name of a timm model with a pyramid of features.
        output_stride: Pixels per position of the encoder's last map, by dilation, where encoder and architecture can.
        decoder_channels: Width of the decoder; its usual one when None.
        decoder_dilation: Of LargeFOV.
        coexistence_classes: Names of the classes averaged into C-mIoU.
        semantic_loss_ignore_index: Id of the pixels a mask leaves out.

    Example:

    ```python
    >>> from cosa_hf.multistage.configuration import CoSAMSConfig

    >>> CoSAMSConfig(architecture="largefov", encoder="test_resnet", num_labels=3).num_classes
    2

    ```
    """

    model_type = "cosa-ms"

    architecture: str = "deeplabv3plus"
    encoder: str = "resnet101.tv_in1k"
    output_stride: int = 16
    decoder_channels: int | None = None
    decoder_dilation: int = 5
    coexistence_classes: list[str] = field(default_factory=list)
    semantic_loss_ignore_index: int = 255

    @property
    def num_classes(self) -> int:
        """C, the number of foreground classes."""
        return len(self.id2label or ()) - 1


__all__ = ["CoSAMSConfig"]
