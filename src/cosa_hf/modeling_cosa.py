"""CoSA network (Sec. 3.1): one encoder, two class-activation heads and a segmentation decoder.

Shapes in comments: B batch, C foreground classes, K = C + 1 labels, D channels, h x w token grid.
"""

import copy
import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .configuration_cosa import CoSAConfig


@dataclass
class CoSAOutput(SemanticSegmenterOutput):
    """
    What a CoSA model returns. `logits` is the segmentation, so that tools for segmentation models apply.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, with `labels`):
            Classification loss of both heads (Eq. 1), in float32 at least.
        logits (`torch.Tensor` of shape `(B, K, h, w)`):
            Segmentation logits S at token resolution, background first.
        hidden_states (`tuple[torch.Tensor]`, *optional*, with `output_hidden_states=True`):
            The auxiliary map F† `(B, D†, h, w)` and the last map F `(B, D, h, w)`.
        attentions (`None`):
            Never filled: timm's attention does not return its weights.
        cls_logits (`torch.Tensor` of shape `(B, C)`):
            Image-level class logits Z.
        aux_cls_logits (`torch.Tensor` of shape `(B, C)`):
            Image-level class logits Z† of the auxiliary head.
        cam_logits (`torch.Tensor` of shape `(B, C, h, w)`):
            Class activation maps M before any activation.
        aux_cam_logits (`torch.Tensor` of shape `(B, C, h, w)`):
            Class activation maps M† of the auxiliary head before any activation.
    """

    cls_logits: torch.Tensor | None = None
    aux_cls_logits: torch.Tensor | None = None
    cam_logits: torch.Tensor | None = None
    aux_cam_logits: torch.Tensor | None = None


