"""A network of CoSA-MS as a task of the training loop: cross-entropy against exported masks, and no more."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from cosa_hf.data import COEXISTENCE_CLASSES, class_names
from cosa_hf.data.images import IGNORE_INDEX
from cosa_hf.inference import load_model, segmentation_logits
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.networks import build_network, encoder_of
from cosa_hf.objective.pseudo_labels import PseudoLabels
from cosa_hf.objective.reliability import ProcessMean, perplexity, reliability_weights
from cosa_hf.objective.swapping import cam2seg_loss
from cosa_hf.pseudo_labels.export import export_pseudo_labels
from cosa_hf.pseudo_labels.load import Exported, check_masks, load_pseudo_labels
from cosa_hf.training.loop import train
from cosa_hf.training.task import Task

MODEL = "model"
MOMENTUM = 0.9


def train_multistage(recipe: MultistageConfig) -> Path:
    """Train a network of CoSA-MS on pseudo-labels (Tab. 2); returns the directory of the model.

    Everything else is as in `training.loop.train`, which does the work: what the run leaves, how it resumes, what it
    raises.
    """
    return train(recipe, MultistageTask)


class MultistageTask(Task):
    """One network and the masks it learns from.

    The views are the weak ones (rescale, flip, crop, blur), as is common for such networks.

    Raises:
        FileNotFoundError, ValueError: pseudo-labels or settings that cannot be trained on; the message names them.
    """

    before_update: ClassVar[tuple[str, ...]] = ("running_statistics",)

    def __init__(self, recipe: MultistageConfig, accelerator: Accelerator) -> None:
        super().__init__(recipe, accelerator)
        exported = load_pseudo_labels(str(recipe.pseudo_labels), recipe.train_split)
        if recipe.self_training:
            exported = self._relabelled(exported.dataset)
        self.exported = exported
        self.dataset, self.dropped = exported.dataset, []
        if recipe.confidence_weighting and ("confidence" not in self.dataset.column_names or not exported.record):
            raise ValueError(
                f"confidence_weighting: {recipe.pseudo_labels} does not carry confidence and what it means: export "
                "with --format parquet, and keep its export.json"
            )
        if not recipe.resume:
            check_masks(self.dataset, accelerator.process_index, accelerator.num_processes)
        self.reads = {"masks": True, "confidence": recipe.confidence_weighting}
        names = ["background", *class_names(self.dataset)]
        coexistence = [name for name in COEXISTENCE_CLASSES.get(recipe.dataset, ()) if name in names]
        self.network, self.processor = build_network(recipe, names, coexistence)
        if recipe.batch_size == 1:
            self._try_one_image()
        nn.Module.to(self.network, memory_format=torch.channels_last)
        encoder = {id(parameter) for parameter in encoder_of(self.network).parameters()}
        trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self._backbone = [parameter for parameter in trainable if id(parameter) in encoder]
        self._head = [parameter for parameter in trainable if id(parameter) not in encoder]

    def _relabelled(self, dataset: Dataset) -> Exported:
        """The same images with masks of the network that `self_training` names, within the images' tags."""
        recipe = self.recipe
        model, processor = load_model(recipe.self_training, self.accelerator.device)
        directory = Path(recipe.output_dir) / "pseudo_labels"
        columns = ["image", "labels", "image_id"]
        export_pseudo_labels(
            model, processor, dataset.select_columns(columns), directory, source="seg", format="parquet", split="train",
            scales=recipe.label_scales, batch_size=recipe.batch_size,
        )  # fmt: skip
        return load_pseudo_labels(str(directory))

    def _try_one_image(self) -> None:
        """Batch norm learns nothing from one value a channel, to which some decoders pool a single image."""
        self.train(self.network)
        side = self.recipe.crop_size
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                copy.deepcopy(self.network)(torch.zeros(1, 3, side, side))
            except ValueError as error:
                raise ValueError(
                    f"batch_size must be 2 or more for network {self.recipe.network!r}, got 1: {error}"
                ) from error

    def description(self) -> list[str]:
        recipe = self.recipe
        taught = f"labels of {recipe.self_training}" if recipe.self_training else recipe.pseudo_labels
        return [f"{recipe.network} ({type(self.network).__name__}) on {taught}"]

    def head_parameters(self) -> list[nn.Parameter]:
        return self._head

    def backbone_parameters(self) -> list[nn.Parameter]:
        return self._backbone

    def optimizer(self) -> torch.optim.Optimizer:
        if self.recipe.optimizer == "adamw":
            return super().optimizer()
        return torch.optim.SGD(
            self.parameter_groups(),
            lr=self.recipe.learning_rate,
            momentum=MOMENTUM,
            weight_decay=self.recipe.weight_decay,
        )

    def train(self, network: nn.Module) -> None:
        super().train(network)
        if self.recipe.freeze_batch_norm:
            for _, norm in _batch_norms(encoder_of(self.network)):
                norm.eval()

    def states(self) -> dict[str, Any]:
        return {"weights": Weights(self.network), "running_statistics": RunningStatistics(self.network)}

    def outputs(self, network: nn.Module, part: dict[str, Any]) -> Any:
        return network(part["weak"])

    def losses(
        self, outputs: Any, part: dict[str, Any], targets: PseudoLabels | None, mean: ProcessMean
    ) -> dict[str, Tensor]:
        weights = None
        if self.recipe.confidence_weighting:
            weights = confidence_weights(part["confidence"], part["mask"], self.exported.threshold, mean)
        logits = segmentation_logits(outputs)
        return {"loss": cam2seg_loss(logits, part["mask"], weights, ignore_index=IGNORE_INDEX, mean=mean)}

    @property
    def evaluated(self) -> PreTrainedModel:
        return self.network

    def save(self, directory: Path) -> None:
        self.network.save_pretrained(directory / MODEL)
        self.processor.save_pretrained(directory / MODEL)

    def record(self) -> dict[str, Any]:
        return {"pseudo_labels": self.exported.record or None}

    def recommendation(self) -> tuple[str, str]:
        return MODEL, "the weights after the last step"


