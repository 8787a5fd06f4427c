"""Encoders of timm: made for any input size, and filled from files of weights."""

import os
import sys
from typing import Any

import torch
from torch import nn

from .configuration_cosa import CoSAConfig


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
    >>> from cosa_hf.timm_models import read_timm_weights

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


def create_timm_model(config: CoSAConfig, pretrained: bool = False) -> nn.Module:
    """
    The timm model of a config: no classifier, any input size and the asked stride where timm can.

    Raises:
        ValueError: if timm has no such model, or none that returns the maps of its layers.

    Example:

    ```python
    >>> from cosa_hf import CoSAConfig
    >>> from cosa_hf.timm_models import create_timm_model

    >>> model = create_timm_model(CoSAConfig(backbone="test_vit"))
    >>> type(model.head).__name__, model.num_features
    ('Identity', 64)

    ```
    """
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


def has_plain_blocks(model: nn.Module) -> bool:
    """
    Whether a model is a stack of timm's own ViT blocks, or of what was left out of them.

    Example:

    ```python
    >>> import timm
    >>> from cosa_hf.timm_models import has_plain_blocks

    >>> [has_plain_blocks(timm.create_model(name)) for name in ("test_vit", "test_resnet")]
    [True, False]

    ```
    """
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


def _abbreviate(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


__all__ = ["create_timm_model", "has_plain_blocks", "read_timm_weights"]
