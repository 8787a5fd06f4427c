"""The kinds of model that are published, CoSA and the networks of CoSA-MS: all that their cards do not share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm

from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.configuration_cosa_ms import CoSAMSConfig
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.networks import PAPER, SWIN_B, SWIN_B_SHAPE
from cosa_hf.training.config import RunConfig, TrainingConfig, place_name, read_fields

#: (what, split, protocol, mIoU) by the paper.
Published = tuple[str, str, str, str]


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        recipe: of its training runs.
        card: what fills the blocks of `cards/frame.md`.
        tags: of the repository.
        settings: what of a recipe the card shows; all of it is in recipe.yaml.
        paper: the paper's numbers, by data set.
    """

    recipe: type[RunConfig]
    card: str
    tags: tuple[str, ...]
    settings: tuple[str, ...]
    paper: Mapping[str, list[Published]]

    def dataset(self, recipe: Any, report: dict[str, Any] | None) -> str | None:
        """The data set that a model was trained on, by its name in recipes; None where nothing tells."""
        if recipe and (self.recipe is TrainingConfig or recipe.eval_every):
            return recipe.dataset
        # Pseudo-labels may be of any data set; what a network was scored on has its labels.
        return report["protocol"]["dataset"] if report else None


COSA = Kind(
    TrainingConfig,
    "cosa.md",
    ("cosa", "semantic-segmentation", "weakly-supervised-segmentation"),
    (
        "crop_size", "batch_size", "gradient_accumulation_steps", "max_steps", "warmup_steps", "learning_rate",
        "ema_momentum", "mixed_precision", "seed",
    ),
    {  # Tab. 1 and 2, and the supplement for CRF
        "voc": [
            ("CoSA, ViT-B/16", "val", "tags given", "76.2"),
            ("CoSA, ViT-B/16", "test", "tags unknown", "75.1"),
            ("CoSA with CRF", "val", "tags given", "76.4"),
            ("CoSA with CRF", "test", "tags unknown", "75.2"),
            ("CAM pseudo-labels", "val", "tags given", "76.4"),
        ],
        "coco": [
            ("CoSA, ViT-B/16", "val", "tags given", "51.0"),
            ("CoSA with CRF", "val", "tags given", "51.1"),
        ],
    },
)  # fmt: skip

MULTISTAGE = Kind(
    MultistageConfig,
    "multistage.md",
    ("cosa-ms", "semantic-segmentation"),
    (
        "crop_size", "batch_size", "gradient_accumulation_steps", "max_steps", "optimizer", "learning_rate",
        "head_lr_multiplier", "confidence_weighting", "mixed_precision", "seed",
    ),
    {  # Tab. 2
        "voc": [
            ("CoSA-MS, DeepLabV3+ on ResNet-101", "val", "not stated", "76.5"),
            ("CoSA-MS, DeepLabV3+ on ResNet-101", "test", "tags unknown", "75.3"),
            ("CoSA-MS, LargeFOV on WideResNet-38", "val", "not stated", "76.6"),
            ("CoSA-MS, LargeFOV on WideResNet-38", "test", "tags unknown", "74.9"),
            ("CoSA-MS, UperNet on Swin-B", "val", "not stated", "81.4"),
            ("CoSA-MS, UperNet on Swin-B", "test", "tags unknown", "78.4"),
        ],
        "coco": [
            ("CoSA-MS, DeepLabV3+ on ResNet-101", "val", "not stated", "50.9"),
            ("CoSA-MS, LargeFOV on WideResNet-38", "val", "not stated", "50.1"),
            ("CoSA-MS, UperNet on Swin-B", "val", "not stated", "53.7"),
        ],
    },
)  # fmt: skip


def kind_of(config: Any, recipe: RunConfig | None = None) -> Kind:
    """By the run that made a model, or by its config where no run is known."""
    if recipe is not None:
        return MULTISTAGE if isinstance(recipe, MultistageConfig) else COSA
    return COSA if isinstance(config, CoSAConfig) else MULTISTAGE


