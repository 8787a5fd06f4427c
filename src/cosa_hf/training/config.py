"""What one training run is: every choice of it in one flat, typed record, read from YAML and flags."""

import dataclasses
import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml

from cosa_hf.data.options import DatasetOptions
from cosa_hf.objective.separation import LEAST_TEMPERATURE

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""The recipes that go by name: those of the clone that this package is installed from, with `pip install -e .`."""

MOST_ALPHA = 0.999
"""Of Eq. 4: towards 1 the least perplexity goes to 0, and its reciprocal, a weight, to infinity."""


@dataclass(kw_only=True)
class RunConfig(DatasetOptions):
    """What every run of the training loop has to be told, whatever it trains.

    The options of the dataset readers are fields too (`DatasetOptions`).

    Raises:
        ValueError: a field of the wrong type or outside its range; the message names it.
    """

    directory: ClassVar[Path] = RECIPES
    """Where the recipes that go by name lie."""

    places: ClassVar[tuple[str, ...]] = ("dataset_name", "backbone_weights")
    """Fields that may be paths, beside `data_dir` and `output_dir`."""

    positive: ClassVar[tuple[str, ...]] = (
        "crop_size", "input_size", "batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate",
        "head_lr_multiplier", "log_every", "images_per_step", "keep_checkpoints", "eval_images",
    )  # fmt: skip
    not_negative: ClassVar[tuple[str, ...]] = (
        "num_workers", "lr_warmup_steps", "lr_power", "weight_decay", "max_grad_norm", "seed", "eval_every",
        "eval_panels", "checkpoint_every", "snapshot_every",
    )  # fmt: skip
    may_be_infinite: ClassVar[tuple[str, ...]] = ()

    in_checkpoint: ClassVar[tuple[str, ...]] = ("learning_rate", "head_lr_multiplier", "weight_decay")
    """Fields whose values a checkpoint brings back, so that a resumed run cannot have others."""

    # Data
    dataset: str = field(default="voc", metadata={"help": "voc, coco, folder, hub, or shapes (the demo set)"})
    data_dir: str | None = field(default=None, metadata={"help": "root of the dataset, e.g. VOCdevkit/VOC2012"})
    eval_split: str = field(default="val", metadata={"help": "split whose masks are compared with, if eval_every > 0"})
    crop_size: int = field(default=448, metadata={"help": "side of the training crop, pixels"})
    input_size: int = field(default=448, metadata={"help": "side that images are resized to at inference, pixels"})
    scale_min: float = field(default=0.5, metadata={"help": "least random rescale"})
    scale_max: float = field(default=2.0, metadata={"help": "greatest random rescale"})
    batch_size: int = field(default=2, metadata={"help": "images per process at a time"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches per optimiser step"})
    images_per_step: int = field(
        default=4,
        metadata={
            "help": "what the schedule is made for: batch_size x gradient_accumulation_steps x processes; a run with "
            "another number says so"
        },
    )
    num_workers: int = field(default=4, metadata={"help": "processes that read and augment images"})

    # Network
    backbone_weights: str | None = field(
        default=None,
        metadata={"help": "safetensors or pth file of the backbone, not the download (upernet-swin-b: a directory)"},
    )
    pretrained: bool = field(default=True, metadata={"help": "start from pretrained backbone weights"})

    # Schedule (Sec. 4.1)
    max_steps: int = field(default=20_000, metadata={"help": "optimiser steps in all"})
    learning_rate: float = field(default=6e-5, metadata={"help": "of the backbone"})
    head_lr_multiplier: float = field(default=10.0, metadata={"help": "classifiers and decoder learn this much faster"})
    lr_warmup_steps: int = field(default=1_500, metadata={"help": "linear rise of the learning rate"})
    lr_power: float = field(default=0.9, metadata={"help": "of its polynomial decay"})
    weight_decay: float = field(default=0.01, metadata={"help": "of AdamW"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip the gradient's norm to this; 0: do not clip"})

    # The run
    seed: int = field(default=0, metadata={"help": "of weights, order and views"})
    mixed_precision: Literal["no", "bf16", "fp16"] = field(default="no", metadata={"help": "Accelerate's precision"})
    output_dir: str = field(default="runs/train", metadata={"help": "where models, checkpoints and logs go"})
    tracker: str = field(default="tensorboard", metadata={"help": "any that Accelerate knows, or none"})
    log_every: int = field(default=20, metadata={"help": "steps between log entries"})
    eval_every: int = field(default=0, metadata={"help": "steps between evaluations on eval_split; 0: never"})
    eval_images: int = field(default=100, metadata={"help": "images of each such evaluation, the first of the split"})
    eval_panels: int = field(default=4, metadata={"help": "pictures of each such evaluation, of its first images"})
    checkpoint_every: int = field(default=0, metadata={"help": "steps between checkpoints; 0: only when cut short"})
    keep_checkpoints: int = field(default=2, metadata={"help": "how many of them to keep, the newest"})
    snapshot_every: int = field(
        default=0, metadata={"help": "steps between copies of the networks, kept for research/analyze.py; 0: none"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in output_dir"})

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            setattr(self, spec.name, _typed(spec.name, getattr(self, spec.name), hints[spec.name]))
            self._require_number(spec.name)
        if not self.lr_warmup_steps < self.max_steps:
            raise ValueError(f"lr_warmup_steps must lie below max_steps = {self.max_steps}, got {self.lr_warmup_steps}")
        if not 0 < self.scale_min <= self.scale_max:
            raise ValueError(f"scale_min..scale_max must be a positive range, got {self.scale_min}..{self.scale_max}")
        if self.backbone_weights and not self.pretrained:
            raise ValueError(f"backbone_weights {self.backbone_weights} need pretrained: true, or leave them out")

    def _require_number(self, name: str) -> None:
        """Neither NaN nor infinite nor of the wrong sign: such a run would end late, or learn the opposite."""
        value = getattr(self, name)
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int | float):
                continue
            if not math.isfinite(number) and not (number == math.inf and name in self.may_be_infinite):
                raise ValueError(f"{name} must be finite, got {value}")
            if name in self.positive and number <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
            if name in self.not_negative and number < 0:
                raise ValueError(f"{name} must not be negative, got {value}")

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Self:
        """A recipe from field names and values.

        Raises:
            ValueError: a name that is no field.
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
            ValueError: the file holds something else, or a name that is no field.
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
        Path(path).write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")

    def portable(self) -> Self:
        """The recipe for somebody else: of a path on this machine the last part is left, of `data_dir` nothing.

        Example:
            >>> recipe = TrainingConfig(backbone_weights="/home/me/vit.pth", output_dir="/tmp/cats").portable()
            >>> recipe.backbone_weights, recipe.output_dir
            ('vit.pth', 'runs/cats')
        """
        named: dict[str, Any] = {name: place_name(getattr(self, name)) for name in self.places}
        output_dir = f"runs/{Path(self.output_dir).name}"
        return dataclasses.replace(self, **named, data_dir=None, output_dir=output_dir, resume=False)


