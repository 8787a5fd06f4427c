"""CoSA network (Sec. 3.1): one encoder, two class-activation heads and a segmentation decoder.

Shapes in comments: B batch, C foreground classes, K = C + 1 labels, D channels, h x w token grid.
"""

import copy
import inspect
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .configuration_cosa import CoSAConfig

LEAST_STD = 1e-6  # of a channel that is the same everywhere
LEAST_WEIGHT = 1e-6  # of a token that is its image's mean
PRIOR_LOGIT = -2.0  # of a class: most are absent, and from 0 the first steps would only learn that

MAPS = ("features", "aux_features", "affinity")
"""What an encoder makes of an image: F, F† and, for a model that spreads its CAMs, what tokens are alike by."""
ENCODED = (*MAPS, "tokens", "prefix")
"""What its frozen part may make: maps, and the tokens that later blocks go on from, with those before them."""


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


class _Tokens(NamedTuple):
    """What a layer of a ViT makes: tokens on the grid, (B, D, h, w), and class and register tokens, (B, P, D)."""

    grid: torch.Tensor
    prefix: torch.Tensor

    @property
    def joined(self) -> torch.Tensor:
        """As a block takes them, (B, P + h w, D)."""
        return torch.cat([self.prefix, self.grid.flatten(2).transpose(1, 2)], dim=1)

    def replaced(self, joined: torch.Tensor) -> "_Tokens":
        """Others on the same grid."""
        height, width = self.grid.shape[-2:]
        prefix = joined.shape[1] - height * width
        return _Tokens(joined[:, prefix:].transpose(1, 2).unflatten(2, (height, width)), joined[:, :prefix])


class _Wanted(NamedTuple):
    """What an encoder is asked for: maps, each by layer and attention, the mean attention of blocks, and the tokens
    of the last layer that there is to run."""

    maps: dict[str, tuple[int, str]]
    blocks: list[int]
    last: int | None = None

    @property
    def layers(self) -> set[int]:
        """Those whose output takes part; 0 is the final norm."""
        takes = {_place(*where) if where[1] == "standard" else -2 for where in self.maps.values()}
        return takes | set(self.blocks) | ({self.last} if self.last is not None else set())

    def split(self, layer: int) -> "tuple[_Wanted, _Wanted]":
        """What is there after a layer, tokens included if any block has to go on from them; and what comes later."""
        early = {name: where for name, where in self.maps.items() if _place(*where) <= layer}
        rest = _Wanted(
            {name: where for name, where in self.maps.items() if name not in early},
            [block for block in self.blocks if block > layer],
        )
        blocks = [block for block in self.blocks if block <= layer]
        return _Wanted(early, blocks, layer if rest.maps or rest.blocks else None), rest


def _place(layer: int, attention: str) -> int:
    """The layer that a map is complete after: what follows the last block's norm, or is made of its values, is 0."""
    return 0 if layer == -1 or attention != "standard" else layer


