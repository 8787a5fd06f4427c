"""CoSA as a task of the training loop: lines 2-17 of Algorithm 1."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from cosa_hf.assignment.network import AssignmentNetwork, assign
from cosa_hf.assignment.threshold import DynamicThreshold
from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.data import COEXISTENCE_CLASSES, class_names, load_dataset_by_name, stream_hub, without_untagged
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective.overall import CoSAObjective
from cosa_hf.objective.pseudo_labels import PseudoLabels
from cosa_hf.objective.reliability import ProcessMean
from cosa_hf.objective.supervised import supervised_loss
from cosa_hf.training.accumulation import counting
from cosa_hf.training.checkpoints import save_networks
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.task import Task
from cosa_hf.training.telemetry import label_statistics, mixture_values


class CoSATask(Task):
    """Online and assignment network, their thresholds and the objective of one run.

    Raises:
        ValueError: data or settings that cannot be trained on; the message names them.
    """

    network: CoSAForWeaklySupervisedSegmentation
    before_update: ClassVar[tuple[str, ...]] = ("threshold", "aux_threshold")
    shown: ClassVar[tuple[str, ...]] = ("loss", "cls", "xi")

    def __init__(self, recipe: TrainingConfig, accelerator: Accelerator) -> None:
        super().__init__(recipe, accelerator)
        self.dataset, self.dropped = _training_data(recipe)
        self.reads = {"masks": recipe.reads_masks}
        self.network = build_model(recipe, self.dataset)
        # Convolutions run up to twice as fast with channels last; a ViT does not mind.
        nn.Module.to(self.network, memory_format=torch.channels_last)
        data_config = self.network.backbone.data_config
        self.processor = CoSAImageProcessor(
            size={"height": recipe.input_size, "width": recipe.input_size},
            image_mean=list(data_config["mean"]),
            image_std=list(data_config["std"]),
        )
        self.assignment = AssignmentNetwork(self.network, recipe.ema_momentum).to(accelerator.device)
        self.labeller = self.assignment.network if recipe.swapping_assignments else self.network
        self.thresholds = [
            DynamicThreshold(
                recipe.threshold, recipe.threshold_decay, recipe.threshold_queue, recipe.threshold_covariance
            )
            for _ in ("M'", "M†'")
        ]
        self.objective = _objective(recipe)
        # Of a normalised image to 0..255, up to an offset: the dense energy compares colours.
        self.color_steps = 255 * torch.tensor(self.processor.image_std, device=accelerator.device).view(3, 1, 1)

    def description(self) -> list[str]:
        recipe = self.recipe
        lines = [f"CoSA on {recipe.backbone}, the first {recipe.warmup_steps} steps on tags alone"]
        if recipe.supervision == "tags" and recipe.reads_masks:
            lines.append(
                "ORACLE: guidance gt reads the true masks of the training images (Fig. 1). This run is no weakly "
                "supervised one; do not report it as such"
            )
        if recipe.max_steps < 3 / (1 - recipe.ema_momentum) and recipe.supervision == "tags":
            lines.append(
                f"ema_momentum {recipe.ema_momentum} averages over about {1 / (1 - recipe.ema_momentum):.0f} steps, "
                f"too many for a run of {recipe.max_steps}: the assignment network will hardly leave its start. Try "
                f"{max(0.0, 1 - 10 / recipe.max_steps):.3f}"
            )
        return lines

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.network.head_parameters())

    def backbone_parameters(self) -> list[nn.Parameter]:
        return list(self.network.backbone_parameters())

    def states(self) -> dict[str, Any]:
        return {
            "online": self.network,
            "assignment": self.assignment,
            "threshold": self.thresholds[0],
            "aux_threshold": self.thresholds[1],
        }

    def targets(self, batch: dict[str, Any], step: int, mean: ProcessMean) -> PseudoLabels | None:
        """The assignment network's pseudo-labels (lines 7-10); none during warm-up."""
        recipe = self.recipe
        if recipe.supervision == "masks" or step < recipe.warmup_steps:
            return None
        autocast = self.accelerator.autocast()
        if recipe.bf16_assignment:
            autocast = torch.autocast(self.accelerator.device.type, torch.bfloat16)
        with autocast:
            return assign(
                self.labeller,
                batch["weak"],
                batch["labels"],
                batch["valid"],
                self.thresholds,
                scales=recipe.label_scales,
                temperature=recipe.spl_temperature,
                dynamic=recipe.dynamic_threshold,
                mean=mean,
                cam_fusion=recipe.cam_fusion,
                guidance=recipe.guidance,
                masks=batch.get("mask"),
                batch_size=recipe.batch_size,
            )

    def outputs(self, network: nn.Module, part: dict[str, Any]) -> Any:
        return network(part["strong"], output_hidden_states=self.recipe.detach != "none")

    def losses(
        self, outputs: Any, part: dict[str, Any], targets: PseudoLabels | None, mean: ProcessMean
    ) -> dict[str, Tensor]:
        return self._losses(self.objective, outputs, part, targets, mean)

    def rehearse(
        self, outputs: Any, part: dict[str, Any], targets: PseudoLabels | None, mean: ProcessMean
    ) -> dict[str, Tensor]:
        return self._losses(counting(self.objective), outputs, part, targets, mean)

    def _losses(
        self,
        objective: CoSAObjective,
        outputs: Any,
        part: dict[str, Any],
        targets: PseudoLabels | None,
        mean: ProcessMean,
    ) -> dict[str, Tensor]:
        if self.recipe.supervision == "masks":
            return supervised_loss(outputs, part["labels"], part["mask"], mean=mean)
        colors = part["strong"] * self.color_steps if objective.dense_energy_weight else None
        classifier = self.network.classifier.weight
        return objective(outputs, part["labels"], part["valid"], targets, mean, colors, classifier)

    def update(self) -> None:
        self.assignment.update(self.network)

    def shares(self, targets: PseudoLabels | None, batch: dict[str, Any]) -> dict[str, Tensor]:
        if targets is None:
            return {}
        return label_statistics(targets, batch["valid"], self.recipe.perplexity_alpha, self.recipe.perplexity_beta)

    def vitals(self) -> dict[str, float]:
        mixtures = mixture_values(self.thresholds[0]) | mixture_values(self.thresholds[1], "aux_")
        return mixtures | {"an_on_distance": self.assignment.distance(self.network)}

    @property
    def evaluated(self) -> CoSAForWeaklySupervisedSegmentation:
        return self.assignment.network

    def save(self, directory: Path) -> None:
        save_networks(directory, self.network, self.assignment.network, self.processor)

    def recommendation(self) -> tuple[str, str]:
        return recommendation(self.recipe)