@dataclass(kw_only=True)
class TrainingConfig(RunConfig):
    """One run of CoSA. The defaults are the paper's for VOC (Sec. 4.1, Tab. 5, 8-10).

    Raises:
        ValueError: a field of the wrong type or outside its range; the message names it.

    Example:
        >>> TrainingConfig.from_mapping({"crop_size": 224, "learning_rate": "2e-4"}).learning_rate
        0.0002
    """

    positive: ClassVar[tuple[str, ...]] = (
        *RunConfig.positive, "spl_temperature", "threshold_queue", "supervision_stride", "shuffle_buffer",
        "decoder_channels", "decoder_dilation", "label_scales",
    )  # fmt: skip
    not_negative: ClassVar[tuple[str, ...]] = (
        *RunConfig.not_negative, "cam2seg_weight", "aux_cam2seg_weight", "seg2cam_weight", "separation_weight",
        "dense_energy_weight", "perplexity_beta", "perplexity_epsilon",
    )  # fmt: skip
    may_be_infinite: ClassVar[tuple[str, ...]] = ("perplexity_epsilon",)
    in_checkpoint: ClassVar[tuple[str, ...]] = (
        *RunConfig.in_checkpoint, "backbone", "aux_layer", "decoder_channels", "threshold", "threshold_queue",
        "threshold_covariance",
    )  # fmt: skip

    # Data
    train_split: str = field(default="train_aug", metadata={"help": "split whose tags are learned"})
    streaming: bool = field(default=False, metadata={"help": "hub: train on rows as they arrive, keeping none on disk"})
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "streaming: rows held in memory, from which the next is drawn"}
    )
    supervision: Literal["tags", "masks"] = field(
        default="tags", metadata={"help": "masks: train the same network on true masks, as an upper bound"}
    )

    # Network
    backbone: str = field(
        default="vit_base_patch16_224.orig_in21k_ft_in1k", metadata={"help": "any timm model by name"}
    )
    aux_layer: int = field(default=-3, metadata={"help": "layer of F†, counted from the end"})
    output_stride: int = field(default=16, metadata={"help": "stride of convolutional backbones, by dilation"})
    decoder_channels: int = field(default=512, metadata={"help": "width of LargeFOV"})
    decoder_dilation: int = field(default=5, metadata={"help": "dilation of LargeFOV"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations to save memory"})

    # Schedule (Sec. 4.1)
    warmup_steps: int = field(
        default=6_000,
        metadata={"help": "first steps, classification only; = max_steps: a plain CAM baseline"},
    )
    ema_momentum: float = field(default=0.9994, metadata={"help": "m of the assignment network, < 1"})

    # Pseudo-labels and objective (Eq. 3-11)
    swapping_assignments: bool = field(
        default=True, metadata={"help": "SA: labels from the assignment network; false: from the online one"}
    )
    bf16_assignment: bool = field(
        default=False, metadata={"help": "the assignment network runs in bf16, whatever mixed_precision says"}
    )
    label_scales: list[float] = field(
        default_factory=lambda: [1.0, 0.5, 1.5], metadata={"help": "scales that the labelling network sees"}
    )
    cam_fusion: Literal["max", "sum"] = field(
        default="max", metadata={"help": "of the CAMs over those scales; the released code sums"}
    )
    spl_temperature: float = field(default=0.01, metadata={"help": "tau of Eq. 7"})
    dynamic_threshold: bool = field(default=True, metadata={"help": "DT (Eq. 6); false: stay at `threshold`"})
    threshold: float = field(default=0.5, metadata={"help": "xi at the start, or throughout"})
    background_threshold: float | None = field(
        default=None,
        metadata={"help": "CAM2Seg ignores confidences from here to a fixed `threshold` (release); unset: none"},
    )
    threshold_decay: float = field(default=0.99, metadata={"help": "EMA decay of xi"})
    threshold_queue: int = field(default=100, metadata={"help": "batches that the mixture is fitted to"})
    threshold_covariance: Literal["full", "tied"] = field(
        default="full",
        metadata={
            "help": "Gaussians of Eq. 6: full, each as wide as fits the confidences above 0.05 (paper); "
            "tied, both equally wide, fitted to all confidences (few images, clean CAMs)"
        },
    )
    cam2seg_weight: float = field(default=0.1, metadata={"help": "lambda_c2s, labels from M'"})
    aux_cam2seg_weight: float = field(default=0.1, metadata={"help": "lambda_c2s, labels from M†'"})
    supervision_stride: int = field(
        default=1, metadata={"help": "CAM2Seg looks at one point in so many pixels, in both directions"}
    )
    balanced: bool = field(
        default=False, metadata={"help": "background and foreground make up half of CAM2Seg each (release)"}
    )
    seg2cam_weight: float = field(default=0.05, metadata={"help": "lambda_s2c"})
    guidance: Literal["none", "spl", "gt", "noise"] = field(
        default="spl",
        metadata={
            "help": "GC, what Seg2CAM holds the CAMs to: SPL; none: they are not guided; gt: the true masks, an "
            "oracle; noise: random masks (Fig. 1)"
        },
    )
    detach: Literal["none", "features", "classifier"] = field(
        default="none", metadata={"help": "what the gradient of Seg2CAM does not reach: nothing, F or W_fc (Tab. 4a)"}
    )
    relu_cams: bool = field(default=False, metadata={"help": "Seg2CAM sees relu(M) (release)"})
    separation_weight: float = field(default=0.1, metadata={"help": "lambda_csc (CSC)"})
    separation_temperature: float = field(default=0.5, metadata={"help": "of the contrast, Eq. 10"})
    separation_scope: Literal["image", "batch"] = field(
        default="image", metadata={"help": "which tokens see each other in Eq. 10"}
    )
    reliability_weighting: bool = field(default=True, metadata={"help": "RAW"})
    perplexity_alpha: float = field(default=0.8, metadata={"help": "lambda_alpha of Eq. 4"})
    perplexity_beta: float = field(default=1.0, metadata={"help": "lambda_beta of Eq. 4"})
    perplexity_epsilon: float = field(default=1.0, metadata={"help": "epsilon of Eq. 9"})
    dense_energy_weight: float = field(default=0.0, metadata={"help": "of the bilateral regulariser (release: 0.05)"})
    dense_energy_scale: float = field(
        default=0.5, metadata={"help": "side of its grid, relative to the crop; its time grows with the fourth power"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.perplexity_alpha <= MOST_ALPHA:
            raise ValueError(
                f"perplexity_alpha must lie in (0, {MOST_ALPHA}], got {self.perplexity_alpha}: perplexity is positive"
            )
        if not self.separation_temperature >= LEAST_TEMPERATURE:
            raise ValueError(
                f"separation_temperature must be at least {LEAST_TEMPERATURE}, got {self.separation_temperature}"
            )
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ValueError(f"warmup_steps must lie in [0, max_steps = {self.max_steps}], got {self.warmup_steps}")
        if self.streaming and (self.dataset != "hub" or self.reads_masks):
            raise ValueError(
                "streaming is for training on the tags of dataset hub, "
                f"got dataset {self.dataset} and supervision {self.supervision}"
            )
        if not 0 <= self.ema_momentum < 1:
            raise ValueError(f"ema_momentum must lie in [0, 1): {self.ema_momentum} freezes the assignment network")
        if not 0 < self.dense_energy_scale <= 1:
            raise ValueError(f"dense_energy_scale must lie in (0, 1], got {self.dense_energy_scale}")
        if self.background_threshold is not None:
            if self.dynamic_threshold:
                raise ValueError("background_threshold needs a fixed threshold: set dynamic_threshold to false")
            if not 0 <= self.background_threshold <= self.threshold:
                raise ValueError(
                    f"background_threshold must lie in [0, threshold = {self.threshold}], got "
                    f"{self.background_threshold}"
                )

    @property
    def reads_masks(self) -> bool:
        """Whether training opens the masks of its images: for the supervised bound and the oracle, never else."""
        return self.supervision == "masks" or self.guidance == "gt"


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
    """The last part of a path; what is no path of this machine, as a name on the Hub, as it is.

    Example:
        >>> place_name("/home/me/labels"), place_name("org/labels")
        ('labels', 'org/labels')
    """
    is_path = place is not None and (Path(place).is_absolute() or place.startswith((".", "~")) or Path(place).exists())
    return Path(place).name if place is not None and is_path else place


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type, or a ValueError that names the field.

    YAML reads `2e-4` as a string and `1` as an integer where a float is meant; both are taken as written.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) not in (Literal, list) else ()
    if type(None) in options:
        if value is None:
            return None
        (hint,) = (option for option in options if option is not type(None))
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
    elif typing.get_origin(hint) is list:
        if isinstance(value, list) and value:
            return [_typed(name, item, typing.get_args(hint)[0]) for item in value]
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is hint:
        return value
    expected = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ValueError(f"recipe field {name} must be {expected}, got {value!r}")
