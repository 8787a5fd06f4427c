"""Encoder and decoder of CoSA-MS as a transformers model: DeepLabV3+ and its like, and LargeFOV."""

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .configuration_cosa_ms import CoSAMSConfig
from .modeling_cosa import CoSALargeFOV
from .timm_models import read_timm_weights

#: Fields of the config that not every architecture follows, as segmentation_models_pytorch calls them.
OPTIONS = {"output_stride": "encoder_output_stride", "decoder_channels": "decoder_channels"}

STRIDE = 32  # every pyramid and decoder takes images whose sides are multiples of it


class CoSAMSForSemanticSegmentation(PreTrainedModel):
    """
    Segmentation network of CoSA-MS: images in, logits of K labels at the decoder's resolution out.

    Images whose sides are not multiples of 32 are resized to the nearest. A model made from a config starts from
    random weights; `load_encoder` gives it pretrained ones.

    Raises:
        ValueError: if the architecture or the encoder does not exist, or the library that has it is not installed.

    Example:

    ```python
    >>> import torch
    >>> from cosa_hf.configuration_cosa_ms import CoSAMSConfig
    >>> from cosa_hf.modeling_cosa_ms import CoSAMSForSemanticSegmentation

    >>> config = CoSAMSConfig(architecture="largefov", encoder="test_resnet", decoder_channels=16, num_labels=3)
    >>> model = CoSAMSForSemanticSegmentation(config).eval()
    >>> model(torch.rand(1, 3, 64, 96)).logits.shape
    torch.Size([1, 3, 4, 6])

    ```
    """

    config: CoSAMSConfig
    config_class = CoSAMSConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: CoSAMSConfig):
        super().__init__(config)
        self.encoder, self.decoder, self.head = _parts(config)
        for tensor in _tensors(self).values():
            if not tensor.is_meta:
                tensor._is_hf_initialized = True  # by timm and the decoder's library; not to be done over
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> SemanticSegmenterOutput | tuple[torch.Tensor, ...]:
        """
        One pass over a batch of images of any size.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised.
            labels: `(B, H, W)` ids; with them the output has a cross-entropy loss.
            return_dict: `False` for a tuple of the fields that are set.
        """
        given = list(pixel_values.shape[-2:])
        size = [max((side + STRIDE // 2) // STRIDE, 1) * STRIDE for side in given]
        if size != given:
            pixel_values = F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)
        logits = self.head(self.decoder(self.encoder(pixel_values)))
        loss = None
        if labels is not None:
            resized = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(resized, labels, ignore_index=self.config.semantic_loss_ignore_index)
        output = SemanticSegmenterOutput(loss=loss, logits=logits)
        return output if return_dict or return_dict is None else output.to_tuple()

    def load_encoder(self, weights: str | None = None) -> None:
        """
        Fills the encoder with timm's pretrained weights, or with those of a `.safetensors` or `.pth` file.

        Raises:
            ValueError: if the file is not of this encoder.
        """
        # smp wraps what timm made; LargeFOV is on timm's own.
        load_pretrained(getattr(self.encoder, "model", self.encoder), self.config.encoder, weights)

    def initialize_weights(self) -> None:
        # As in `CoSABackbone.initialize_missing`: buffers that are never saved hold anything after `from_pretrained`.
        own = _tensors(self)
        missing = [name for name, tensor in own.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing:
            fresh = nn.Module()
            fresh.encoder, fresh.decoder, fresh.head = _parts(self.config)
            values = _tensors(fresh)
            for name in missing:
                init.copy_(own[name], values[name])
                own[name]._is_hf_initialized = True
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the submodules have initialised themselves."""


class LargeFOV(CoSALargeFOV):
    """CoSA's decoder on the last level of a pyramid, with CoSA's initial values."""

    def __init__(self, config: Any, in_channels: int):
        super().__init__(config, in_channels)
        for conv in (self.conv6, self.conv7):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.trunc_normal_(self.conv8.weight, std=0.02)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return super().forward(features[-1])


def load_pretrained(features: nn.Module, name: str, weights: str | None) -> None:
    """Fill what `timm.create_model(name, features_only=True)` made, whatever levels and stride it was made with.

    Args:
        features: the module to fill.
        name: of the timm model.
        weights: a `.safetensors` or `.pth` file of it; timm's download when None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of this model, or nothing can be downloaded.
    """
    timm = _timm()
    overlay = None
    if weights is not None:
        # timm would take what it finds in a file and leave the rest as it was, without a word.
        read_timm_weights(timm.create_model(name, num_classes=0), name, weights)
        overlay = {"file": weights}
    try:
        source = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"cannot take the weights of {name} from {weights or 'the Hub'}. Name a file of them (--backbone_weights "
            f"FILE), or start from random ones (--pretrained false): {error}"
        ) from error
    state = {key: value.float() if value.is_floating_point() else value for key, value in source.state_dict().items()}
    missing = features.load_state_dict(state, strict=False).missing_keys
    if missing:
        raise ValueError(f"the weights of {name} lack {', '.join(missing[:8])}")


def options_of(architecture: str) -> list[str]:
    """Which of `OPTIONS` an architecture can be made with.

    Raises:
        ValueError: there is no such architecture, or the library that has it is not installed.

    Example:
        >>> options_of("largefov")
        ['output_stride', 'decoder_channels']
    """
    if architecture == "largefov":
        return list(OPTIONS)
    taken = inspect.signature(_smp_class(architecture).__init__).parameters
    # A U-Net takes a width for each of its levels, which one number is not.
    return [field for field, name in OPTIONS.items() if name in taken and isinstance(taken[name].default, int)]


def _smp_class(architecture: str) -> Any:
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        raise ValueError(  # no extra named: beside weights, this file runs without the package
            f"architecture {architecture!r} needs a package: pip install segmentation_models_pytorch"
        ) from None
    kinds = smp.MODEL_ARCHITECTURES_MAPPING
    if architecture not in kinds:
        raise ValueError(f"unknown architecture {architecture!r}; known: largefov, {', '.join(sorted(kinds))}")
    return kinds[architecture]


def _timm() -> Any:
    """timm, with `wide_resnet38_a1` among its models; not at import, which would take a second more."""
    import timm

    from .wide_resnet38 import wide_resnet38_a1  # noqa: F401

    return timm


def _parts(config: CoSAMSConfig) -> tuple[nn.Module, nn.Module, nn.Module]:
    timm = _timm()
    if not timm.is_model(config.encoder):
        raise ValueError(f"encoder={config.encoder!r} is not a model of timm {timm.__version__}: see timm.list_models")
    architecture = None if config.architecture == "largefov" else _smp_class(config.architecture)
    try:
        return _smp_parts(config, architecture) if architecture else _large_fov_parts(config)
    except (TypeError, ValueError) as error:  # an encoder that cannot be dilated, or has other levels
        raise ValueError(
            f"architecture {config.architecture!r} cannot be made with encoder {config.encoder!r}: {error}"
        ) from error


def _large_fov_parts(config: CoSAMSConfig) -> tuple[nn.Module, nn.Module, nn.Module]:
    encoder = _timm().create_model(config.encoder, features_only=True, output_stride=config.output_stride)
    sized = copy.copy(config)
    sized.decoder_channels = config.decoder_channels or 512  # Sec. 4.1
    return encoder, LargeFOV(sized, encoder.feature_info.channels()[-1]), nn.Identity()


def _smp_parts(config: CoSAMSConfig, make: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    wanted = {OPTIONS[field]: getattr(config, field) for field in options_of(config.architecture)}
    options = {name: value for name, value in wanted.items() if value is not None}
    if "upsampling" in inspect.signature(make.__init__).parameters:
        options["upsampling"] = 1  # whoever needs the logits at another size resizes them once
    network = make(encoder_name=f"tu-{config.encoder}", encoder_weights=None, classes=config.num_labels, **options)
    return network.encoder, network.decoder, network.segmentation_head


def _tensors(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# The segmentation pipeline looks class names up in this table and logs an error for those it misses.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.setdefault(
    CoSAMSConfig.model_type, CoSAMSForSemanticSegmentation.__name__
)

__all__ = ["CoSAMSForSemanticSegmentation", "LargeFOV", "load_pretrained"]
