"""The networks of Tab. 2 by name, and any other of segmentation_models_pytorch, timm and transformers."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    PreTrainedModel,
    SegformerImageProcessor,
    SwinBackbone,
    SwinConfig,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from cosa_hf.configuration_cosa_ms import CoSAMSConfig
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.inference import auto_class
from cosa_hf.modeling_cosa_ms import OPTIONS, CoSAMSForSemanticSegmentation, load_pretrained, options_of
from cosa_hf.multistage.config import MultistageConfig

#: What the paper calls R101 and WR38, as encoder and decoder.
PAPER = {"deeplabv3plus-r101": "smp/deeplabv3plus/resnet101.tv_in1k", "largefov-wr38": "largefov/wide_resnet38_a1"}

#: The paper does not say which; these are the largest that the ImageNet-22k row of mmsegmentation starts from.
SWIN_B = "microsoft/swin-base-patch4-window12-384-in22k"
SWIN_B_SHAPE: dict[str, Any] = {
    "embed_dim": 128,
    "depths": [2, 2, 18, 2],
    "num_heads": [4, 8, 16, 32],
    "window_size": 12,
}


def build_network(
    recipe: MultistageConfig, names: list[str], coexistence_classes: Sequence[str] = ()
) -> tuple[PreTrainedModel, Any]:
    """The network of a recipe with pretrained encoder and fresh decoder, and its processor.

    Args:
        recipe: `network`, where its weights come from, and the size that images are resized to.
        names: the K labels, background first.
        coexistence_classes: whose mean is C-mIoU.

    Raises:
        ValueError: no such network, its weights cannot be had, or the recipe sets a field that it does not follow.

    Example:
        >>> recipe = MultistageConfig(pseudo_labels="labels", network="largefov/test_resnet", pretrained=False)
        >>> model, processor = build_network(recipe, ["background", "cat", "dog"])
        >>> model.config.num_labels, processor.size["height"]
        (3, 448)
    """
    model, processor = _build(recipe, names)
    model.config.coexistence_classes = list(coexistence_classes)
    return model, processor


def _build(recipe: MultistageConfig, names: list[str]) -> tuple[PreTrainedModel, Any]:
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    size = {"height": recipe.input_size, "width": recipe.input_size}
    match PAPER.get(recipe.network, recipe.network).split("/"):
        case ["upernet-swin-b"]:
            return _upernet_swin(recipe, labels), SegformerImageProcessor(size=size, do_reduce_labels=False)
        case ["upernet", encoder]:
            model = _upernet_timm(recipe, encoder, labels)
            mean, std = _normalisation(encoder)
            return model, SegformerImageProcessor(size=size, image_mean=mean, image_std=std, do_reduce_labels=False)
        case ["smp", architecture, encoder] | ["largefov" as architecture, encoder]:
            model = _cosa_ms(recipe, architecture, encoder, labels)
            mean, std = _normalisation(encoder)
            return model, CoSAImageProcessor(size=size, image_mean=mean, image_std=std)
        case _:
            return _transformers_model(recipe, labels, size)


def encoder_of(model: PreTrainedModel) -> nn.Module:
    """The submodule of a segmentation model that starts from pretrained weights.

    Raises:
        ValueError: the model does not name one.

    Example:
        >>> recipe = MultistageConfig(pseudo_labels="labels", network="upernet/test_resnet", pretrained=False)
        >>> model, _ = build_network(recipe, ["background", "cat", "dog"])
        >>> encoder_of(model) is model.backbone
        True
    """
    encoder = model.base_model if model.base_model is not model else getattr(model, "backbone", None)
    if encoder is None:
        raise ValueError(f"{type(model).__name__} does not say which submodule is its encoder")
    return encoder


def _cosa_ms(recipe: MultistageConfig, architecture: str, encoder: str, labels: dict[str, Any]) -> PreTrainedModel:
    followed = options_of(architecture)
    _require_unset(recipe, [field for field in OPTIONS if field not in followed])
    options = {field: value for field in followed if (value := getattr(recipe, field)) is not None}
    config = CoSAMSConfig(architecture=architecture, encoder=encoder, **options, **labels)
    model = CoSAMSForSemanticSegmentation(config)
    if recipe.pretrained:
        model.load_encoder(recipe.backbone_weights)
    return model


def _upernet_swin(recipe: MultistageConfig, labels: dict[str, Any]) -> PreTrainedModel:
    _require_unset(recipe, ["output_stride"])
    stages = ["stage1", "stage2", "stage3", "stage4"]
    shape = SWIN_B_SHAPE | {"out_features": stages}
    config = UperNetConfig(backbone_config=SwinConfig(**shape), **_upernet_options(recipe), **labels)
    model = UperNetForSemanticSegmentation(config)
    if recipe.pretrained:
        source = recipe.backbone_weights or SWIN_B
        try:
            swin = SwinBackbone.from_pretrained(source, out_features=stages)
        except OSError as error:
            raise ValueError(
                f"cannot take the weights of Swin-B from {source}. Name a directory of them (--backbone_weights DIR), "
                f"or start from random ones (--pretrained false): {error}"
            ) from error
        if swin.config.embed_dim != SWIN_B_SHAPE["embed_dim"] or swin.config.window_size != SWIN_B_SHAPE["window_size"]:
            raise ValueError(f"{source} is not a Swin-B with windows of {SWIN_B_SHAPE['window_size']}")
        model.backbone.load_state_dict(swin.state_dict(), strict=False)  # the norms of its outputs are the decoder's
    return model


def _upernet_timm(recipe: MultistageConfig, encoder: str, labels: dict[str, Any]) -> PreTrainedModel:
    import timm

    _require_unset(recipe, ["output_stride"])
    if not timm.is_model(encoder):
        raise ValueError(f"network {recipe.network!r}: {encoder!r} is not a model of timm {timm.__version__}")
    feature_info: Any = timm.create_model(encoder, features_only=True).feature_info
    backbone: dict[str, Any] = {"backbone": encoder, "out_indices": list(range(len(feature_info.channels())))[-4:]}
    config = UperNetConfig(backbone_config=TimmBackboneConfig(**backbone), **_upernet_options(recipe), **labels)
    model = UperNetForSemanticSegmentation(config)
    if recipe.pretrained:
        load_pretrained(model.backbone._backbone, encoder, recipe.backbone_weights)
    return model


def _upernet_options(recipe: MultistageConfig) -> dict[str, Any]:
    # The loss here knows weights and several processes, the model's own does not, and it alone reaches that head.
    options: dict[str, Any] = {"use_auxiliary_head": False}
    return options | ({} if recipe.decoder_channels is None else {"hidden_size": recipe.decoder_channels})


def _transformers_model(
    recipe: MultistageConfig, labels: dict[str, Any], size: dict[str, int]
) -> tuple[PreTrainedModel, Any]:
    try:
        config = AutoConfig.from_pretrained(recipe.network, **labels)
        if recipe.pretrained:
            model = auto_class(config).from_pretrained(recipe.network, config=config, ignore_mismatched_sizes=True)
        else:
            model = auto_class(config).from_config(config)
        processor = AutoImageProcessor.from_pretrained(recipe.network, size=size)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no network {recipe.network!r}: known by name are {', '.join(PAPER)}, upernet-swin-b, "
            "smp/ARCHITECTURE/TIMM_MODEL, largefov/TIMM_MODEL and upernet/TIMM_MODEL; anything else must be a "
            f"transformers model for semantic segmentation on disk or within reach on the Hub\n{error}"
        ) from error
    _require_unset(recipe, ["backbone_weights", "decoder_channels", "output_stride"])
    return model, processor


def _require_unset(recipe: MultistageConfig, fields: Sequence[str]) -> None:
    for name in fields:
        if getattr(recipe, name) is not None:
            raise ValueError(
                f"{name}={getattr(recipe, name)!r} has no effect on network {recipe.network!r}: leave it out"
            )


def _normalisation(encoder: str) -> tuple[list[float], list[float]]:
    import timm

    known = timm.get_pretrained_cfg(encoder)
    data_config = timm.data.resolve_data_config(pretrained_cfg=known.to_dict() if known else {})
    return list(data_config["mean"]), list(data_config["std"])