class CoSABackbone(nn.Module):
    """
    A timm encoder that returns its last feature map F and an earlier one, F†, on the same grid.

    F is the last layer after the final norm of a ViT, and the last level of the feature pyramid of any other
    backbone. F† is the raw output of layer `config.aux_layer`. An image whose sides are not multiples of
    the stride is resized to the nearest multiples (one token at least), so every token covers the same area.
    Batch norm keeps its statistics in training, and position embeddings are frozen.

    Attributes:
        stride: Side of a token in input pixels.
        num_features, aux_num_features: Channels D of F and D† of F†.

    Raises:
        ValueError: if timm does not know the backbone or cannot return intermediate features of it, if it does not
            take images of any size, or if `aux_layer` lies before its first layer.

    Example:

    ```python
    >>> import torch
    >>> from cosa_hf import CoSAConfig
    >>> from cosa_hf.modeling_cosa import CoSABackbone

    >>> backbone = CoSABackbone(CoSAConfig(backbone="test_vit"))
    >>> features, aux_features = backbone(torch.rand(2, 3, 64, 96))
    >>> features.shape, aux_features.shape, backbone.stride
    (torch.Size([2, 64, 4, 6]), torch.Size([2, 64, 4, 6]), 16)

    ```
    """

    model: Any  # timm's interface, beyond nn.Module

    def __init__(self, config: CoSAConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.model = _create_timm_model(config)
        self._intermediates: dict[str, Any] = {"indices": [config.aux_layer, -1], "output_fmt": "NCHW"}
        if "extra_blocks" in inspect.signature(self.model.forward_intermediates).parameters:
            # EfficientNets otherwise list only the stages that end in a downsampling
            self._intermediates["extra_blocks"] = True
        self._is_pyramid = len({level["reduction"] for level in self.model.feature_info}) > 1
        self.stride = int(self.model.feature_info[-1]["reduction"])
        self.num_features, self.aux_num_features, unused = self._probe()
        for name in unused:
            modules = getattr(self.model, name)  # a list is gone through, whatever becomes of it
            empty = (
                nn.ModuleList(nn.Identity() for _ in modules) if isinstance(modules, nn.ModuleList) else nn.Identity()
            )
            setattr(self.model, name, empty)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not tensor.is_meta:
                # timm has initialised itself; transformers must not do it over
                tensor._is_hf_initialized = True
        self._freeze_position_embedding()

    def _probe(self) -> tuple[int, int, list[str]]:
        """Channels of both maps, and the top-level modules neither depends on: pooling heads and their norms.

        Such a module would be dead weight in every checkpoint, and parameters without gradient stop
        distributed training.
        """
        # The copy has no values, so it costs no memory and works where the model has none yet either.
        without_values: dict[int, Any] = {
            id(tensor): nn.Parameter(tensor.detach().to("meta"))
            if isinstance(tensor, nn.Parameter)
            else tensor.to("meta")
            for tensor in _tensors(self.model).values()
        }
        twin = copy.deepcopy(self.model, without_values).eval()
        with torch.device("meta"), torch.enable_grad():
            _, height, width = twin.pretrained_cfg["input_size"]
            # Crops and scales have any size; at the one that it was made for, every backbone would pass.
            size = [(side // self.stride + more) * self.stride for side, more in ((height, 2), (width, 3))]
            try:
                features, aux_features = self._maps(twin, torch.empty(1, 3, *size))
            except (AssertionError, RuntimeError) as error:
                raise ValueError(self._refusal(twin, height, width)) from error
            (features.sum() + aux_features.sum()).backward()
        unused = []
        for name, child in twin.named_children():
            parameters = list(child.parameters())
            if parameters and all(parameter.grad is None for parameter in parameters):
                unused.append(name)
        return features.shape[1], aux_features.shape[1], unused

    def _refusal(self, twin: Any, height: int, width: int) -> str:
        """What is wrong with a backbone that fails at another size, told by what it does at its own."""
        name = self.config.backbone
        try:
            self._maps(twin, torch.empty(1, 3, height, width))
        except AssertionError as own:
            return f"aux_layer={self.config.aux_layer} is not a layer of {name!r}: {own}"
        except RuntimeError as own:
            return f"timm cannot return feature maps of backbone {name!r}: {own}"
        return f"backbone {name!r} takes images of {width}x{height}, not of any size: choose another"

    def _maps(self, model: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._is_pyramid:
            # Without what follows the pyramid: a head convolution narrows the CAMs to their peaks.
            aux_features, features = model.forward_intermediates(
                pixel_values, intermediates_only=True, stop_early=True, **self._intermediates
            )
            return features, aux_features
        features, (aux_features, _) = model.forward_intermediates(pixel_values, **self._intermediates)
        height, width = (side // self.stride for side in pixel_values.shape[-2:])
        features = features[:, getattr(model, "num_prefix_tokens", 0) :]  # (B, h w, D)
        return features.transpose(1, 2).unflatten(2, (height, width)), aux_features

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = list(pixel_values.shape[-2:])
        size = [max((side + self.stride // 2) // self.stride, 1) * self.stride for side in given]
        if size != given:
            pixel_values = F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)
        features, aux_features = self._maps(self.model, pixel_values)
        grid = features.shape[-2:]
        if aux_features.shape[-2:] != grid:
            aux_features = F.interpolate(aux_features, size=grid, mode="bilinear", align_corners=False)
        return features, aux_features  # (B, D, h, w), (B, D†, h, w)

    def train(self, mode: bool = True) -> "CoSABackbone":
        """Switches the mode of everything but batch norm: a few crops are too few for statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @property
    def data_config(self) -> dict[str, tuple[float, ...]]:
        """`mean` and `std` the timm weights of this backbone were trained with, per RGB channel in [0, 1]."""
        from timm.data import resolve_model_data_config

        data_config = resolve_model_data_config(self.model)
        return {"mean": tuple(data_config["mean"]), "std": tuple(data_config["std"])}

    def load_pretrained(self, weights: str | os.PathLike | None = None) -> None:
        """
        Fills the encoder with timm's pretrained weights, or with those of a `.safetensors` or `.pth` file.

        A classifier in the file is ignored whatever its size, a position embedding of another size resampled,
        and half precision raised to the model's own.

        Raises:
            ValueError: if the file lacks parameters of this backbone or has them in another shape, or if nothing can be
                downloaded.
        """
        if weights is None:
            try:
                pretrained = _create_timm_model(self.config, pretrained=True)
            except (OSError, RuntimeError) as error:
                raise ValueError(
                    f"cannot take the weights of {self.config.backbone} from the Hub. Without a connection name a file "
                    f"of them (--backbone_weights FILE), or start from random ones (--pretrained false): {error}"
                ) from error
            self.model.load_state_dict(pretrained.state_dict(), strict=False)
            return
        self.model.load_state_dict(read_timm_weights(self.model, self.config.backbone, weights), strict=False)

    def _freeze_position_embedding(self) -> None:
        for name, parameter in self.model.named_parameters():
            if "pos_embed" in name:
                parameter.requires_grad_(False)

    @torch.no_grad()
    def initialize_missing(self) -> None:
        """Completes the encoder after `from_pretrained`, and does nothing to one that is complete.

        What the checkpoint left open gets timm's own initial value: any missing parameter, and always the
        buffers that are never saved (the index tables of Swin), which would otherwise hold whatever was in
        memory. Loading also makes every parameter trainable, so the position embedding is frozen again.
        """
        self._freeze_position_embedding()
        own = _tensors(self.model)
        missing = [name for name, tensor in own.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing:
            fresh = _tensors(_create_timm_model(self.config))
            for name in missing:
                init.copy_(own[name], fresh[name])
                own[name]._is_hf_initialized = True


class CoSALargeFOV(nn.Module):
    """
    Segmentation decoder: two dilated 3x3 convolutions with ReLU and a 1x1 classifier, all without bias.

    Maps `(B, D, h, w)` to `(B, K, h, w)`. The LargeFOV head of DeepLab (Chen et al., 2017), as in Sec. 3.1.
    """

    def __init__(self, config: CoSAConfig, in_channels: int):
        super().__init__()
        channels, dilation = config.decoder_channels, config.decoder_dilation
        self.conv6 = nn.Conv2d(in_channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv7 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv8 = nn.Conv2d(channels, config.num_classes + 1, 1, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.conv8(self.conv7(self.conv6(features).relu()).relu())


class CoSAPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and the switches the library asks a model about."""

    backbone: CoSABackbone
    config: CoSAConfig
    config_class = CoSAConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CoSABackbone", "CoSALargeFOV"]  # noqa: RUF012 (the library's own spelling)
    _supports_sdpa = True  # timm's attention calls scaled_dot_product_attention by itself

    def initialize_weights(self) -> None:
        # Not in `_init_weights`: transformers skips it for modules without parameters of their own.
        self.backbone.initialize_missing()
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # `init` leaves alone what has its values already, as the backbone has (`initialize_missing`).
        if isinstance(module, nn.Conv2d):
            if module.kernel_size == (1, 1):
                init.trunc_normal_(module.weight, std=0.02)
            else:
                init.kaiming_normal_(module.weight, nonlinearity="relu")

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        try:
            self.backbone.model.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                f"Backbone {self.config.backbone!r} does not support gradient checkpointing in timm."
            ) from error
        self.backbone.gradient_checkpointing = enable


class CoSAForWeaklySupervisedSegmentation(CoSAPreTrainedModel):
    """
    Segmentation network trained from image-level tags (Sec. 3.1): Z, Z†, M, M† and S in one pass.

    Both heads pool before they classify (global max over tokens, per channel) and share their weight with
    their activation map: Z = GMP(F) Wᵀ and M = F Wᵀ. A model made from a config starts from random weights;
    `from_pretrained` loads a saved CoSA model and never downloads anything for its backbone;
    `from_pretrained_backbone` is where training starts.

    Raises:
        ValueError: if the config's backbone or `aux_layer` does not exist, see `CoSABackbone`.

    Example:

    ```python
    >>> import torch
    >>> from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation

    >>> config = CoSAConfig(backbone="test_vit", num_labels=3)
    >>> model = CoSAForWeaklySupervisedSegmentation(config).eval()
    >>> tags = torch.tensor([[1.0, 0.0]])
    >>> outputs = model(torch.rand(1, 3, 64, 64), labels=tags)
    >>> outputs.logits.shape, outputs.cam_logits.shape, outputs.cls_logits.shape
    (torch.Size([1, 3, 4, 4]), torch.Size([1, 2, 4, 4]), torch.Size([1, 2]))

    ```
    """

    def __init__(self, config: CoSAConfig):
        super().__init__(config)
        self.backbone = CoSABackbone(config)
        self.classifier = nn.Conv2d(self.backbone.num_features, config.num_classes, 1, bias=False)
        self.aux_classifier = nn.Conv2d(self.backbone.aux_num_features, config.num_classes, 1, bias=False)
        self.decoder = CoSALargeFOV(config, self.backbone.num_features)
        self.post_init()

    @classmethod
    def from_pretrained_backbone(
        cls, config: CoSAConfig, weights: str | os.PathLike | None = None
    ) -> "CoSAForWeaklySupervisedSegmentation":
        """
        Builds a model with a pretrained encoder and fresh heads.

        Args:
            config: The model's config.
            weights: A `.safetensors` or `.pth` file of the timm model `config.backbone`. Without it timm
                downloads its own.

        Raises:
            ValueError: if the file does not hold the weights of the backbone, or nothing can be downloaded.

        Example:

        ```python
        >>> import tempfile, timm, torch
        >>> from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation

        >>> encoder = timm.create_model("test_vit")
        >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        ...     torch.save(encoder.state_dict(), file.name)
        ...     config = CoSAConfig(backbone="test_vit")
        ...     model = CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(config, file.name)
        >>> torch.equal(model.backbone.model.norm.weight, encoder.norm.weight)
        True

        ```
        """
        model = cls(config)
        model.backbone.load_pretrained(weights)
        return model

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters of classifiers and decoder, which learn at ten times the rate (Sec. 4.1)."""
        for head in (self.classifier, self.aux_classifier, self.decoder):
            yield from (parameter for parameter in head.parameters() if parameter.requires_grad)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters of the encoder: all but the position embedding."""
        return (parameter for parameter in self.backbone.parameters() if parameter.requires_grad)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CoSAOutput | tuple[torch.Tensor, ...]:
        """
        One pass over a batch of images of any size.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised; cast to the model's dtype.
            labels: `(B, C)` multi-hot tags of the foreground classes. With them the output has a loss.
            output_hidden_states: Whether to return F† and F.
            return_dict: `False` for a tuple of the fields that are set.

        Raises:
            ValueError: if `pixel_values` or `labels` have another shape.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must have shape (B, 3, H, W), got {tuple(pixel_values.shape)}.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict

        features, aux_features = self.backbone(pixel_values.to(self.classifier.weight.dtype))
        cls_logits = self.classifier(features.amax(dim=(2, 3), keepdim=True)).flatten(1)  # Z
        aux_cls_logits = self.aux_classifier(aux_features.amax(dim=(2, 3), keepdim=True)).flatten(1)  # Z†
        output = CoSAOutput(
            loss=None if labels is None else self._classification_loss(cls_logits, aux_cls_logits, labels),
            logits=self.decoder(features),  # S
            hidden_states=(aux_features, features) if output_hidden_states else None,
            cls_logits=cls_logits,
            aux_cls_logits=aux_cls_logits,
            cam_logits=self.classifier(features),  # M
            aux_cam_logits=self.aux_classifier(aux_features),  # M†
        )
        return output if return_dict else output.to_tuple()

    def _classification_loss(
        self, cls_logits: torch.Tensor, aux_cls_logits: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Eq. 1 for both heads, in float32 at least: half precision loses small losses of confident classes."""
        if labels.shape != cls_logits.shape:
            raise ValueError(
                f"labels must be multi-hot tags of shape (B, C) = {tuple(cls_logits.shape)}, without a "
                f"background column, got {tuple(labels.shape)}."
            )
        dtype = torch.promote_types(cls_logits.dtype, torch.float32)
        targets = labels.to(dtype)
        return F.multilabel_soft_margin_loss(cls_logits.to(dtype), targets) + F.multilabel_soft_margin_loss(
            aux_cls_logits.to(dtype), targets
        )


def read_timm_weights(model: nn.Module, name: str, weights: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    The weights of a timm model from a `.safetensors` or `.pth` file.

    Args:
        model: What they are for, without its classifier.
        name: Its name in timm.
        weights: The file.

    Raises:
        ValueError: if the file lacks parameters of the model or has them in another shape.

    Example:

    ```python
    >>> import tempfile, timm
    >>> from cosa_hf.modeling_cosa import read_timm_weights

    >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
    ...     torch.save(timm.create_model("test_vit").half().state_dict(), file.name)
    ...     state_dict = read_timm_weights(timm.create_model("test_vit", num_classes=0), "test_vit", file.name)
    >>> state_dict["norm.weight"].dtype
    torch.float16

    ```
    """
    from timm.models import load_state_dict as read_state_dict

    state_dict = read_state_dict(os.fspath(weights), use_ema=False, weights_only=True)
    # Each model file of timm knows how foreign checkpoints of its models are laid out.
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        state_dict = adapt(state_dict, model)
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    reshaped = [key for key in own if key in state_dict and own[key].shape != state_dict[key].shape]
    if missing or reshaped:
        raise ValueError(
            f"{weights} does not hold the weights of backbone {name!r}. Of {len(own)} "
            f"tensors, missing: {_abbreviate(missing)}; of another shape: {_abbreviate(reshaped)}. "
            "Set `backbone` to the timm model the file was saved from."
        )
    return state_dict


def _create_timm_model(config: CoSAConfig, pretrained: bool = False) -> nn.Module:
    """The timm model of a config: no classifier, any input size and the asked stride where timm can."""
    # Here, not above: of the time that `import cosa_hf` takes beside transformers, timm would be nearly all.
    import timm

    if not timm.is_model(config.backbone):
        raise ValueError(
            f"backbone={config.backbone!r} is not a model of timm {timm.__version__}; see timm.list_models()."
        )
    # Every family has its own words for "any input size" and "this stride", and refuses the others'.
    variants: list[dict[str, Any]] = [
        {"strict_img_size": False},
        {"dynamic_img_size": True},
        {"output_stride": config.output_stride},
    ]
    for options in variants:
        try:
            model = timm.create_model(config.backbone, pretrained=pretrained, num_classes=0, **options)
            break
        except (TypeError, AssertionError, NotImplementedError):
            continue
    else:
        model = timm.create_model(config.backbone, pretrained=pretrained, num_classes=0)
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"timm cannot return intermediate features of backbone {config.backbone!r}.")
    return model


def _tensors(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _abbreviate(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


# The segmentation pipeline looks class names up in this table and logs an error for those it misses.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.setdefault(
    CoSAConfig.model_type, CoSAForWeaklySupervisedSegmentation.__name__
)

__all__ = ["CoSAForWeaklySupervisedSegmentation", "CoSAOutput", "CoSAPreTrainedModel"]
