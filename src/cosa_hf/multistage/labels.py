"""What a network of CoSA-MS learns: exported masks, or new ones, and what each of their pixels weighs."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from cosa_hf.data.dataset import Item
from cosa_hf.inference import Segmenter, segmentation_logits
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.objective.precision import at_least_float32
from cosa_hf.objective.reliability import perplexity
from cosa_hf.objective.upsampled import upsampled_cross_entropy
from cosa_hf.pseudo_labels.export import RECORD, export_pseudo_labels
from cosa_hf.pseudo_labels.load import Exported, check_masks, load_pseudo_labels


def labels_to_learn(config: MultistageConfig, device: torch.device) -> Exported:
    """The pseudo-labels of a run, found and checked; with `self_training`, new ones of the same images.

    Args:
        config: of the run.
        device: where the network that `self_training` names is to label.

    Raises:
        FileNotFoundError, ValueError: pseudo-labels that cannot be trained on; the message names them.
    """
    exported = load_pseudo_labels(str(config.pseudo_labels), config.train_split)
    if config.self_training:
        exported = _relabelled(config, config.self_training, exported.dataset, device)
    if config.confidence_weighting and ("confidence" not in exported.dataset.column_names or not exported.record):
        raise ValueError(
            f"confidence_weighting: {config.pseudo_labels} is not read with confidence and what it means: export "
            f"with --format parquet, and name that directory with its {RECORD}, not a dataset on the Hub"
        )
    if not config.resume:
        check_masks(exported.dataset)
    return exported


def _relabelled(config: MultistageConfig, network: str, dataset: Dataset, device: torch.device) -> Exported:
    """The same images with masks of a network, within the images' tags."""
    segmenter = Segmenter.from_pretrained(
        network, device=device, scales=config.label_scales, flip=True, batch_size=config.batch_size
    )
    directory = Path(config.output_dir) / "pseudo_labels"
    images = dataset.select_columns(["image", "labels", "image_id"])
    export_pseudo_labels(segmenter, images, directory, source="seg", format="parquet", split="train")
    return load_pseudo_labels(str(directory))


def repeated(dataset: Dataset, threshold: float, seed: int) -> Dataset:
    """The images, those of rare classes more than once: repeat-factor sampling (Gupta et al., LVIS, CVPR 2019).

    An image comes max_c sqrt(threshold / f_c) times over its tags c, and at least once, where a fraction f_c of the
    images has tag c. What is left of a whole number is drawn.

    Args:
        dataset: with the column labels.
        threshold: the fraction from which on a class is not rare; 0 leaves the dataset as it is.
        seed: of the draw.

    Example:
        >>> from cosa_hf.data import load_shapes
        >>> len(repeated(load_shapes("train", num_images=8), threshold=1.0, seed=0)) > 8
        True
    """
    if threshold == 0:
        return dataset
    tags = [set(labels) for labels in dataset["labels"][:]]
    images = Counter(itertools.chain.from_iterable(tags))
    rarest = [min((images[tag] for tag in labels), default=len(tags)) for labels in tags]
    factors = (threshold * len(tags) / torch.tensor(rarest, dtype=torch.float64)).sqrt().clamp_min(1)
    draws = torch.rand(len(tags), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times = (factors + draws).floor().long()
    return dataset.select(torch.arange(len(tags)).repeat_interleave(times).tolist())


def confidence_weights(confidence: Tensor, labelled: Tensor, threshold: float | None) -> Tensor:
    """What an export's confidence makes of its pixels: relative weights, 0 where they are not labelled.

    A CAM is sure far from xi, on either side: its weight is the reliability of Eq. 4-5. A segmentation's confidence
    is a probability, and the weight itself.

    Args:
        confidence: (B, H, W) in [0, 1].
        labelled: (B, H, W), bool.
        threshold: xi of a CAM export; None for a segmentation's.

    Example:
        >>> labelled = torch.tensor([[[True, True, False]]])
        >>> confidence_weights(torch.tensor([[[0.9, 0.3, 0.9]]]), labelled, None)
        tensor([[[0.9000, 0.3000, 0.0000]]])
    """
    weights = confidence.clamp_min(1e-3) if threshold is None else perplexity(confidence, threshold).reciprocal()
    return weights * labelled


def collate(items: list[Item], threshold: float | None, ignore_index: int) -> dict[str, Any]:
    """A micro-batch for the Trainer: weak views, and masks with the weight of each pixel, all 1 without confidence."""
    batch: dict[str, Any] = torch.utils.data.default_collate(items)
    mask = batch["mask"]
    labelled = mask != ignore_index
    weights = labelled.float()
    if "confidence" in batch:
        weights = confidence_weights(batch["confidence"], labelled, threshold)
    labels = {"ids": mask.masked_fill(~labelled, 0), "weights": weights}
    return {"pixel_values": batch["weak"], "labels": labels | {k: batch[k] for k in ("image_id", "unreadable")}}


def weighted_loss(outputs: Any, labels: dict[str, Any], num_items_in_batch: Tensor) -> Tensor:
    """This micro-batch's share of the mean cross-entropy over all labelled pixels of the step.

    Args:
        outputs: of the network.
        labels: `ids` and `weights`, (B, H, W).
        num_items_in_batch: the sum of the weights over all micro-batches and processes of the step.
    """
    logits = at_least_float32(segmentation_logits(outputs))
    total = num_items_in_batch.clamp_min(torch.finfo(torch.float32).tiny)
    return upsampled_cross_entropy(logits, labels["ids"], labels["weights"] / total)


__all__ = ["collate", "confidence_weights", "labels_to_learn", "repeated", "weighted_loss"]
