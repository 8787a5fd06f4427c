"""The training loop: Algorithm 1, on Accelerate."""

import dataclasses
import json
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, gather_object, set_seed
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_polynomial_decay_schedule_with_warmup

from cosa_hf.assignment.network import AssignmentNetwork, assign
from cosa_hf.assignment.threshold import DynamicThreshold
from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.data import (
    COEXISTENCE_CLASSES,
    class_names,
    load_dataset_by_name,
    stream_hub,
    streaming_loader,
    without_untagged,
)
from cosa_hf.data.stream import TrainingStream
from cosa_hf.data.tags import list_some
from cosa_hf.data.views import Views
from cosa_hf.evaluation.maps import label_names
from cosa_hf.evaluation.panels import save_panels
from cosa_hf.evaluation.protocols import evaluate_model
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective.overall import CoSAObjective
from cosa_hf.objective.pseudo_labels import PseudoLabels
from cosa_hf.objective.reliability import ProcessMean
from cosa_hf.objective.supervised import supervised_loss
from cosa_hf.training.accumulation import counting, mean_over_parts, parts_of
from cosa_hf.training.checkpoints import Checkpoints, Progress, save_networks, snapshot_directory
from cosa_hf.training.recipe import Recipe
from cosa_hf.training.telemetry import Telemetry, mixture_values
from cosa_hf.training.watch import Watch


