"""What one run of CoSA-MS is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from cosa_hf.training.config import RECIPES, RunConfig


@dataclass(kw_only=True)
class MultistageConfig(RunConfig):
    """One network of CoSA-MS, trained on exported pseudo-labels.

    `dataset`, `data_dir` and `eval_split` say what it is scored on while it trains.

    Raises:
        ValueError: a field of the wrong type or outside its range; the message names it.

    Example:
        >>> MultistageConfig(pseudo_labels="VOC2012-pseudo").confidence_weighting
        False
    """

    directory: ClassVar[Path] = RECIPES / "multistage"
    positive: ClassVar[tuple[str, ...]] = (*RunConfig.positive, "decoder_channels", "label_scales")
    in_checkpoint: ClassVar[tuple[str, ...]] = (*RunConfig.in_checkpoint, "network", "decoder_channels", "optimizer")
    places: ClassVar[tuple[str, ...]] = (*RunConfig.places, "pseudo_labels", "self_training", "network")

    pseudo_labels: str | None = field(
        default=None,
        metadata={
            "help": "directory of an export (png or parquet), of a VOC layout with masks, or a dataset on the Hub"
        },
    )
    train_split: str | None = field(default=None, metadata={"help": "split of it; default: the export's own"})
    confidence_weighting: bool = field(
        default=False, metadata={"help": "weigh pixels by the export's confidence (parquet only); false, as in the paper: all alike"}
    )
    self_training: str | None = field(
        default=None,
        metadata={"help": "a trained network (directory): train on its labels of those images, within their tags"},
    )
    label_scales: list[float] = field(
        default_factory=lambda: [1.0, 0.5, 1.5], metadata={"help": "self_training: scales that it labels at"}
    )
    network: str = field(
        default="deeplabv3plus-r101",
        metadata={
            "help": "deeplabv3plus-r101, largefov-wr38, upernet-swin-b; smp/ARCHITECTURE/TIMM_MODEL, "
            "largefov/TIMM_MODEL, upernet/TIMM_MODEL; or a transformers segmentation model on the Hub or on disk"
        },
    )
    output_stride: int | None = field(
        default=None,
        metadata={"help": "stride of a convolutional encoder, by dilation, where the network can; default: 16"},
    )
    decoder_channels: int | None = field(default=None, metadata={"help": "width of the decoder; default: its usual one"})
    freeze_batch_norm: bool = field(
        default=True, metadata={"help": "batch norm of the encoder keeps its pretrained statistics"}
    )
    optimizer: Literal["adamw", "sgd"] = field(default="adamw", metadata={"help": "sgd: with momentum 0.9"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pseudo_labels:
            raise ValueError("pseudo_labels must name an export: `cosa-hf label` writes one")
        if self.snapshot_every:
            raise ValueError(
                f"snapshot_every={self.snapshot_every} has no effect on the networks of CoSA-MS: their checkpoints are "
                "models that load by themselves, kept with checkpoint_every and keep_checkpoints"
            )
