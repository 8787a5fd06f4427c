"""Configuration of CoSA: what the network is made of and what its outputs are called."""

import os
import shutil
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class SegmentationConfig(PreTrainedConfig):
    r"""
    What the configs of this package share: labels with the background first, and code that goes where they go.

    Args:
        coexistence_classes: Names of the classes averaged into C-mIoU, those that rarely appear without some
            other object (train and rail, boat and water).
        semantic_loss_ignore_index: Id of the pixels a mask leaves out: 255, which becomes 65535 where that is the
            id of a label.
        output_stride: What a convolutional encoder is dilated to, in pixels: 8, 16 or 32.

    Attributes:
        model_code: Where the model's class is defined, `module.Class`.
        code_files: All that its code consists of, down to what these files import of each other.

    Raises:
        ValueError: for fewer than two labels, ids that are not 0..C, a label name used twice, a coexistence
            class that is not a foreground label, or another output stride than those.
    """

    model_code: ClassVar[str]
    code_files: ClassVar[tuple[str, ...]]

    coexistence_classes: list[str] = field(default_factory=list)
    semantic_loss_ignore_index: int = 255
    output_stride: int = 16

    def __post_init__(self, **kwargs: Any) -> None:
        if self.id2label is not None and self.label2id is None:
            self.label2id = {name: int(index) for index, name in self.id2label.items()}
        super().__post_init__(**kwargs)
        self._check_labels()
        if self.semantic_loss_ignore_index == 255 and self.num_classes >= 255:
            self.semantic_loss_ignore_index = 65535
        if self.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={self.output_stride} must be 8, 16 or 32.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As in `PreTrainedConfig.from_dict`, where other labels than the saved ones bring along what follows from them.

        `id2label` alone gives `label2id`, another `num_labels` alone gives LABEL_0, LABEL_1 and so on, and coexistence
        classes that are labels no more are left out.
        """
        depending = ("id2label", "label2id", "coexistence_classes")
        labels: dict[str, Any] = {name: kwargs.pop(name) for name in depending if name in kwargs}
        saved, count = config_dict.get("id2label") or {}, kwargs.get("num_labels")
        if "id2label" not in labels and count not in (None, len(saved)):
            labels["id2label"] = {index: f"LABEL_{index}" for index in range(count)}
        if "id2label" in labels:
            names = set(labels["id2label"].values())
            kept = [name for name in config_dict.get("coexistence_classes", ()) if name in names]
            labels = {"label2id": None, "coexistence_classes": kept} | labels
        return super().from_dict(config_dict | labels, **kwargs)

    def _check_labels(self) -> None:
        names = cast("dict[int, str]", self.id2label)
        if len(names) < 2:
            raise ValueError(f"id2label={names} needs the background at id 0 and a foreground class after it.")
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"The ids of id2label must be 0..{len(names) - 1}, got {sorted(names)}.")
        if len(set(names.values())) < len(names):
            raise ValueError(f"Every label needs a name of its own, got {list(names.values())}.")
        if self.label2id != {name: index for index, name in names.items()}:
            raise ValueError(f"label2id={self.label2id} is not the inverse of id2label={names}.")
        foreground = [names[index] for index in range(1, len(names))]
        unknown = [name for name in self.coexistence_classes if name not in foreground]
        if unknown:
            raise ValueError(f"coexistence_classes {unknown} are not foreground classes; those are {foreground}.")

    @property
    def num_classes(self) -> int:
        """C, the number of foreground classes an image can be tagged with: `num_labels` less background."""
        return len(self.id2label or ()) - 1

    @property
    def image_processor_type(self) -> str:
        """
        Class of the image processor, for which `AutoImageProcessor` asks before it chooses a backend.

        It would take torchvision's wherever that is installed. Scores and masks of saved models are those of Pillow,
        so their name joins the names that it takes Pillow for, now that there is something to choose.
        """
        from transformers.models.auto import image_processing_auto  # four seconds, which configs alone do without

        name = "CoSAImageProcessor"
        pillow_first = getattr(image_processing_auto, "DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS", [])
        if name not in pillow_first:
            pillow_first.append(name)
        return name

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Saves the config and, beside it, the code of config, model and processor.

        Models save their config through this, so a saved model also loads where this package is not
        installed, with `trust_remote_code=True`. Arguments as in `PreTrainedConfig.save_pretrained`.

        Raises:
            ValueError: labels that were changed into what could not be loaded again.
        """
        self._check_labels()
        self.auto_map = {
            "AutoConfig": f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}",
            "AutoModel": self.model_code,
            "AutoModelForSemanticSegmentation": self.model_code,
            "AutoModelForImageSegmentation": self.model_code,
            "AutoImageProcessor": {
                "pil": "image_processing_cosa.CoSAImageProcessor",
                "torchvision": "image_processing_cosa.CoSAImageProcessorTorchvision",
            },
        }
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.code_files:
            source = Path(__file__).with_name(name)
            # In the cache of remote code each file can lie in a folder of its own: there transformers, which
            # knows where, adds the others when model and processor are saved.
            if source.exists() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


