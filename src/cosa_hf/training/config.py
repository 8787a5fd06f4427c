"""What one training run is: every choice of it in one flat, typed record, read from YAML and flags."""

import copy
import dataclasses
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
from transformers import HfArgumentParser

from cosa_hf.assignment.network import TeacherConfig
from cosa_hf.assignment.threshold import ThresholdConfig
from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.data.appearance import AppearanceConfig
from cosa_hf.data.options import DataConfig
from cosa_hf.data.views import ViewConfig
from cosa_hf.files import whole_file
from cosa_hf.objective.affinity import AffinityConfig
from cosa_hf.objective.overall import ObjectiveConfig
from cosa_hf.settings import Settings, setting

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""The recipes that go by name; they come with the package."""


AnyConfig = TypeVar("AnyConfig", bound="RunConfig")


@dataclass(kw_only=True)
class WeightsConfig(Settings):
    """What the encoder starts from."""

    _argument_group_name = "Pretrained weights"

    backbone_weights: str | None = setting(
        None, "safetensors or pth file of the backbone, in place of timm's download (upernet-swin-b: a directory)"
    )
    pretrained: bool = setting(True, "start from pretrained backbone weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone_weights and not self.pretrained:
            raise ValueError(f"backbone_weights {self.backbone_weights} need pretrained: true, or leave them out")


@dataclass(kw_only=True)
class ScheduleConfig(Settings):
    """Steps and rates (Sec. 4.1). The defaults are the paper's for VOC."""

    _argument_group_name = "Schedule (Sec. 4.1)"

    max_steps: int = setting(20_000, "optimiser steps in all", least=1)
    batch_size: int = setting(2, "images per process at a time, a micro-batch", least=1)
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimiser step", least=1)
    images_per_step: int = setting(
        4,
        "what the schedule is made for: batch_size x gradient_accumulation_steps x processes; a run with another "
        "number says so",
        least=1,
    )
    learning_rate: float = setting(6e-5, "learning rate of the backbone", above=0)
    head_lr_multiplier: float = setting(10.0, "classifiers and decoder learn this much faster", above=0)
    lr_warmup_steps: int = setting(1_500, "linear rise of the learning rate", least=0)
    lr_power: float = setting(0.9, "power of its polynomial decay", least=0)
    weight_decay: float = setting(0.01, "weight decay of the optimiser", least=0)
    max_grad_norm: float = setting(0.0, "clip the gradient's norm to this; 0: do not clip", least=0)
    seed: int = setting(0, "seed of weights, order and views", least=0)
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = setting(
        "no", "Accelerate's precision; auto: bf16 where the device computes it itself, else no"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr_warmup_steps < self.max_steps:
            raise ValueError(f"lr_warmup_steps must lie below max_steps = {self.max_steps}, got {self.lr_warmup_steps}")

    def images_taken(self, processes: int) -> int:
        """Images of an optimiser step on so many processes; the schedule is made for `images_per_step`."""
        return self.batch_size * self.gradient_accumulation_steps * processes


@dataclass(kw_only=True)
class OutputConfig(Settings):
    """What a run leaves and tells."""

    _argument_group_name = "Output, checkpoints and evaluation"

    output_dir: str = setting("runs/train", "where models, checkpoints and logs go")
    tracker: str = setting("tensorboard", "any that Accelerate knows, or none")
    log_every: int = setting(20, "steps between log entries", least=1)
    eval_every: int = setting(0, "steps between evaluations on eval_split; 0: never", least=0)
    eval_images: int = setting(100, "images of each such evaluation, the first of the split", least=1)
    eval_panels: int = setting(4, "visualizations of each such evaluation, of its first images", least=0)
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: only when cut short", least=0)
    keep_checkpoints: int = setting(2, "how many of them to keep, the newest", least=1)
    snapshot_every: int = setting(
        0, "steps between copies of the networks, kept to be analysed afterwards; 0: none", least=0
    )
    resume: bool = setting(False, "go on from the newest checkpoint in output_dir")
    allow_changed_data: bool = setting(
        False, "resume although images or tags are not those of the run so far; classes must be"
    )


@dataclass(kw_only=True)
class RunConfig(DataConfig, ViewConfig, WeightsConfig, ScheduleConfig, OutputConfig):
    """What every training run has to be told, whatever it trains.

    Raises:
        ValueError: a field of the wrong type or outside its range; the message names it.
    """

    parts: ClassVar[tuple[Any, ...]] = (DataConfig, ViewConfig, WeightsConfig, ScheduleConfig, OutputConfig)

    directory: ClassVar[Path] = RECIPES
    """Where the recipes that go by name lie."""

    places: ClassVar[tuple[str, ...]] = ("dataset_name", "backbone_weights")
    """Fields that may be paths, beside `data_dir` and `output_dir`."""

    in_checkpoint: ClassVar[tuple[str, ...]] = ("learning_rate", "head_lr_multiplier", "weight_decay")
    """Fields whose values a checkpoint brings back, so that a resumed run cannot have others."""

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Self:
        """A recipe from field names and values.

        Raises:
            ValueError: a name that is not a field.
        """
        cls._check_names(values)
        return cls(**values)

    @classmethod
    def named(cls, name: str | Path, **overrides: Any) -> Self:
        """A recipe by its name in `directory`, or by the path of a YAML file, with single fields replaced.

        Raises:
            FileNotFoundError: no such recipe; the message lists the known names.
            ValueError: not a mapping, an unknown field or a wrong type.
        """
        return cls.from_mapping(cls.values_of(name) | overrides)

    @classmethod
    def values_of(cls, name: str | Path) -> dict[str, Any]:
        """The fields that a recipe sets, by its name or path, as they stand in it.

        Raises:
            FileNotFoundError: no such recipe; the message lists the known names.
            ValueError: the file holds something else, or a name that is not a field.
        """
        path = Path(name)
        if not path.suffix:
            path = cls.directory / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(recipe.stem for recipe in cls.directory.glob("*.yaml")))
            raise FileNotFoundError(f"no recipe {path}; known by name: {known or f'none, there is no {cls.directory}'}")
        values = read_fields(path)
        cls._check_names(values)
        return values

    @classmethod
    def _check_names(cls, values: Iterable[str]) -> None:
        known = {spec.name for spec in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown recipe fields {unknown}; the fields are {sorted(known)}")

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """A recipe from a YAML file, with single fields replaced.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mapping, an unknown field or a wrong type.
        """
        return cls.named(Path(path), **overrides)

    def to_yaml(self, path: str | Path) -> None:
        """Write all fields, so that the run can be repeated from the file alone."""
        with whole_file(Path(path)) as unfinished:
            unfinished.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")

    def require_held(self, earlier: "RunConfig") -> None:
        """Refuse to resume a run of the configuration `earlier` with other values of what a checkpoint brings back.

        Raises:
            ValueError: names the first such field.
        """
        for name in self.in_checkpoint:
            held, asked = getattr(earlier, name), getattr(self, name)
            if asked != held:
                raise ValueError(
                    f"{name} of a resumed run stays {held}, which its checkpoint holds, got {asked}: keep it, or start "
                    "anew in another output_dir"
                )

    def portable(self) -> Self:
        """The recipe for somebody else: of a path on this machine the last component is left, of `data_dir` nothing.

        Example:
            >>> config = TrainingConfig(backbone_weights="/home/me/vit.pth", output_dir="/tmp/cats").portable()
            >>> config.backbone_weights, config.output_dir
            ('vit.pth', 'runs/cats')
        """
        named: dict[str, Any] = {name: place_name(getattr(self, name)) for name in self.places}
        output_dir = f"runs/{Path(self.output_dir).name}"
        return dataclasses.replace(
            self, **named, data_dir=None, output_dir=output_dir, resume=False, allow_changed_data=False
        )


@dataclass(kw_only=True)
class TagsConfig(Settings):
    """What CoSA learns from."""

    _argument_group_name = "Tags"

    train_split: str = setting("train_aug", "split whose tags are learned")
    streaming: bool = setting(False, "hub: train on rows as they arrive, keeping none on disk")
    shuffle_buffer: int = setting(1000, "streaming: rows held in memory, from which the next is drawn", least=1)
    supervision: Literal["tags", "masks"] = setting(
        "tags", "masks: train the same network on ground-truth masks, as an upper bound"
    )
    pseudo_labels: str | None = setting(
        None,
        "a second round: train on masks of the training images that `cosa-hf label` wrote, a directory of png or "
        "parquet or a dataset on the Hub, in place of labels by the assignment network",
    )
    warmup_steps: int = setting(6_000, "first steps, classification only; = max_steps: a plain CAM baseline", least=0)


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """The network of CoSA (Sec. 3.1). Where the defaults are the paper's, the others are for frozen encoders."""

    _argument_group_name = "Network (Sec. 3.1)"

    backbone: str = setting(CoSAConfig.backbone, "any timm model by name")
    feature_layer: int = setting(CoSAConfig.feature_layer, "layer of F, counted from the end; -1: the last", most=-1)
    attention: Literal["standard", "value", "value-value"] = setting(
        CoSAConfig.attention, "what a ViT's last block does to make F: all of it, or its values alone (MaskCLIP), or "
        "mixed by their own attention (CLIP Surgery)",
    )  # fmt: skip
    aux_layer: int = setting(CoSAConfig.aux_layer, "layer of F†, counted from the end", most=-1)
    aux_attention: Literal["standard", "value", "value-value"] = setting(
        CoSAConfig.aux_attention, "the same for F†, where aux_layer is -1"
    )
    output_stride: int = setting(CoSAConfig.output_stride, "stride of convolutional backbones, by dilation")
    pooling: Literal["max", "lse", "token-max"] = setting(
        CoSAConfig.pooling, "to class logits: of each channel the maximum (the paper's); of the tokens' logits the "
        "log-sum-exp, or the maximum",
    )  # fmt: skip
    pooling_sharpness: float = setting(CoSAConfig.pooling_sharpness, "r of pooling lse", above=0)
    pooling_weights: Literal["equal", "distance"] = setting(
        CoSAConfig.pooling_weights, "how much a token counts in pooling lse: all alike, or by its distance from the "
        "image's mean; needs center_features",
    )  # fmt: skip
    classifier_bias: bool = setting(CoSAConfig.classifier_bias, "the classifiers, and so M and M†, have a bias")
    center_features: bool = setting(
        CoSAConfig.center_features, "the heads see F and F† less their mean over the image: what stands out in it"
    )
    standardize_features: bool = setting(
        CoSAConfig.standardize_features, "the heads see F and F† with mean 0 and deviation 1 over the training images"
    )
    decoder: Literal["largefov", "mlp"] = setting(CoSAConfig.decoder, "LargeFOV, or two layers on each token by itself")
    decoder_inputs: Literal["last", "concat"] = setting(CoSAConfig.decoder_inputs, "it sees F, or F and F†")
    decoder_channels: int = setting(CoSAConfig.decoder_channels, "width of the decoder", least=1)
    decoder_dilation: int = setting(CoSAConfig.decoder_dilation, "dilation of LargeFOV", least=1)
    decoder_dropout: float = setting(
        CoSAConfig.decoder_dropout, "share of the decoder's input channels left out in training", least=0, below=1
    )
    cam_threshold: float = setting(
        CoSAConfig.cam_threshold,
        "xi of the saved model, for reports and labels; training has its own",
        above=0,
        below=1,
    )
    gradient_checkpointing: bool = setting(False, "recompute activations to save memory")


@dataclass(kw_only=True)
class FrozenConfig(Settings):
    """How much of the encoder is frozen, and where its features are kept."""

    _argument_group_name = "Frozen encoder"

    frozen_blocks: str = setting(
        "0", "how many of the encoder's first blocks (of a ViT; stages of others) are frozen: 0, N or all"
    )
    cache_features: str = setting(
        "auto",
        "with frozen blocks: run them once an image, plain and mirrored, and keep what they make on disk; auto: on a "
        "machine without GPU, below the Hub's cache; never; or a directory",
    )

    def __post_init__(self) -> None:
        self.frozen_blocks = str(self.frozen_blocks)  # YAML reads a number
        super().__post_init__()
        if not (self.frozen_blocks == "all" or self.frozen_blocks.isdecimal()):
            raise ValueError(f"frozen_blocks must be 0, a number of blocks, or all, got {self.frozen_blocks!r}")


@dataclass(kw_only=True)
class TrainingConfig(
    RunConfig, TagsConfig, AppearanceConfig, ModelConfig, FrozenConfig, TeacherConfig, AffinityConfig, ThresholdConfig,
    ObjectiveConfig,
):  # fmt: skip
    """One run of CoSA. The defaults are the paper's for VOC (Sec. 4.1, Tab. 5, 8-10).

    Raises:
        ValueError: a field of the wrong type or outside its range; the message names it.

    Example:
        >>> TrainingConfig.from_mapping({"crop_size": 224, "learning_rate": "2e-4"}).learning_rate
        0.0002
    """

    parts: ClassVar[tuple[Any, ...]] = (
        DataConfig, TagsConfig, ViewConfig, AppearanceConfig, ModelConfig, WeightsConfig, FrozenConfig, ScheduleConfig,
        TeacherConfig, AffinityConfig, ThresholdConfig, ObjectiveConfig, OutputConfig,
    )  # fmt: skip
    places: ClassVar[tuple[str, ...]] = (*RunConfig.places, "cache_features", "pseudo_labels")
    in_checkpoint: ClassVar[tuple[str, ...]] = (
        *RunConfig.in_checkpoint, "backbone", "feature_layer", "attention", "aux_layer", "aux_attention",
        "classifier_bias", "center_features", "standardize_features", "decoder", "decoder_inputs", "decoder_channels",
        "threshold", "threshold_queue", "threshold_covariance",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps must lie in [0, max_steps = {self.max_steps}], got {self.warmup_steps}")
        if self.streaming and (self.dataset != "hub" or self.reads_masks):
            raise ValueError(
                "streaming is for training on the tags of dataset hub, "
                f"got dataset {self.dataset} and supervision {self.supervision}"
            )
        if self.pseudo_labels is not None and (self.streaming or self.reads_masks):
            raise ValueError(
                "pseudo_labels take the place of streaming, supervision masks and guidance gt, got streaming "
                f"{self.streaming}, supervision {self.supervision} and guidance {self.guidance}"
            )
        if self.background_threshold is not None:
            if self.dynamic_threshold:
                raise ValueError("background_threshold needs a fixed threshold: set dynamic_threshold to false")
            if self.background_threshold > self.threshold:
                raise ValueError(
                    f"background_threshold must lie in [0, threshold = {self.threshold}], got "
                    f"{self.background_threshold}"
                )

    @property
    def reads_masks(self) -> bool:
        """Whether training opens true masks of its images: for the supervised bound and the oracle, never else."""
        return self.supervision == "masks" or self.guidance == "gt"

    @property
    def follows_masks(self) -> bool:
        """Whether finished masks, true ones or pseudo-labels, stand in for what the assignment network says."""
        return self.supervision == "masks" or self.pseudo_labels is not None


def read_fields(path: Path) -> dict[str, Any]:
    """The fields in a recipe's file, of whichever kind it is.

    Raises:
        ValueError: the file holds something else.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `field: value` lines, got {type(values).__name__}")
    return values


def place_name(place: str | None) -> str | None:
    """The last part of a path; anything else, such as a name on the Hub, as it is.

    Example:
        >>> place_name("/home/me/labels"), place_name("org/labels")
        ('labels', 'org/labels')
    """
    is_path = place is not None and (Path(place).is_absolute() or place.startswith((".", "~")) or Path(place).exists())
    return Path(place).name if place is not None and is_path else place


class ConfigParser(HfArgumentParser):
    """Flags from the fields of `Settings`, a group for each class, whose ranges `Settings` checks itself."""

    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: dataclasses.Field) -> None:
        plain = copy.copy(field)
        # argparse takes all metadata for arguments of its own.
        plain.metadata = {"help": field.metadata["help"]}  # type: ignore[assignment]
        HfArgumentParser._parse_dataclass_field(parser, plain)


def config_from_flags(
    kind: type[AnyConfig], values: dict[str, Any], flags: Sequence[str], **parser_options: Any
) -> AnyConfig:
    """A configuration from the fields that a recipe sets and from flags, which win.

    Args:
        kind: with its `parts`, the groups of `--help`.
        values: from a recipe.
        flags: as typed.
        parser_options: of `argparse.ArgumentParser`.

    Raises:
        ValueError: a value out of its range.
        SystemExit: flags that are not fields, or `--help`.

    Example:
        >>> config_from_flags(TrainingConfig, {"max_steps": 7000}, ["--crop_size", "224"]).crop_size
        224
    """
    parser = ConfigParser(kind.parts, **parser_options)
    parser.set_defaults(**values)
    found = parser.parse_args(list(flags))
    return kind(**{spec.name: getattr(found, spec.name) for spec in dataclasses.fields(kind)})