def train(recipe: Recipe) -> Path:
    """Train CoSA from tags as the recipe says; returns the directory of the recommended model.

    Leaves in `recipe.output_dir`: `recipe.yaml`, `log.jsonl`, `run.json` (what was dropped, what is recommended and
    why, on what hardware and how long it ran), the models `online` and `assignment`, each with its processor and code,
    and checkpoints, snapshots and panels if asked for (docs/training.md). The run is the same on any number of
    processes that share a step's images among them, unless it streams its data.

    Raises:
        ValueError: data or settings that cannot be trained on; the message names them.
        FloatingPointError: the loss is no longer finite; the message names the images and the parts.
        OSError: a checkpoint or the log cannot be written, as on a full disk.
        SystemExit: after SIGTERM, once a checkpoint is saved.
    """
    output_dir = Path(recipe.output_dir)
    accelerator = _accelerator(recipe)
    set_seed(recipe.seed)
    dataset, dropped = _training_data(recipe)
    online = _build_model(recipe, dataset)
    # Convolutions run up to twice as fast with channels last; a ViT does not mind.
    nn.Module.to(online, memory_format=torch.channels_last)
    processor = CoSAImageProcessor(
        size={"height": recipe.input_size, "width": recipe.input_size},
        image_mean=list(online.backbone.data_config["mean"]),
        image_std=list(online.backbone.data_config["std"]),
    )
    images_per_step = recipe.batch_size * recipe.gradient_accumulation_steps * accelerator.num_processes
    _announce(accelerator, recipe, images_per_step, online, dataset, dropped)

    assignment = AssignmentNetwork(online, recipe.ema_momentum).to(accelerator.device)
    thresholds = [
        DynamicThreshold(recipe.threshold, recipe.threshold_decay, recipe.threshold_queue, recipe.threshold_covariance)
        for _ in ("M'", "M†'")
    ]
    objective = _objective(recipe)
    heads: dict[str, Any] = {
        "params": list(online.head_parameters()),
        "lr": recipe.learning_rate * recipe.head_lr_multiplier,
    }
    optimizer = torch.optim.AdamW(
        [{"params": list(online.backbone_parameters())}, heads],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        # One pass over the weights rather than a dozen. Under a gradient scaler it would skip steps unseen.
        fused=recipe.mixed_precision != "fp16",
    )
    schedule = get_polynomial_decay_schedule_with_warmup(
        optimizer, recipe.lr_warmup_steps, recipe.max_steps, lr_end=0.0, power=recipe.lr_power
    )
    loader = _loader(recipe, dataset, dropped, processor, accelerator)
    model, optimizer = accelerator.prepare(online, optimizer)
    progress = Progress(images_per_step)
    telemetry = Telemetry(accelerator, recipe, images_per_step)
    states: dict[str, Any] = {
        "online": online,
        "assignment": assignment,
        "optimizer": optimizer,
        "schedule": schedule,
        "threshold": thresholds[0],
        "aux_threshold": thresholds[1],
        "progress": progress,
        "telemetry": telemetry,
    }
    if accelerator.scaler is not None:
        states["scaler"] = accelerator.scaler
    checkpoints = Checkpoints(
        accelerator, output_dir, recipe.keep_checkpoints, states, before_update=("threshold", "aux_threshold")
    )
    if recipe.resume:
        checkpoint = checkpoints.load()
        loader = accelerator.skip_first_batches(loader, progress.step)
        accelerator.print(f"resumed at step {progress.step} from {checkpoint}")
    elif earlier := checkpoints.all():
        raise ValueError(f"{earlier[-1]} is of an earlier run: --resume it, remove it, or choose another output_dir")
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        recipe.to_yaml(output_dir / "recipe.yaml")
    telemetry.begin(progress.step)

    def mean(value: Tensor) -> Tensor:
        return accelerator.reduce(value, "mean")

    def losses_of(
        outputs: Any, part: dict[str, Any], targets: PseudoLabels | None, mean: ProcessMean, objective=objective
    ) -> dict[str, Tensor]:
        if recipe.supervision == "masks":
            return supervised_loss(outputs, part["labels"], part["mask"], mean=mean)
        colors = part["strong"] * color_steps if objective.dense_energy_weight else None
        return objective(outputs, part["labels"], part["valid"], targets, mean, colors, online.classifier.weight)

    def vitals() -> dict[str, float]:
        mixtures = mixture_values(thresholds[0]) | mixture_values(thresholds[1], "aux_")
        return mixtures | {"an_on_distance": assignment.distance(online), "lr": schedule.get_last_lr()[0]}

    # Of a normalised image to 0..255, up to an offset: the dense energy compares colours.
    color_steps = 255 * torch.tensor(processor.image_std, device=accelerator.device).view(3, 1, 1)
    labeller = assignment.network if recipe.swapping_assignments else online
    model.train()
    with Watch(accelerator, checkpoints, progress, online) as watch:
        for batch in watch.steps(loader):
            pseudo_labels = None
            if recipe.supervision == "tags" and progress.step >= recipe.warmup_steps:
                with accelerator.autocast():
                    pseudo_labels = assign(
                        labeller,
                        batch["weak"],
                        batch["labels"],
                        batch["valid"],
                        thresholds,
                        scales=recipe.label_scales,
                        temperature=recipe.spl_temperature,
                        dynamic=recipe.dynamic_threshold,
                        mean=mean,
                        cam_fusion=recipe.cam_fusion,
                        guidance=recipe.guidance,
                        masks=batch.get("mask"),
                        batch_size=recipe.batch_size,
                    )
            parts = list(parts_of(batch, pseudo_labels, recipe.batch_size))
            step_mean = mean_over_parts(parts, partial(losses_of, objective=counting(objective)), mean)
            losses = []
            for part, targets in parts:
                with accelerator.accumulate(model):
                    outputs = model(part["strong"], output_hidden_states=recipe.detach != "none")
                    losses.append(losses_of(outputs, part, targets, step_mean))
                    accelerator.backward(losses[-1]["loss"])
            watch.require_finite(losses, batch["image_id"])
            if recipe.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:  # as fp16 does where its gradients overflow
                schedule.step()
            optimizer.zero_grad()
            assignment.update(online)

            progress.step += 1
            progress.unreadable.update(filter(None, batch["unreadable"]))
            telemetry.add(losses, pseudo_labels, batch["valid"])
            telemetry.step(progress.step, vitals)
            if recipe.eval_every and progress.step % recipe.eval_every == 0:
                scores = _evaluate(accelerator, recipe, progress.step, assignment.network, processor)
                telemetry.write(progress.step, scores)
            if recipe.checkpoint_every and progress.step % recipe.checkpoint_every == 0:
                checkpoints.save(progress.step)
            if recipe.snapshot_every and progress.step % recipe.snapshot_every == 0 and accelerator.is_main_process:
                save_networks(snapshot_directory(output_dir, progress.step), online, assignment.network, processor)

    name, reason = recommendation(recipe)
    dropped, unreadable = (sorted(set(gather_object(list(names)))) for names in (dropped, progress.unreadable))
    if accelerator.is_main_process:
        save_networks(output_dir, online, assignment.network, processor)
        summary = {
            "recommended": name,
            "reason": reason,
            "images": len(dataset) if isinstance(dataset, Dataset) else None,
            "untagged_dropped": dropped,
            "unreadable_replaced": unreadable,
            "hardware": _hardware(accelerator),
            "seconds": round(progress.seconds),
        }
        (output_dir / "run.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    if unreadable:
        accelerator.print(f"{len(unreadable)} images could not be read, others took their places (all in run.json):")
        accelerator.print("\n".join(unreadable[:10]))
    accelerator.print(f"models in {output_dir}/online and {output_dir}/assignment; recommended: {name} ({reason})")
    telemetry.close()  # at the very end: Accelerate takes the processes' connection down with the trackers
    return output_dir / name


def recommendation(recipe: Recipe) -> tuple[str, str]:
    """Which of the two networks to use, and why: decided by the schedule alone, so that no score chooses it.

    Example:
        >>> recommendation(Recipe())[0]
        'assignment'
    """
    window = 1 / (1 - recipe.ema_momentum)
    if recipe.max_steps >= 3 * window:
        return (
            "assignment",
            f"the average over about {window:.0f} steps is steadier than the last step's weights",
        )
    return "online", f"{recipe.max_steps} steps are too few for an average over about {window:.0f}"


def _accelerator(recipe: Recipe) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        # The loader hands out whole steps, so its end is no reason to cut one short.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if recipe.tracker == "none" else recipe.tracker,
        project_dir=recipe.output_dir,
        # Warm-up leaves the decoder without gradients, and a weight of 0 what only it reaches.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but they do not know of each other and would overwrite each other's "
            "runs: on a machine without GPUs set ACCELERATE_USE_CPU=1 (docs/training.md)"
        )
    if recipe.mixed_precision == "fp16" and accelerator.scaler is None:
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


