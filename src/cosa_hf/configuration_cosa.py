"""Configuration of CoSA: what the network is made of and what its outputs are called."""

import os
import shutil
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class SegmentationConfig(PreTrainedConfig):
    r"""
    What the configs of this package share: labels with the background first, and code that goes where they go.

    Args:
        coexistence_classes: Names of the classes averaged into C-mIoU, those that rarely appear without some
            other object (train and rail, boat and water).
        semantic_loss_ignore_index: Id of the pixels a mask leaves out.
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
            "AutoImageProcessor": "image_processing_cosa.CoSAImageProcessor",
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

    Args:
        backbone: Name of any timm model that offers `forward_intermediates` and takes images of any size. The
            default is the paper's (Sec. 4.1).
        aux_layer: Layer whose output is the auxiliary map F†, counted from the end: blocks of a ViT, stages
            of a hierarchical network (-1 would be the last one). -3 is the released ViT setting; a network
            with four stages wants -2, since F† should stay close to the end.
        output_stride: Pixels per token for convolutional backbones, by dilation: 8, 16 or 32. Backbones that
            cannot change their stride (every transformer) keep their own.
        decoder_channels: Width of the LargeFOV decoder.
        decoder_dilation: Dilation of its two 3x3 convolutions.
        cam_threshold: Foreground threshold ξ on normalised CAMs at inference, between 0 and 1.
        coexistence_classes, semantic_loss_ignore_index: As in `SegmentationConfig`.

    Raises:
        ValueError: as `SegmentationConfig`, or for an `aux_layer` above -2 or a threshold outside (0, 1).

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
    code_files = ("configuration_cosa.py", "image_processing_cosa.py", "modeling_cosa.py")

    backbone: str = "vit_base_patch16_224.orig_in21k_ft_in1k"
    aux_layer: int = -3
    decoder_channels: int = 512
    decoder_dilation: int = 5
    cam_threshold: float = 0.5

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.aux_layer > -2:
            raise ValueError(
                f"aux_layer={self.aux_layer} is not a layer before the last: count from the end, -2 or lower."
            )
        if not 0 < self.cam_threshold < 1:
            raise ValueError(f"cam_threshold={self.cam_threshold} must lie strictly between 0 and 1.")


__all__ = ["CoSAConfig", "SegmentationConfig"]
