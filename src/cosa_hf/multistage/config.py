"""What one run of CoSA-MS is."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from cosa_hf.data.options import DataConfig
from cosa_hf.data.views import ViewConfig
from cosa_hf.settings import Settings, setting
from cosa_hf.training.config import RECIPES, OutputConfig, RunConfig, ScheduleConfig, WeightsConfig


@dataclass(kw_only=True)
class PseudoLabelsConfig(Settings):
    """What a network of CoSA-MS learns from."""

    _argument_group_name = "Pseudo-labels"

    pseudo_labels: str | None = setting(
        None, "directory of an export (png or parquet), of a VOC layout with masks, or a dataset on the Hub"
    )
    train_split: str | None = setting(None, "split of it; default: the export's own")
    confidence_weighting: bool = setting(
        False, "weigh pixels by the export's confidence (directory of parquet only); false, as in the paper: all alike"
    )
    repeat_threshold: float = setting(
        0.0,
        "images of classes that a smaller fraction of the images show come more than once an epoch, "
        "sqrt(repeat_threshold / fraction) times; 0: all alike",
        least=0,
        most=1,
    )
    self_training: str | None = setting(
        None, "a trained network (directory): train on its labels of those images, within their tags"
    )
    label_scales: list[float] = setting([1.0, 0.5, 1.5], "self_training: scales that it labels at", above=0)


@dataclass(kw_only=True)
class NetworkConfig(Settings):
    """The network and its optimiser (Tab. 2)."""

    _argument_group_name = "Network (Tab. 2)"

    network: str = setting(
        "deeplabv3plus-r101",
        "deeplabv3plus-r101, largefov-wr38, upernet-swin-b; smp/ARCHITECTURE/TIMM_MODEL, largefov/TIMM_MODEL, "
        "upernet/TIMM_MODEL; or a transformers segmentation model on the Hub or on disk",
    )
    output_stride: int | None = setting(
        None, "stride of a convolutional encoder, by dilation, where the network can; default: 16"
    )
    decoder_channels: int | None = setting(None, "width of the decoder; default: its usual one", least=1)
    freeze_batch_norm: bool = setting(True, "batch norm of the encoder keeps its pretrained statistics")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "sgd: with momentum 0.9")


@dataclass(kw_only=True)
class MultistageConfig(RunConfig, PseudoLabelsConfig, NetworkConfig):
    """One network of CoSA-MS, trained on exported pseudo-labels.

    `dataset`, `data_dir` and `eval_split` say what it is scored on while it trains.

    Raises:
        ValueError: a field of the wrong type or outside its range, or one without effect; the message names it.

    Example:
        >>> MultistageConfig(pseudo_labels="VOC2012-pseudo").confidence_weighting
        False
    """

    parts: ClassVar[tuple[type, ...]] = (
        DataConfig, PseudoLabelsConfig, ViewConfig, NetworkConfig, WeightsConfig, ScheduleConfig, OutputConfig,
    )  # fmt: skip
    directory: ClassVar[Path] = RECIPES / "multistage"
    in_checkpoint: ClassVar[tuple[str, ...]] = (*RunConfig.in_checkpoint, "network", "decoder_channels", "optimizer")
    places: ClassVar[tuple[str, ...]] = (*RunConfig.places, "pseudo_labels", "self_training", "network")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pseudo_labels:
            raise ValueError("pseudo_labels must name an export: `cosa-hf label` writes one")
        for name in ("snapshot_every", "allow_changed_data"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value} has no effect on networks of CoSA-MS: leave it out. Their checkpoints are models "
                    "that load by themselves (checkpoint_every, keep_checkpoints)"
                )


__all__ = ["MultistageConfig"]