def _training_data(recipe: Recipe) -> tuple[Dataset | IterableDataset, list[str]]:
    """Tagged images, with masks only where the recipe reads them; and the ids of those without a tag, left out.

    A stream leaves them out as it meets them, and the list fills up then.
    """
    if recipe.streaming:
        return stream_hub(recipe, recipe.train_split), []
    dataset = load_dataset_by_name(
        recipe.dataset, recipe.data_dir, recipe.train_split, masks=recipe.reads_masks, options=recipe
    )
    return without_untagged(dataset)


def _build_model(recipe: Recipe, dataset: Dataset | IterableDataset) -> CoSAForWeaklySupervisedSegmentation:
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


def _objective(recipe: Recipe) -> CoSAObjective:
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


def _loader(
    recipe: Recipe,
    dataset: Dataset | IterableDataset,
    dropped: list[str],
    processor: CoSAImageProcessor,
    accelerator: Accelerator,
) -> DataLoader:
    """The whole run as one sequence of steps, each a batch here: position in it is all that a resume has to know."""
    views = Views(
        recipe.crop_size,
        processor.image_mean,
        processor.image_std,
        scale_range=(recipe.scale_min, recipe.scale_max),
    )
    batch_size = recipe.batch_size * recipe.gradient_accumulation_steps
    items = recipe.max_steps * batch_size  # of one process
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": recipe.num_workers,
        "pin_memory": torch.cuda.is_available(),
        # Its own, or starting it would draw from the global one, and a resumed run starts it once more.
        "generator": torch.Generator(),
    }
    if isinstance(dataset, IterableDataset):
        process = (accelerator.process_index, accelerator.num_processes)
        loader = streaming_loader(
            dataset, views, items, recipe.seed, shuffle_buffer=recipe.shuffle_buffer, untagged=dropped, process=process,
            **options,
        )  # fmt: skip
        # It gives this process its own rows already; Accelerate is left to move them to the device.
        return prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True)
    stream = TrainingStream(
        dataset,
        views,
        length=items * accelerator.num_processes,
        seed=recipe.seed,
        masks=recipe.reads_masks,
    )
    return accelerator.prepare(DataLoader(stream, **options))


