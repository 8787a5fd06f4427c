"""What a run is made of before its first step: accelerator, images, networks, optimiser."""

import dataclasses
import itertools
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import get_polynomial_decay_schedule_with_warmup
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.data import coexistence_among, load_dataset_by_name, stream_hub, without_untagged
from cosa_hf.data.appearance import AppearanceConfig
from cosa_hf.data.dataset import TrainingDataset
from cosa_hf.data.encoded import EncodedDataset
from cosa_hf.data.ground_truth import require_ground_truth
from cosa_hf.data.images import PHOTOS, Reading, UnreadableImageError, from_all_over, read_image, undecoded
from cosa_hf.data.streaming import streaming_loader
from cosa_hf.data.views import Views
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.inference import eval_mode
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective.affinity import AffinityConfig
from cosa_hf.pseudo_labels.load import check_masks, load_pseudo_labels
from cosa_hf.training.config import ModelConfig, RunConfig, TrainingConfig
from cosa_hf.training.features import EncodedImages
from cosa_hf.training.precision import computes_bf16
from cosa_hf.training.telemetry import check_tracker

STANDARDIZED_OVER = 256  # images


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate as a run needs it.

    Raises:
        ImportError: the tracker is not installed.
        ValueError: processes that do not know of each other, a precision or a way of sharing that does not work here.
    """
    check_tracker(config.tracker)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        # The loader hands out whole steps, so its end is not a reason to cut one short.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output_dir,
        # Warm-up leaves the decoder without gradients, and a weight of 0 what only it reaches.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but they do not know of each other and would overwrite each other's "
            "runs: on a machine without GPUs set ACCELERATE_USE_CPU=1 (docs/training.md)"
        )
    if config.mixed_precision == "fp16" and accelerator.scaler is None:
        # Accelerate would go on in fp32 without a word.
        raise ValueError(
            f"mixed_precision fp16 needs an accelerator, this is {accelerator.device.type}: take bf16 or no"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type.value} splits the network among processes, which its average and the "
            "checkpoints here do not follow: use plain processes, with gradient_checkpointing and bf16 to save memory "
            "(docs/training.md)"
        )
    return accelerator


def run_warnings(config: RunConfig, processes: int) -> Iterator[str]:
    """What its user may not have meant: another number of images a step than the schedule's, a slow precision.

    Example:
        >>> list(run_warnings(TrainingConfig(batch_size=2, images_per_step=4, mixed_precision="no"), processes=2))
        []
    """
    images = config.images_taken(processes)
    if images != config.images_per_step:
        yield (
            f"the schedule is made for {config.images_per_step} images a step, this run takes {images}: "
            f"{config.batch_size} (batch_size) x {config.gradient_accumulation_steps} (gradient_accumulation_steps) x "
            f"{processes} (processes). Change one of them, or images_per_step if it is meant"
        )
    if config.mixed_precision == "bf16" and not computes_bf16():
        yield "bf16 is emulated on this device and takes many times as long as fp32: --mixed_precision auto or no"


def training_data(config: TrainingConfig) -> tuple[Dataset | IterableDataset, list[str], dict[str, Any]]:
    """Tagged images, with masks only where the run reads them; the ids of those without a tag, left out; and what an
    export of pseudo-labels says of how they were made.

    A stream leaves them out as it meets them, and the list fills up then.
    """
    if config.streaming:
        return stream_hub(config, config.train_split), [], {}
    if config.pseudo_labels is not None:
        exported = load_pseudo_labels(config.pseudo_labels, config.train_split)
        if not config.resume:
            check_masks(exported.dataset)
        return *without_untagged(exported.dataset), exported.record
    dataset = load_dataset_by_name(
        config.dataset, config.data_dir, config.train_split, masks=config.reads_masks, options=config
    )
    return *without_untagged(dataset), {}


def evaluation_data(config: RunConfig, classes: list[str]) -> Dataset | None:
    """The first `eval_images` of the evaluation split, with masks; None for a run without evaluation.

    Raises:
        FileNotFoundError, ValueError: there is no such split, or no masks to score against.
    """
    if not config.eval_every:
        return None
    options = dataclasses.replace(config, classes=classes)
    try:
        dataset = load_dataset_by_name(config.dataset, config.data_dir, config.eval_split, masks=True, options=options)
        dataset = dataset.select(range(min(config.eval_images, len(dataset))))
        require_ground_truth(dataset)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"{error}. The run would be scored on this every {config.eval_every} steps: to train without, pass "
            "--eval_every 0"
        ) from error
    return dataset


def training_loader(
    config: TrainingConfig,
    dataset: Dataset | IterableDataset,
    untagged: list[str],
    processor: CoSAImageProcessor,
    accelerator: Accelerator,
    encoded: EncodedImages | None = None,
) -> DataLoader:
    """The whole run as one sequence of steps, each a batch here: position in it is all that a resume has to know."""
    scales = (config.scale_min, config.scale_max)
    colors = config.part(AppearanceConfig)
    views = Views(config.crop_size, processor.image_mean, processor.image_std, scales, colors)
    batch_size = config.batch_size * config.gradient_accumulation_steps
    items = config.max_steps * batch_size  # of one process
    reading = Reading.of(processor)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": config.num_workers,
        "pin_memory": torch.cuda.is_available(),
        # Its own, or starting it would draw from the global one, and a resumed run starts it once more.
        "generator": torch.Generator(),
    }
    if isinstance(dataset, IterableDataset):
        loader = streaming_loader(
            dataset, views, items, config.seed, shuffle_buffer=config.shuffle_buffer, untagged=untagged,
            process=(accelerator.process_index, accelerator.num_processes), reading=reading, **options,
        )  # fmt: skip
        # It gives this process its own rows already; Accelerate is left to move them to the device.
        return prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True)
    length, masks = items * accelerator.num_processes, config.reads_masks or config.follows_masks
    if encoded is None:
        stream = TrainingDataset(dataset, views, length, config.seed, masks, reading=reading)
    else:
        stream = EncodedDataset(dataset, encoded.read, encoded.keys, config.input_size, length, config.seed, masks)
    return accelerator.prepare(DataLoader(stream, **options))


def build_student(config: TrainingConfig, names: list[str]) -> CoSAForWeaklySupervisedSegmentation:
    """The online network that the configuration asks for.

    Args:
        config: backbone, its weights, heads and affinity.
        names: the C classes.
    """
    labels = ["background", *names]
    architecture = vars(config.part(ModelConfig)) | vars(config.part(AffinityConfig))
    del architecture["gradient_checkpointing"]
    model_config = CoSAConfig(
        **architecture,
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
        coexistence_classes=coexistence_among(names, config.dataset),
    )
    if config.pretrained:
        model = CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(model_config, config.backbone_weights)
    else:
        model = CoSAForWeaklySupervisedSegmentation(model_config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.frozen_blocks != "0":
        model.backbone.freeze(None if config.frozen_blocks == "all" else int(config.frozen_blocks))
    # Convolutions run up to twice as fast with channels last; a ViT does not mind.
    nn.Module.to(model, memory_format=torch.channels_last)
    return model


def encoded_images(
    config: TrainingConfig,
    model: CoSAForWeaklySupervisedSegmentation,
    processor: CoSAImageProcessor,
    dataset: Dataset | IterableDataset,
    accelerator: Accelerator,
) -> EncodedImages | None:
    """The images as the encoder's frozen part sees them, encoded once; None for a run that encodes in every step.

    Raises:
        ValueError: settings that need the images themselves.
        OSError: no room on the disk.
    """
    chosen = config.cache_features
    if config.frozen_blocks == "0":
        if chosen not in ("auto", "never"):
            raise ValueError(f"cache_features {chosen} needs frozen_blocks, a number or all, got 0")
        return None
    if chosen == "never" or (chosen == "auto" and accelerator.device.type != "cpu"):
        return None
    needs = {
        "streaming": ("false", not config.streaming),
        "label_scales": ("1", config.label_scales == [1.0]),
        "dense_energy_weight": ("0", not config.dense_energy_weight),
    }
    for name, (needed, fits) in needs.items():
        if not fits:
            raise ValueError(
                f"{name} {getattr(config, name)} needs the images in every step, which cached features do not give: "
                f"pass --{name} {needed}, or --cache_features never"
            )
    if model.backbone.frozen_layer is None:
        raise ValueError(
            f"frozen_blocks {config.frozen_blocks} of {config.backbone} cannot be cached: only a plain ViT goes on "
            "from there. Pass --cache_features never, or --frozen_blocks all"
        )
    assert isinstance(dataset, Dataset)
    return EncodedImages.filled(model, processor, dataset, chosen, accelerator, config.num_workers)


def standardize(
    model: CoSAForWeaklySupervisedSegmentation,
    processor: CoSAImageProcessor,
    dataset: Any,
    encoded: EncodedImages | None,
) -> None:
    """Mean and deviation of the features over some of the images, where the model's config asks for them."""
    if not model.config.standardize_features:
        return
    device = next(model.parameters()).device
    maps: Iterable[Any]  # generators: they run below, in eval mode and without gradient
    if encoded is not None:
        found = encoded.sample(STANDARDIZED_OVER)
        maps = (model.backbone.complete({name: each.to(device).float() for name, each in one.items()}) for one in found)
    else:
        if isinstance(dataset, Dataset):
            dataset = dataset.select(from_all_over(len(dataset), STANDARDIZED_OVER))
        images = _readable(itertools.islice(undecoded(dataset), STANDARDIZED_OVER), Reading.of(processor))
        maps = (model.backbone(processor(one, return_tensors="pt")["pixel_values"].to(device)) for one in images)
    with eval_mode(model), torch.no_grad():
        model.set_feature_statistics(maps)


