"""CoSA network (Sec. 3.1): one encoder, two class-activation heads and a segmentation decoder.

Shapes in comments: B batch, C foreground classes, K = C + 1 labels, D channels, h x w token grid.
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .backbone_cosa import CoSABackbone
from .configuration_cosa import CoSAConfig

LEAST_STD = 1e-6  # of a channel that is the same everywhere
LEAST_WEIGHT = 1e-6  # of a token that is its image's mean
PRIOR_LOGIT = -2.0  # of a class: most are absent, and from 0 the first steps would only learn that


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
            The auxiliary map F† `(B, D†, h, w)` and the last map F `(B, D, h, w)`, as the heads see them.
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
        affinity (`torch.Tensor`, *optional*, with `output_affinity=True`):
            What tokens are alike by (`config.affinity`): features `(B, D, h, w)`, or mean attention `(B, N, N)`.
    """

    cls_logits: torch.Tensor | None = None
    aux_cls_logits: torch.Tensor | None = None
    cam_logits: torch.Tensor | None = None
    aux_cam_logits: torch.Tensor | None = None
    affinity: torch.Tensor | None = None


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


class CoSAMLP(nn.Module):
    """
    Segmentation decoder that sees each token by itself: two linear layers with GELU between.

    Maps `(B, D, h, w)` to `(B, K, h, w)`. For frozen encoders, whose tokens have seen the whole image.
    """

    def __init__(self, config: CoSAConfig, in_channels: int):
        super().__init__()
        self.hidden = nn.Conv2d(in_channels, config.decoder_channels, 1)
        self.output = nn.Conv2d(config.decoder_channels, config.num_classes + 1, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.output(F.gelu(self.hidden(features)))


class CoSADecoderInput(nn.Module):
    """What the decoder sees: F, or F and F† one after the other and normed; in training less some channels."""

    def __init__(self, config: CoSAConfig, num_features: int, aux_num_features: int):
        super().__init__()
        self.concat, self.dropout = config.decoder_inputs == "concat", config.decoder_dropout
        self.channels = num_features + aux_num_features if self.concat else num_features
        if self.concat:
            self.norm = nn.LayerNorm(self.channels)

    def forward(self, features: torch.Tensor, aux_features: torch.Tensor) -> torch.Tensor:
        if self.concat:
            tokens = torch.cat([features, aux_features], dim=1).movedim(1, -1)
            features = self.norm(tokens).movedim(-1, 1)
        return F.dropout2d(features, self.dropout, self.training) if self.dropout else features


DECODERS: dict[str, type[CoSALargeFOV | CoSAMLP]] = {"largefov": CoSALargeFOV, "mlp": CoSAMLP}


class CoSAPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and the switches the library asks a model about."""

    backbone: CoSABackbone
    config: CoSAConfig
    config_class = CoSAConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CoSABackbone", "CoSALargeFOV", "CoSAMLP"]  # noqa: RUF012 (the library's own spelling)
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
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

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
    their activation map: Z = GMP(F) Wᵀ and M = F Wᵀ; `config.pooling` has the heads for frozen encoders, which
    classify before they pool. A model made from a config starts from random weights;
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

    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    aux_feature_mean: torch.Tensor
    aux_feature_std: torch.Tensor

    def __init__(self, config: CoSAConfig):
        super().__init__(config)
        self.backbone = CoSABackbone(config)
        channels = {"": self.backbone.num_features, "aux_": self.backbone.aux_num_features}
        self.classifier = nn.Conv2d(channels[""], config.num_classes, 1, bias=config.classifier_bias)
        self.aux_classifier = nn.Conv2d(channels["aux_"], config.num_classes, 1, bias=config.classifier_bias)
        self.decoder_input = CoSADecoderInput(config, *channels.values())
        self.decoder = DECODERS[config.decoder](config, self.decoder_input.channels)
        if config.standardize_features:
            for name, width in channels.items():
                self.register_buffer(f"{name}feature_mean", torch.zeros(width))
                self.register_buffer(f"{name}feature_std", torch.ones(width))
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        if self.config.pooling_weights == "distance":
            # From zero the first step goes where tokens are farthest from their image's mean. From random weights a
            # class is learned by its object or by the surface around it, whichever happens to be nearer.
            for classifier in (self.classifier, self.aux_classifier):
                init.zeros_(classifier.weight)
        if self.config.classifier_bias:
            for bias in (self.classifier.bias, self.aux_classifier.bias):
                assert bias is not None
                init.constant_(bias, PRIOR_LOGIT)
        if self.config.standardize_features:  # a checkpoint without them leaves whatever was in memory
            for name in ("feature", "aux_feature"):
                init.zeros_(getattr(self, f"{name}_mean"))
                init.ones_(getattr(self, f"{name}_std"))

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
        for head in (self.classifier, self.aux_classifier, self.decoder_input, self.decoder):
            yield from (parameter for parameter in head.parameters() if parameter.requires_grad)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters of the encoder: all but the position embedding."""
        return (parameter for parameter in self.backbone.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def set_feature_statistics(self, maps: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """
        Sets what F and F† are standardised by: mean and standard deviation of each channel over all tokens, those of
        maps less their images' mean if the config centers them.

        Args:
            maps: F `(B, D, h, w)` and F† `(B, D†, h, w)` of training images, batch by batch, as the backbone gives
                them.

        Raises:
            ValueError: if the config does not ask for it, or without any map.

        Example:

        ```python
        >>> import torch
        >>> from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation

        >>> config = CoSAConfig(backbone="test_vit", standardize_features=True)
        >>> model = CoSAForWeaklySupervisedSegmentation(config)
        >>> model.set_feature_statistics(model.backbone(batch) for batch in torch.rand(3, 2, 3, 64, 64))
        >>> model.feature_mean.shape, model.aux_feature_std.shape
        (torch.Size([64]), torch.Size([64]))

        ```
        """
        if not self.config.standardize_features:
            raise ValueError("feature statistics need standardize_features=True in the config.")
        sums: dict[str, Any] = {}
        count = 0
        for batch in maps:
            count += batch[0][:, 0].numel()
            for name, each in zip(("feature", "aux_feature"), batch, strict=True):
                if self.config.center_features:
                    each = _center(each)
                values = each.cpu().double().transpose(0, 1).flatten(1)  # (D, tokens)
                total, squares = sums.get(name, (0, 0))
                sums[name] = total + values.sum(1), squares + values.square().sum(1)
        if not count:
            raise ValueError("feature statistics need the maps of one image at least.")
        for name, (total, squares) in sums.items():
            mean = total / count
            variance = (squares / count - mean.square()).clamp_min(0)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(variance.sqrt().clamp_min(LEAST_STD))

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_affinity: bool = False,
        encoded: dict[str, torch.Tensor] | None = None,
    ) -> CoSAOutput | tuple[torch.Tensor, ...]:
        """
        One pass over a batch of images of any size.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised; cast to the model's dtype.
            labels: `(B, C)` multi-hot tags of the foreground classes. With them the output has a loss.
            output_hidden_states: Whether to return F† and F.
            return_dict: `False` for a tuple of the fields that are set.
            output_affinity: Whether to return what tokens are alike by, as `config.affinity` says.
            encoded: What `backbone.encode` made of the images, in their place.

        Raises:
            ValueError: if `pixel_values` or `labels` have another shape, or for an affinity that the config lacks.
        """
        if output_affinity and self.config.affinity == "none":
            raise ValueError("output_affinity needs a config whose affinity is not 'none'.")
        if encoded is not None:
            maps = self.backbone.complete(encoded, output_affinity)
        elif pixel_values is None:
            raise ValueError("give pixel_values, or what the backbone's frozen part made of them (encoded).")
        elif pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must have shape (B, 3, H, W), got {tuple(pixel_values.shape)}.")
        else:
            maps = self.backbone(pixel_values.to(self.classifier.weight.dtype), output_affinity)
        features, aux_features, *affinity = maps
        output = self.forward_heads(features, aux_features, labels, output_hidden_states)
        if output_affinity:
            (output.affinity,) = affinity
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def forward_heads(
        self,
        features: torch.Tensor,
        aux_features: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> CoSAOutput:
        """
        What follows the encoder, for maps that are known already.

        Args:
            features: F of the backbone, `(B, D, h, w)`.
            aux_features: F† of the backbone, `(B, D†, h, w)`.
            labels: As in `forward`.
            output_hidden_states: As there.

        Example:

        ```python
        >>> import torch
        >>> from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation

        >>> model = CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit", num_labels=3)).eval()
        >>> image = torch.rand(1, 3, 64, 64)
        >>> torch.equal(model.forward_heads(*model.backbone(image)).logits, model(image).logits)
        True

        ```
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if self.config.center_features:
            features, aux_features = _center(features), _center(aux_features)
        if self.config.standardize_features:
            features = _standardize(features, self.feature_mean, self.feature_std)
            aux_features = _standardize(aux_features, self.aux_feature_mean, self.aux_feature_std)
        cls_logits, cam_logits = self._classify(self.classifier, features)  # Z, M
        aux_cls_logits, aux_cam_logits = self._classify(self.aux_classifier, aux_features)  # Z†, M†
        return CoSAOutput(
            loss=None if labels is None else self._classification_loss(cls_logits, aux_cls_logits, labels),
            logits=self.decoder(self.decoder_input(features, aux_features)),  # S
            hidden_states=(aux_features, features) if output_hidden_states else None,
            cls_logits=cls_logits,
            aux_cls_logits=aux_cls_logits,
            cam_logits=cam_logits,
            aux_cam_logits=aux_cam_logits,
        )

    def _classify(self, head: nn.Conv2d, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Z (B, C) and M (B, C, h, w) of one head."""
        cam_logits = head(features)
        if self.config.pooling == "max":
            return head(features.amax(dim=(2, 3), keepdim=True)).flatten(1), cam_logits
        if self.config.pooling == "token-max":
            return cam_logits.amax(dim=(2, 3)), cam_logits
        weights = None
        if self.config.pooling_weights == "distance":
            dtype = torch.promote_types(features.dtype, torch.float32)  # squares soon overflow half precision
            weights = features.flatten(2).norm(dim=1, keepdim=True, dtype=dtype)
        return smooth_maximum(cam_logits.flatten(2), self.config.pooling_sharpness, weights), cam_logits

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


def smooth_maximum(logits: torch.Tensor, sharpness: float, weights: torch.Tensor | None = None) -> torch.Tensor:
    """
    log mean exp(r z) / r over the last dimension (Pinheiro and Collobert, 2015): between mean and maximum of z.

    Args:
        logits: z, `(B, C, N)`; computed in float32 at least.
        sharpness: r; towards 0 the mean, towards infinity the maximum.
        weights: w of a weighted mean, log (sum w exp(r z) / sum w) / r, not negative, `(B, 1, N)`. All zero: all alike.

    Example:

    ```python
    >>> import torch
    >>> from cosa_hf.modeling_cosa import smooth_maximum

    >>> [round(smooth_maximum(torch.tensor([0.0, 1.0]), r).item(), 3) for r in (0.01, 4, 100)]
    [0.501, 0.831, 0.993]
    >>> round(smooth_maximum(torch.tensor([0.0, 1.0]), 4, torch.tensor([3.0, 1.0])).item(), 3)
    0.667

    ```
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scaled = sharpness * logits.to(dtype)
    if weights is None:
        return ((scaled.logsumexp(dim=-1) - math.log(logits.shape[-1])) / sharpness).to(logits.dtype)
    # A floor: an image of one colour has no token apart from its mean, and log 0 no gradient.
    log_weights = weights.to(dtype).clamp_min(LEAST_WEIGHT).log()
    pooled = ((scaled + log_weights).logsumexp(dim=-1) - log_weights.logsumexp(dim=-1)) / sharpness
    return pooled.to(logits.dtype)


def _center(features: torch.Tensor) -> torch.Tensor:
    return features - features.mean(dim=(2, 3), keepdim=True)


def _standardize(features: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    return (features - mean[:, None, None]) / std[:, None, None]


# The segmentation pipeline looks class names up in this table and logs an error for those it misses.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.setdefault(
    CoSAConfig.model_type, CoSAForWeaklySupervisedSegmentation.__name__
)

__all__ = ["CoSAForWeaklySupervisedSegmentation", "CoSAOutput", "CoSAPreTrainedModel"]