def _evaluate(
    accelerator: Accelerator,
    recipe: Recipe,
    step: int,
    network: CoSAForWeaklySupervisedSegmentation,
    processor: CoSAImageProcessor,
) -> dict[str, float]:
    """mIoU on the first `eval_images` of the evaluation split, at one scale: a glance, not the protocol; and panels."""
    options = dataclasses.replace(recipe, classes=label_names(network.config)[1:])
    dataset = load_dataset_by_name(recipe.dataset, recipe.data_dir, recipe.eval_split, masks=True, options=options)
    dataset = dataset.select(range(min(recipe.eval_images, len(dataset))))
    glance: dict[str, Any] = {"scales": (1.0,), "flip": False}
    report = evaluate_model(network, processor, dataset, **glance, progress=False, accelerator=accelerator)
    if accelerator.is_main_process:
        shown = dataset.select(range(min(recipe.eval_panels, len(dataset))))
        save_panels(network, processor, shown, Path(recipe.output_dir) / "panels" / f"step-{step:07d}", **glance)
    return {f"eval/{part}": report[part]["miou"] for part in ("seg", "seg_tags", "cam", "cam_aux")}


def _hardware(accelerator: Accelerator) -> str:
    """What the run ran on, as a model card says it."""
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    else:
        device = f"{platform.machine()} {accelerator.device.type} with {torch.get_num_threads()} threads"
    return f"{accelerator.num_processes} x {device}"


def _announce(
    accelerator: Accelerator,
    recipe: Recipe,
    images_per_step: int,
    model: Any,
    dataset: Dataset | IterableDataset,
    dropped: list[str],
) -> None:
    """Say what is about to be trained, and what about it the user may not have meant."""
    names = class_names(dataset)
    amount = f"{len(dataset)} images" if isinstance(dataset, Dataset) else "a stream of images"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    accelerator.print(
        f"{recipe.backbone}, {millions:.1f} M parameters; {amount}, {len(names)} classes ({', '.join(names)}); "
        f"{recipe.max_steps} steps of {images_per_step} images, the first {recipe.warmup_steps} on tags alone"
    )
    if images_per_step != recipe.images_per_step:
        accelerator.print(
            f"the schedule is made for {recipe.images_per_step} images a step, this run takes {images_per_step}: "
            f"{recipe.batch_size} (batch_size) x {recipe.gradient_accumulation_steps} (gradient_accumulation_steps) x "
            f"{accelerator.num_processes} (processes). Change one of them, or images_per_step if it is meant"
        )
    if dropped:
        accelerator.print(f"left out {len(dropped)} images without a tag: {list_some(dropped)} (all in run.json)")
    if recipe.supervision == "tags" and recipe.reads_masks:
        accelerator.print(
            "ORACLE: guidance gt reads the true masks of the training images (Fig. 1). This run is no weakly "
            "supervised one; do not report it as such"
        )
    if recipe.max_steps < 3 / (1 - recipe.ema_momentum) and recipe.supervision == "tags":
        accelerator.print(
            f"ema_momentum {recipe.ema_momentum} averages over about {1 / (1 - recipe.ema_momentum):.0f} steps, too "
            f"many for a run of {recipe.max_steps}: the assignment network will hardly leave its start. Try "
            f"{max(0.0, 1 - 10 / recipe.max_steps):.3f}"
        )