class RunningStatistics:
    """Of the batch norm that a network trains: they change with the forward pass, before the weights do.

    Example:
        >>> list(RunningStatistics(nn.Sequential(nn.BatchNorm2d(1))).state_dict())
        ['0.running_mean', '0.running_var', '0.num_batches_tracked']
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}": value
            for path, norm in _batch_norms(self.network)
            if norm.training
            for name, value in norm.named_buffers()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.network.load_state_dict(state, strict=False)


class Weights:
    """All of a network but its `RunningStatistics`.

    Raises:
        ValueError: at loading, weights of another network.

    Example:
        >>> list(Weights(nn.Sequential(nn.BatchNorm2d(1))).state_dict())
        ['0.weight', '0.bias']
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def state_dict(self) -> dict[str, Tensor]:
        running = RunningStatistics(self.network).state_dict()
        return {name: value for name, value in self.network.state_dict().items() if name not in running}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        foreign = self.network.load_state_dict(state, strict=False).unexpected_keys
        if foreign:
            raise ValueError(f"the checkpoint is of another network: it has {', '.join(foreign[:8])}")


def _batch_norms(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield path, module


def confidence_weights(confidence: Tensor, mask: Tensor, threshold: float | None, mean: ProcessMean) -> Tensor:
    """What an export's confidence makes of its pixels: weights of mean 1 over those that are labelled.

    A CAM is sure far from xi, on either side: its weight is the reliability of Eq. 4-5. A segmentation's confidence
    is a probability, and the weight itself.

    Args:
        confidence: (B, H, W) in [0, 1].
        mask: (B, H, W) ids, 255 = ignore.
        threshold: xi of a CAM export; None for a segmentation's.
        mean: over processes.

    Example:
        >>> mask = torch.zeros(1, 1, 2, dtype=torch.long)
        >>> confidence_weights(torch.tensor([[[0.9, 0.3]]]), mask, None, lambda value: value)
        tensor([[[1.5000, 0.5000]]])
    """
    unsure = confidence.clamp_min(1e-3).reciprocal() if threshold is None else perplexity(confidence, threshold)
    return reliability_weights(unsure, mask != IGNORE_INDEX, mean)


__all__ = ["MODEL", "MultistageTask", "confidence_weights", "train_multistage"]