def read_recipe(path: Path) -> RunConfig:
    """The recipe in a YAML file, of whichever kind.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping, an unknown field or a wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}")
    values = read_fields(path)
    return (MULTISTAGE if "network" in values else COSA).recipe.from_mapping(values)


def network_name(config: Any) -> str | None:
    """The name that a recipe has for the network of a config; None of one that has no such name.

    Example:
        >>> network_name(CoSAMSConfig(architecture="unet", encoder="resnet34"))
        'smp/unet/resnet34'
    """
    if isinstance(config, CoSAConfig):
        return f"cosa/{config.backbone}"
    if isinstance(config, CoSAMSConfig):
        return f"{'' if config.architecture == 'largefov' else 'smp/'}{config.architecture}/{config.encoder}"
    if config.model_type == "upernet":
        backbone = config.backbone_config
        if backbone.model_type == "timm_backbone":
            return f"upernet/{backbone.backbone}"
        if all(getattr(backbone, name, None) == value for name, value in SWIN_B_SHAPE.items()):
            return "upernet-swin-b"
    return None


def trained_network(recipe: Any) -> str:
    """The network that a recipe trains, as `network_name` has it, or a model on the Hub or on disk.

    Example:
        >>> trained_network(MultistageConfig(pseudo_labels="labels", network="deeplabv3plus-r101"))
        'smp/deeplabv3plus/resnet101.tv_in1k'
    """
    return (
        f"cosa/{recipe.backbone}" if isinstance(recipe, TrainingConfig) else PAPER.get(recipe.network, recipe.network)
    )


def hub_dataset(recipe: Any) -> str | None:
    """The dataset on the Hub that a recipe trains on; None where it is somebody's files.

    Example:
        >>> hub_dataset(TrainingConfig(dataset="hub", dataset_name="org/pets"))
        'org/pets'
    """
    if recipe and recipe.pseudo_labels:
        name = place_name(recipe.pseudo_labels)
    else:
        name = place_name(recipe.dataset_name) if recipe and recipe.dataset == "hub" else None
    return name if name and "/" in name else None  # without an owner it may be what is left of a path


def check_network(recipe: RunConfig, config: Any, path: Path) -> None:
    """That a recipe can have made the model of a config.

    Raises:
        ValueError: it trains another network.
    """
    trained, name = trained_network(recipe), network_name(config)
    ours = trained.split("/")[0] in ("cosa", "smp", "largefov", "upernet", "upernet-swin-b")
    if ours and trained != name:
        raise ValueError(f"{path} trains {trained}, but the model is {name or config.model_type}")


class Origin(NamedTuple):
    """Where pretrained weights of a model's encoder come from, unless from a file of the user's."""

    weights: str
    hub_id: str | None
    license: str
    language: bool = False  # it learned from images with their texts, which no image-level tag contains


def encoder_origin(config: Any, recipe: Any = None) -> Origin:
    """Of the encoder of a model; of a model of transformers, of all that it started from.

    Example:
        >>> encoder_origin(CoSAMSConfig(architecture="unet", encoder="resnet34.tv_in1k"))
        Origin(weights="timm's weights", hub_id='timm/resnet34.tv_in1k', license='bsd-3-clause', language=False)
    """
    name = network_name(config)
    if name == "upernet-swin-b":
        return Origin(f"`{SWIN_B}`", SWIN_B, f"see {SWIN_B}")
    if name is not None:
        known = timm.get_pretrained_cfg(name.split("/")[-1])
        hub_id, license = (known.hf_hub_id, known.license) if known else (None, None)
        language = "clip" in name or "siglip" in name
        if language and known and known.tag == "openai":
            license = "mit"  # of OpenAI's weights; timm names its own
        return Origin("timm's weights", hub_id, license or "see timm", language)
    source = recipe.network if recipe else "its source"
    return Origin(f"`{source}`", source if "/" in source else None, f"see {source}")


def needs(config: Any) -> list[str]:
    """The packages that a model needs beside transformers.

    Example:
        >>> needs(CoSAMSConfig(architecture="unet", encoder="resnet34"))
        ['timm', 'segmentation_models_pytorch']
    """
    family, *encoder = (network_name(config) or "").split("/")
    return ["timm"] * bool(encoder) + ["segmentation_models_pytorch"] * (family == "smp")