def _readable(rows: Iterable[dict[str, Any]], reading: Reading) -> Iterator[Image.Image]:
    for row in rows:
        with suppress(UnreadableImageError):
            yield read_image(row, reading)


def build_processor(
    config: TrainingConfig, model: CoSAForWeaklySupervisedSegmentation, reading: Reading = PHOTOS
) -> CoSAImageProcessor:
    """The image processor that is saved beside the model."""
    colors: Mapping[str, Sequence[float]] = model.backbone.data_config
    if config.normalization == "imagenet":
        colors = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return CoSAImageProcessor(
        size={"height": config.input_size, "width": config.input_size},
        image_mean=list(colors["mean"]),
        image_std=list(colors["std"]),
        **reading.settings,
    )


def build_optimizer(config: RunConfig, model: CoSAForWeaklySupervisedSegmentation) -> torch.optim.Optimizer:
    """AdamW, as in Sec. 4.1, with a learning rate of its own for the heads."""
    groups: list[dict[str, Any]] = [
        {"params": list(model.backbone_parameters())},
        {"params": list(model.head_parameters()), "lr": config.learning_rate * config.head_lr_multiplier},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        # One pass over the weights rather than a dozen. Under a gradient scaler it would skip steps unseen.
        fused=config.mixed_precision != "fp16",
    )


def build_schedule(config: RunConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """A linear rise of all learning rates over `lr_warmup_steps`, then their polynomial decay to 0 at `max_steps`.

    The decay counts from the end of the rise. Where it is to count from the first step, as in the released code, the
    rates from there on are these times (1 - lr_warmup_steps / max_steps) ** lr_power.
    """
    return get_polynomial_decay_schedule_with_warmup(
        optimizer, config.lr_warmup_steps, config.max_steps, lr_end=0.0, power=config.lr_power
    )


def hardware(accelerator: Accelerator) -> str:
    """What the run runs on, as a model card says it."""
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    else:
        device = f"{platform.machine()} {accelerator.device.type} with {torch.get_num_threads()} threads"
    return f"{accelerator.num_processes} x {device}"