class CoSABackbone(nn.Module):
    """
    A timm encoder that returns two of its feature maps, the last F and an auxiliary one F†, on the same grid.

    Layer -1 is what follows the final norm of a ViT, and the last level of the feature pyramid of any other backbone;
    an earlier layer is its raw output. Of the last block of a plain ViT there are two more maps, without residual and
    MLP: `value`, norm(proj(v)), and `value-value`, norm(proj(softmax(v vᵀ / √d) v)). Attention mixes what a class
    token needs; a token's own value says what is at its place (MaskCLIP, Zhou et al. 2022; CLIP Surgery, Li et al.
    2023).

    An image whose sides are not multiples of the stride is resized to the nearest multiples (one token at least), so
    every token covers the same area. Batch norm keeps its statistics in training, and position embeddings are frozen.
    What no map depends on, blocks behind the last that is used among it, is left out.

    Attributes:
        stride: Side of a token in input pixels.
        num_features, aux_num_features: Channels D of F and D† of F†.
        frozen_layer: The last that `freeze` froze, 0 for all of the encoder; None where `complete` cannot go on from
            it: of an encoder that is not frozen, or whose frozen part are stages of a pyramid.

    Raises:
        ValueError: if timm does not know the backbone or cannot return intermediate features of it, if it does not
            take images of any size, if a layer lies before its first, or if it lacks the blocks of a plain ViT that
            the config's attention or affinity needs.

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
        self.frozen_layer: int | None = None
        self.model = _create_timm_model(config)
        self._intermediates: dict[str, Any] = {"output_fmt": "NCHW"}
        if "extra_blocks" in inspect.signature(self.model.forward_intermediates).parameters:
            # EfficientNets otherwise list only the stages that end in a downsampling
            self._intermediates["extra_blocks"] = True
        self._is_pyramid = len({level["reduction"] for level in self.model.feature_info}) > 1
        self.stride = int(self.model.feature_info[-1]["reduction"])
        self._require_blocks()
        self.stride, (self.num_features, self.aux_num_features), unused = self._probe()
        for name in unused:
            modules = self.model.get_submodule(name)  # a list is gone through, whatever becomes of it
            empty = (
                nn.ModuleList(nn.Identity() for _ in modules) if isinstance(modules, nn.ModuleList) else nn.Identity()
            )
            self.model.set_submodule(name, empty)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not tensor.is_meta:
                # timm has initialised itself; transformers must not do it over
                tensor._is_hf_initialized = True
        self._freeze_position_embedding()

    def _require_blocks(self) -> None:
        """Refuses what only a plain ViT has: queries, keys and values are known of timm's own block alone."""
        config = self.config
        asked = {name: getattr(config, name) for name in ("attention", "aux_attention")}
        if config.affinity == "attention":
            asked["affinity"] = "attention"
        for name, value in asked.items():
            if value != "standard" and not _has_plain_blocks(self.model):
                raise ValueError(f"{name}={value!r} needs the blocks of a plain ViT, which {config.backbone!r} lacks.")
        if config.affinity == "attention" and min(config.affinity_blocks) < -len(self.model.blocks):
            raise ValueError(
                f"affinity_blocks={config.affinity_blocks}: of {config.backbone!r} the attention of blocks "
                f"{-len(self.model.blocks)} to -1 can be taken."
            )

    def _probe(self) -> tuple[int, list[int], list[str]]:
        """Stride, channels of both maps, and the modules that no map depends on.

        Pooling heads and their norms, or blocks behind the last that is used, would be dead weight in every
        checkpoint, and parameters without gradient stop distributed training.
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
                maps = self._maps(twin, torch.empty(1, 3, *size), self._wanted())
            except (AssertionError, RuntimeError) as error:
                raise ValueError(self._refusal(twin, height, width)) from error
            sum(each.sum() for each in maps.values()).backward()  # type: ignore[union-attr]
        features, aux_features, *_ = maps.values()
        return size[0] // features.shape[-2], [features.shape[1], aux_features.shape[1]], list(_without_gradient(twin))

    def _refusal(self, twin: Any, height: int, width: int) -> str:
        """What is wrong with a backbone that fails at another size, told by what it does at its own."""
        name, config = self.config.backbone, self.config
        try:
            self._maps(twin, torch.empty(1, 3, height, width), self._wanted())
        except AssertionError as own:
            layers = ["feature_layer", "aux_layer", *(["affinity_layer"] if config.affinity == "features" else [])]
            first = min(layers, key=lambda layer: getattr(config, layer))
            return f"{first}={getattr(config, first)} is not a layer of {name!r}: {own}"
        except RuntimeError as own:
            return f"timm cannot return feature maps of backbone {name!r}: {own}"
        return f"backbone {name!r} takes images of {width}x{height}, not of any size: choose another"

    def _wanted(self, affinity: bool = True) -> _Wanted:
        """F, F† and, with `affinity`, what tokens are alike by, if the config names it."""
        config = self.config
        maps: dict[str, tuple[int, str]] = {
            "features": (config.feature_layer, config.attention),
            "aux_features": (config.aux_layer, config.aux_attention),
        }
        if affinity and config.affinity == "features":
            maps["affinity"] = (config.affinity_layer, "standard")
        return _Wanted(maps, config.affinity_blocks if affinity and config.affinity == "attention" else [])

    def _split(self, affinity: bool) -> tuple[_Wanted, _Wanted]:
        """What of this the frozen part makes, and what the blocks after it do."""
        assert self.frozen_layer is not None, "nothing to go on from"
        return self._wanted(affinity).split(self.frozen_layer)

    def _maps(self, model: Any, source: torch.Tensor | _Tokens, wanted: _Wanted) -> dict[str, torch.Tensor]:
        """Maps by name, of images or of what the frozen blocks have made of them."""
        if self._is_pyramid:
            return self._levels(model, source, wanted.maps)
        with _attention_of([model.blocks[block] for block in wanted.blocks]) as attentions:
            if isinstance(source, torch.Tensor):
                outputs = self._outputs_of_images(model, source, wanted.layers)
            else:
                outputs = self._outputs_of_tokens(model, source, wanted.layers)
        maps = {}
        for name, (layer, attention) in wanted.maps.items():
            if attention == "standard":
                maps[name] = outputs[_place(layer, attention)].grid
            else:
                last_input = outputs[-2]
                maps[name] = last_input.replaced(_dense_tokens(model, last_input.joined, attention)).grid
        if wanted.last is not None:
            maps["tokens"], maps["prefix"] = outputs[wanted.last]
        if attentions:
            prefix = model.num_prefix_tokens
            maps["affinity"] = sum(attentions)[:, prefix:, prefix:] / len(self.config.affinity_blocks)
        return maps

    def _levels(self, model: Any, pixel_values: Any, maps: dict[str, tuple[int, str]]) -> dict[str, torch.Tensor]:
        """Levels of a feature pyramid on the grid of F, without what follows it: a head convolution narrows the CAMs
        to their peaks."""
        indices = sorted({layer for layer, _ in maps.values()})
        levels = model.forward_intermediates(
            pixel_values, indices=indices, intermediates_only=True, stop_early=True, **self._intermediates
        )
        found = {name: levels[indices.index(layer)] for name, (layer, _) in maps.items()}
        grid = found["features"].shape[-2:]
        return {
            name: level
            if level.shape[-2:] == grid
            else F.interpolate(level, size=grid, mode="bilinear", align_corners=False)
            for name, level in found.items()
        }

    def _outputs_of_images(self, model: Any, pixel_values: torch.Tensor, layers: set[int]) -> dict[int, _Tokens]:
        """What the layers of a ViT make; 0 is its final norm."""
        indices = sorted({min(layer, -1) for layer in layers})
        options: dict[str, Any] = self._intermediates | {"indices": indices}
        if _has_plain_blocks(model):
            options["return_prefix_tokens"] = True
        if 0 in layers:
            normed, found = model.forward_intermediates(pixel_values, **options)
        else:
            found = model.forward_intermediates(pixel_values, intermediates_only=True, stop_early=True, **options)
        outputs = {}
        for layer, each in zip(indices, found, strict=True):
            outputs[layer] = _Tokens(*each) if isinstance(each, tuple) else _Tokens(each, each[:, :, 0, :0].mT)
        if 0 in layers:
            outputs[0] = outputs[-1].replaced(normed)
        return outputs

    def _outputs_of_tokens(self, model: Any, start: _Tokens, layers: set[int]) -> dict[int, _Tokens]:
        """The same of what the frozen blocks have made."""
        assert self.frozen_layer is not None
        outputs, tokens = {self.frozen_layer: start}, start.joined
        for layer in range(self.frozen_layer + 1, min(max(layers), -1) + 1):
            block = model.blocks[layer]
            tokens = checkpoint(block, tokens, use_reentrant=False) if self.gradient_checkpointing else block(tokens)
            outputs[layer] = start.replaced(tokens)
        if 0 in layers:
            outputs[0] = start.replaced(model.norm(tokens))
        return outputs

    def _resized(self, pixel_values: torch.Tensor) -> torch.Tensor:
        given = list(pixel_values.shape[-2:])
        size = [max((side + self.stride // 2) // self.stride, 1) * self.stride for side in given]
        if size == given:
            return pixel_values
        return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)

    def forward(self, pixel_values: torch.Tensor, affinity: bool = False) -> tuple[torch.Tensor, ...]:
        # (B, D, h, w), (B, D†, h, w) and, with `affinity`, features (B, D, h, w) or attention (B, N, N)
        return tuple(self._maps(self.model, self._resized(pixel_values), self._wanted(affinity)).values())

    def encode(self, pixel_values: torch.Tensor, affinity: bool = False) -> dict[str, torch.Tensor]:
        """
        What the frozen part makes of images, all that `complete` needs to know of them.

        Args:
            pixel_values: `(B, 3, H, W)`.
            affinity: As in `forward`.

        Returns:
            The maps that depend on nothing else, by their names in `MAPS`, and if other blocks follow, what these go
            on from: `tokens`, `(B, D, h, w)`, and `prefix`, class and register tokens, `(B, P, D)`. Of an attention
            that is averaged over frozen and other blocks, `affinity` is the share of the frozen ones.

        Example:

        ```python
        >>> import torch
        >>> from cosa_hf import CoSAConfig
        >>> from cosa_hf.modeling_cosa import CoSABackbone

        >>> backbone = CoSABackbone(CoSAConfig(backbone="test_vit", aux_layer=-4)).eval()
        >>> backbone.freeze(4)
        >>> images = torch.rand(1, 3, 64, 64)
        >>> encoded = backbone.encode(images)
        >>> list(encoded), torch.allclose(backbone.complete(encoded)[0], backbone(images)[0], atol=1e-5)
        (['aux_features', 'tokens', 'prefix'], True)

        ```
        """
        frozen, _ = self._split(affinity)
        return self._maps(self.model, self._resized(pixel_values), frozen)

    def complete(self, encoded: dict[str, torch.Tensor], affinity: bool = False) -> tuple[torch.Tensor, ...]:
        """
        What `forward` returns, of images that the frozen part has seen: runs the blocks after it.

        Args:
            encoded: What `encode` returned, with the same part frozen.
            affinity: As in `forward`.
        """
        _, rest = self._split(affinity)
        maps = dict(encoded)
        if rest.maps or rest.blocks:
            for name, each in self._maps(self.model, _Tokens(encoded["tokens"], encoded["prefix"]), rest).items():
                maps[name] = maps[name] + each if name in maps else each  # attention of frozen and of other blocks
        return tuple(maps[name] for name in (MAPS if affinity else MAPS[:2]) if name in maps)

    def train(self, mode: bool = True) -> "CoSABackbone":
        """Switches the mode of all but batch norm, as a few crops are too few for statistics, and frozen modules."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
            if frozen or isinstance(module, nn.modules.batchnorm._BatchNorm):
                for part in module.modules():  # a dropout has no parameters of its own
                    part.training = False
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

    def freeze(self, blocks: int | None = None) -> None:
        """
        Freezes the encoder's first blocks and what comes before them: no gradient, and eval mode for good.

        Args:
            blocks: How many; blocks of a ViT, stages of a hierarchical network. All of the encoder when None.

        Raises:
            ValueError: If there are fewer.
        """
        if blocks is None:
            self.requires_grad_(False)
        else:
            from timm.models import group_parameters

            groups = group_parameters(self.model, self.model.group_matcher(coarse=True), reverse=True)
            if blocks > max(groups.values()):
                raise ValueError(f"{self.config.backbone!r} has {max(groups.values())} blocks, fewer than {blocks}.")
            for name, parameter in self.model.named_parameters():
                # The stem is group 0; earlier versions of timm count two of its parts among the last.
                if groups[name] <= blocks or name.startswith(("norm_pre.", "reg_token")):
                    parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            self.frozen_layer = 0
        elif blocks and _has_plain_blocks(self.model):
            self.frozen_layer = blocks - 1 - len(self.model.blocks)
        self.train(self.training)

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