@strict
class CoSAConfig(SegmentationConfig):
    r"""
    Architecture, label names and inference defaults of a CoSA model. Nothing about training lives here.

    The labels are the K = C + 1 segmentation labels with the background at id 0; the C classes an image can
    be tagged with are the labels 1..C in the same order. `label2id` follows from `id2label` when not given.
    Layers are blocks of a ViT or stages of a hierarchical network, counted from the end. The defaults are the
    paper's; what goes beyond it is for frozen encoders, whose features are not made for CAMs.

    Args:
        backbone: Name of any timm model that offers `forward_intermediates` and takes images of any size. The
            default is the paper's (Sec. 4.1).
        feature_layer: Layer whose output is the last map F. -1, the last, comes after the final norm of a ViT;
            earlier ones as they are.
        attention: What the last block of a plain ViT does to make F, where `feature_layer` is -1. `standard`: all
            of it. `value`: each token's own value, without attention, residual and MLP (MaskCLIP, Zhou et al.
            2022). `value-value`: the same, with attention of values to values (CLIP Surgery, Li et al. 2023).
        aux_layer: Layer whose output is the auxiliary map F†. -3 is the released ViT setting; a network with
            four stages wants -2, since F† should stay close to the end. -1 where F is another map.
        aux_attention: As `attention`, for F† where `aux_layer` is -1.
        output_stride: Pixels per token for convolutional backbones, by dilation: 8, 16 or 32. Backbones that
            cannot change their stride (every transformer) keep their own.
        pooling: How tokens become the class logits Z. `max`: the largest value of each channel, then W (Sec. 3.1).
            `lse`: of the tokens' logits z = F Wᵀ their smooth maximum, log mean exp(r z) / r (Pinheiro and
            Collobert, 2015). `token-max`: the largest of them.
        pooling_sharpness: r of `lse`; from the mean of the logits, towards 0, to their maximum.
        pooling_weights: How much a token counts in `lse`. `equal`: all alike. `distance`: as much as what the head sees
            of it is long, its distance from the image's mean; needs `center_features`.
        classifier_bias: Whether both classifiers, and with them M and M†, have a bias.
        center_features: Whether the heads see F and F† less their mean over the image. Where an even surface, a tissue
            or a field fills the image, its look tells the classes apart as well as the object does, and so the CAMs are
            of both; what is left without the mean is what stands out.
        standardize_features: Whether the heads see F and F† less their mean over the training images, divided by
            their standard deviation, channel by channel; after `center_features`.
        decoder: `largefov`, two dilated 3x3 convolutions and a classifier (Sec. 3.1), or `mlp`, two layers on each
            token by itself.
        decoder_inputs: `last`, F, or `concat`, F and F† one after the other, through a layer norm.
        decoder_channels: Width of the decoder.
        decoder_dilation: Dilation of LargeFOV's two 3x3 convolutions.
        decoder_dropout: Share of the decoder's input channels that training leaves out, image by image.
        cam_threshold: Foreground threshold ξ on normalised CAMs at inference, between 0 and 1.
        affinity: What tokens are alike by, where CAMs are spread over the tokens that are like theirs: `features`,
            the cosine of the output of `affinity_layer`; `attention`, the encoder's own, of `affinity_blocks`.
        affinity_layer: Layer whose tokens `features` compares.
        affinity_blocks: Blocks of a plain ViT whose attention `attention` averages.
        affinity_temperature: `features`: of a softmax over the cosines.
        affinity_power: `features`: with it the positive cosines to this power take the softmax's place.
            `attention`: the attention to this power.
        affinity_steps: How often CAMs are spread.
        coexistence_classes, semantic_loss_ignore_index: As in `SegmentationConfig`.

    Raises:
        ValueError: as `SegmentationConfig`; for a number outside its range, a layer that is not counted from the
            end, F and F† that are one map, an attention for another layer than the last, or weights of a pooling
            that has none.

    Example:

    ```python
    >>> from cosa_hf import CoSAConfig

    >>> config = CoSAConfig(id2label={0: "background", 1: "cat", 2: "dog"}, coexistence_classes=["cat"])
    >>> config.num_labels, config.num_classes, config.label2id["dog"]
    (3, 2, 2)

    ```
    """

    model_type = "cosa"
    model_code = "modeling_cosa.CoSAForWeaklySupervisedSegmentation"
    code_files = (
        "backbone_cosa.py",
        "configuration_cosa.py",
        "image_processing_cosa.py",
        "modeling_cosa.py",
        "timm_models.py",
    )

    backbone: str = "vit_base_patch16_224.orig_in21k_ft_in1k"
    feature_layer: int = -1
    attention: Literal["standard", "value", "value-value"] = "standard"
    aux_layer: int = -3
    aux_attention: Literal["standard", "value", "value-value"] = "standard"
    pooling: Literal["max", "lse", "token-max"] = "max"
    pooling_sharpness: float = 4.0
    pooling_weights: Literal["equal", "distance"] = "equal"
    classifier_bias: bool = False
    center_features: bool = False
    standardize_features: bool = False
    decoder: Literal["largefov", "mlp"] = "largefov"
    decoder_inputs: Literal["last", "concat"] = "last"
    decoder_channels: int = 512
    decoder_dilation: int = 5
    decoder_dropout: float = 0.0
    cam_threshold: float = 0.5
    affinity: Literal["none", "features", "attention"] = "none"
    affinity_layer: int = -4
    affinity_blocks: list[int] = field(default_factory=lambda: [-7, -6, -5, -4, -3])
    affinity_temperature: float = 0.15
    affinity_power: float | None = None
    affinity_steps: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_layers()
        if not 0 < self.cam_threshold < 1:
            raise ValueError(f"cam_threshold={self.cam_threshold} must lie strictly between 0 and 1.")
        if not 0 <= self.decoder_dropout < 1:
            raise ValueError(f"decoder_dropout={self.decoder_dropout} must lie in [0, 1).")
        for name in ("pooling_sharpness", "affinity_temperature", "affinity_power", "affinity_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0.")
        if self.pooling_weights != "equal" and (self.pooling != "lse" or not self.center_features):
            raise ValueError(
                f"pooling_weights={self.pooling_weights!r} needs pooling='lse' and center_features=True, "
                f"got {self.pooling!r} and {self.center_features}."
            )

    def _check_layers(self) -> None:
        for name in ("feature_layer", "aux_layer", "affinity_layer"):
            if getattr(self, name) > -1:
                raise ValueError(f"{name}={getattr(self, name)} is not a layer: count from the end, -1 or lower.")
        if not self.affinity_blocks or max(self.affinity_blocks) > -1:
            raise ValueError(f"affinity_blocks={self.affinity_blocks} must be blocks, counted from the end.")
        maps = [(self.feature_layer, self.attention), (self.aux_layer, self.aux_attention)]
        for (layer, attention), prefix in zip(maps, ("", "aux_"), strict=True):
            if attention != "standard" and layer != -1:
                name = "aux_layer" if prefix else "feature_layer"
                raise ValueError(f"{prefix}attention={attention!r} is of the last block, but {name}={layer}.")
        if maps[0] == maps[1]:
            raise ValueError(
                f"aux_layer={self.aux_layer} with aux_attention={self.aux_attention!r} is the map F itself: choose "
                "another layer (-2 or lower), or another attention."
            )


__all__ = ["CoSAConfig", "SegmentationConfig"]