def recommendation(recipe: TrainingConfig) -> tuple[str, str]:
    """Which of the two networks to use, and why: decided by the schedule alone, so that no score chooses it.

    Example:
        >>> recommendation(TrainingConfig())[0]
        'assignment'
    """
    window = 1 / (1 - recipe.ema_momentum)
    if recipe.max_steps >= 3 * window:
        return (
            "assignment",
            f"the average over about {window:.0f} steps is steadier than the last step's weights",
        )
    return "online", f"{recipe.max_steps} steps are too few for an average over about {window:.0f}"


def _training_data(recipe: TrainingConfig) -> tuple[Dataset | IterableDataset, list[str]]:
    """Tagged images, with masks only where the recipe reads them; and the ids of those without a tag, left out.

    A stream leaves them out as it meets them, and the list fills up then.
    """
    if recipe.streaming:
        return stream_hub(recipe, recipe.train_split), []
    dataset = load_dataset_by_name(
        recipe.dataset, recipe.data_dir, recipe.train_split, masks=recipe.reads_masks, options=recipe
    )
    return without_untagged(dataset)


def build_model(recipe: TrainingConfig, dataset: Dataset | IterableDataset) -> CoSAForWeaklySupervisedSegmentation:
    """The network that the recipe asks for, with the classes of the dataset."""
    names = ["background", *class_names(dataset)]
    config = CoSAConfig(
        backbone=recipe.backbone,
        aux_layer=recipe.aux_layer,
        output_stride=recipe.output_stride,
        decoder_channels=recipe.decoder_channels,
        decoder_dilation=recipe.decoder_dilation,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        coexistence_classes=list(COEXISTENCE_CLASSES.get(recipe.dataset, ())),
    )
    if recipe.pretrained:
        model = CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(config, recipe.backbone_weights)
    else:
        model = CoSAForWeaklySupervisedSegmentation(config)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _objective(recipe: TrainingConfig) -> CoSAObjective:
    return CoSAObjective(
        cam2seg_weight=recipe.cam2seg_weight,
        aux_cam2seg_weight=recipe.aux_cam2seg_weight,
        seg2cam_weight=recipe.seg2cam_weight if recipe.guidance != "none" else 0.0,
        separation_weight=recipe.separation_weight,
        reliability_weighting=recipe.reliability_weighting,
        alpha=recipe.perplexity_alpha,
        beta=recipe.perplexity_beta,
        epsilon=recipe.perplexity_epsilon,
        separation_temperature=recipe.separation_temperature,
        separation_scope=recipe.separation_scope,
        detach=recipe.detach,
        supervision_stride=recipe.supervision_stride,
        background_threshold=recipe.background_threshold,
        balanced=recipe.balanced,
        relu_cams=recipe.relu_cams,
        dense_energy_weight=recipe.dense_energy_weight,
        dense_energy_scale=recipe.dense_energy_scale,
    )