def _has_plain_blocks(model: nn.Module) -> bool:
    """Whether a model is a stack of timm's own ViT blocks, or of what was left out of them."""
    from timm.models.vision_transformer import Attention, Block

    blocks: Any = [block for block in getattr(model, "blocks", ()) if not isinstance(block, nn.Identity)]
    # Subclasses, gates and norms inside of attention compute something else than softmax(q kᵀ) v.
    return bool(blocks) and all(
        type(block) is Block
        and type(block.attn) is Attention
        and getattr(block.attn, "gate", None) is None
        and isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity)
        for block in blocks
    )


def _dense_tokens(model: Any, tokens: torch.Tensor, attention: str) -> torch.Tensor:
    """The last block's values, plain or mixed by their own attention, without residual and MLP: (B, N, D)."""
    block = model.blocks[-1]
    together = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, block.attn.num_heads, -1))  # queries, keys, values
    value = together[:, :, 2].transpose(1, 2)  # (B, heads, N, d)
    if attention == "value-value":
        value = F.scaled_dot_product_attention(value, value, value)
    return model.norm(block.ls1(block.attn.proj(value.transpose(1, 2).flatten(2))))


@contextmanager
def _attention_of(blocks: Sequence[Any]) -> Iterator[Any]:
    """The attention of each of the blocks, the mean over heads, (B, N, N), as it comes by in a forward pass.

    timm's fused attention keeps its weights; its other one sends them through a dropout, so that they are made once.
    """
    found: list[torch.Tensor] = []
    fused = {block.attn: block.attn.fused_attn for block in blocks}

    def keep(_: nn.Module, given: tuple[torch.Tensor]) -> None:
        found.append(_mean_over_heads(*given))

    handles = [block.attn.attn_drop.register_forward_pre_hook(keep) for block in blocks]
    try:
        for attention in fused:
            attention.fused_attn = False
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for attention, before in fused.items():
            attention.fused_attn = before


def _mean_over_heads(attention: torch.Tensor) -> torch.Tensor:
    """(B, N, N) in float32 at least, summed in place: `mean` takes twice as long."""
    first, *others = attention.unbind(1)
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for each in others:
        total += each
    return total / attention.shape[1]


def _without_gradient(model: nn.Module) -> Iterator[str]:
    """Names of the children that no gradient reaches, and of such layers of a list or sequence."""
    for name, child in model.named_children():
        if _unreached(child):
            yield name
        elif isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (f"{name}.{layer}" for layer, part in child.named_children() if _unreached(part))


def _unreached(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.grad is None for parameter in parameters)


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
