"""The encoder of CoSA: a timm model, what it makes of images, and which part of it is frozen.

Shapes in comments: B batch, D channels, N tokens, P class and register tokens, h x w token grid.
"""

import copy
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .configuration_cosa import CoSAConfig
from .timm_models import create_timm_model, has_plain_blocks, read_timm_weights

MAPS = ("features", "aux_features", "affinity")
"""What an encoder makes of an image: F, F† and, for a model that spreads its CAMs, what tokens are alike by."""
ENCODED = (*MAPS, "tokens", "prefix")
"""What its frozen part may make: maps, and the tokens that later blocks go on from, with those before them."""


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
    >>> from cosa_hf.backbone_cosa import CoSABackbone

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
        self.model = create_timm_model(config)
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
            if value != "standard" and not has_plain_blocks(self.model):
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
        if has_plain_blocks(model):
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
        >>> from cosa_hf.backbone_cosa import CoSABackbone

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
                pretrained = create_timm_model(self.config, pretrained=True)
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
        elif blocks and has_plain_blocks(self.model):
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
            fresh = _tensors(create_timm_model(self.config))
            for name in missing:
                init.copy_(own[name], fresh[name])
                own[name]._is_hf_initialized = True


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


__all__ = ["ENCODED", "MAPS", "CoSABackbone"]
