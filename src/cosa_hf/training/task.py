"""What the loop trains: all that CoSA and the networks of CoSA-MS do not have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from cosa_hf.objective.pseudo_labels import PseudoLabels
from cosa_hf.objective.reliability import ProcessMean
from cosa_hf.training.config import RunConfig


class Task(ABC):
    """One kind of run. Made from recipe and accelerator; the loop (`training.loop.train`) does the rest.

    Attributes:
        network: what the optimiser changes, in the memory format it is to be trained in.
        processor: what is saved beside it.
        dataset: the images to train on.
        dropped: ids of images that were left out of it.
        reads: what of a row is opened beside image and tags, as arguments of `TrainingDataset`.
        before_update: names of those `states` that a step changes before it changes the weights.
        shown: log entries in the progress bar.
    """

    network: PreTrainedModel
    processor: Any
    dataset: Dataset | IterableDataset
    dropped: list[str]
    reads: Mapping[str, bool]
    before_update: ClassVar[tuple[str, ...]] = ()
    shown: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, recipe: RunConfig, accelerator: Accelerator) -> None:
        self.recipe: Any = recipe
        self.accelerator = accelerator

    @abstractmethod
    def description(self) -> list[str]:
        """What is about to be trained, and what about it the user may not have meant, a line each."""

    @abstractmethod
    def head_parameters(self) -> list[nn.Parameter]:
        """What learns `head_lr_multiplier` times as fast."""

    @abstractmethod
    def backbone_parameters(self) -> list[nn.Parameter]:
        """What learns at `learning_rate`."""

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW, as in Sec. 4.1, with a rate of its own for the heads."""
        return torch.optim.AdamW(
            self.parameter_groups(),
            lr=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
            # One pass over the weights rather than a dozen. Under a gradient scaler it would skip steps unseen.
            fused=self.recipe.mixed_precision != "fp16",
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For an optimiser whose own rate is `learning_rate`."""
        rate = self.recipe.learning_rate * self.recipe.head_lr_multiplier
        return [{"params": self.backbone_parameters()}, {"params": self.head_parameters(), "lr": rate}]

    def train(self, network: nn.Module) -> None:
        """Put the network as Accelerate wrapped it into the mode that it is trained in."""
        network.train()

    @abstractmethod
    def states(self) -> dict[str, Any]:
        """What a checkpoint has to bring back, by name: networks, and whatever goes on from step to step."""

    def targets(self, batch: dict[str, Any], step: int, mean: ProcessMean) -> PseudoLabels | None:
        """What the batch of an optimiser step is taught beyond what is in it."""
        return None

    def outputs(self, network: nn.Module, part: dict[str, Any]) -> Any:
        """A forward pass of the network as Accelerate wrapped it."""
        return network(part["strong"])

    @abstractmethod
    def losses(
        self, outputs: Any, part: dict[str, Any], targets: PseudoLabels | None, mean: ProcessMean
    ) -> dict[str, Tensor]:
        """Scalars by name; `loss` is what to differentiate."""

    def rehearse(
        self, outputs: Any, part: dict[str, Any], targets: PseudoLabels | None, mean: ProcessMean
    ) -> dict[str, Tensor]:
        """The losses as far as they hand anything to `mean`, see `mean_over_parts`."""
        return self.losses(outputs, part, targets, mean)

    def update(self) -> None:
        """After every optimiser step."""
        return

    def shares(self, targets: PseudoLabels | None, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sums over tokens, and how many `tokens` there were: logged as their quotients."""
        return {}

    def vitals(self) -> dict[str, float]:
        """What is logged as it is at a step."""
        return {}

    @property
    @abstractmethod
    def evaluated(self) -> PreTrainedModel:
        """The network whose scores are watched."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write models that load by themselves below `directory`."""

    def record(self) -> dict[str, Any]:
        """What `run.json` is to tell beyond what it tells of every run."""
        return {}

    @abstractmethod
    def recommendation(self) -> tuple[str, str]:
        """Which of the saved models to use, and why."""
