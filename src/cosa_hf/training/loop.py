"""The training loop: Algorithm 1, on Accelerate."""

import json
import platform
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_polynomial_decay_schedule_with_warmup

from cosa_hf.assignment.network import AssignmentNetwork, assign
from cosa_hf.assignment.threshold import DynamicThreshold
from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.data import COEXISTENCE_CLASSES, class_names, load_dataset_by_name, without_untagged
from cosa_hf.data.stream import TrainingStream
from cosa_hf.data.views import Views
from cosa_hf.evaluation.protocols import evaluate_model
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective.overall import CoSAObjective
from cosa_hf.objective.supervised import supervised_loss
from cosa_hf.training.checkpoints import Progress, newest_checkpoint, save_checkpoint
from cosa_hf.training.recipe import Recipe
from cosa_hf.training.telemetry import Telemetry


def train(recipe: Recipe) -> Path:
    """Train CoSA from tags as the recipe says; returns the directory of the recommended model.

    Leaves in `recipe.output_dir`: `recipe.yaml`, `log.jsonl`, `run.json` (what was dropped, what is recommended and
    why, on what hardware and how long it ran), the models `online` and `assignment`, each with its processor and code,
    and checkpoints if asked for.

    Raises:
        ValueError: data or settings that cannot be trained on; the message names them.
        FloatingPointError: the loss is no longer finite; the message names the images and the parts.
    """
    output_dir = Path(recipe.output_dir)
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        log_with=None if recipe.tracker == "none" else recipe.tracker,
        project_dir=str(output_dir),
    )
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
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        recipe.to_yaml(output_dir / "recipe.yaml")
    _announce(accelerator, recipe, online, dataset, dropped)
    accelerator.init_trackers("cosa_hf", config={name: str(value) for name, value in vars(recipe).items()})

    assignment = AssignmentNetwork(online, recipe.ema_momentum).to(accelerator.device)
    thresholds = [
        DynamicThreshold(recipe.threshold, recipe.threshold_decay, recipe.threshold_queue) for _ in ("M'", "M†'")
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
    )
    schedule = get_polynomial_decay_schedule_with_warmup(
        optimizer, recipe.lr_warmup_steps, recipe.max_steps, lr_end=0.0, power=recipe.lr_power
    )
    loader = _loader(recipe, dataset, processor, accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(online, optimizer, loader)
    progress = Progress()
    accelerator.register_for_checkpointing(assignment, *thresholds, schedule, progress)
    if recipe.resume:
        accelerator.load_state(str(newest_checkpoint(output_dir)))
        loader = accelerator.skip_first_batches(loader, progress.step * recipe.gradient_accumulation_steps)
        accelerator.print(f"resumed at step {progress.step}")

    def mean(value: Tensor) -> Tensor:
        return accelerator.reduce(value, "mean")

    telemetry = Telemetry(accelerator, recipe, progress.step)
    labeller = assignment.network if recipe.swapping_assignments else online
    model.train()
    for batch in loader:
        labels, valid = batch["labels"], batch["valid"]
        with accelerator.accumulate(model):
            if recipe.supervision == "masks":
                losses = supervised_loss(model(batch["strong"]), labels, batch["mask"])
            else:
                pseudo_labels = None
                if progress.step >= recipe.warmup_steps:
                    with accelerator.autocast():
                        pseudo_labels = assign(
                            labeller,
                            batch["weak"],
                            labels,
                            valid,
                            thresholds,
                            scales=recipe.label_scales,
                            temperature=recipe.spl_temperature,
                            dynamic=recipe.dynamic_threshold,
                            mean=mean,
                        )
                losses = objective(model(batch["strong"]), labels, valid, pseudo_labels, mean)
            _require_finite(losses, batch["image_id"], progress.step)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients and recipe.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            if accelerator.sync_gradients:
                schedule.step()
            optimizer.zero_grad()
        telemetry.add(losses)
        if not accelerator.sync_gradients:
            continue
        assignment.update(online)
        progress.step += 1
        step = progress.step
        xi, aux_xi = (threshold.value for threshold in thresholds)
        telemetry.step(step, xi=xi, aux_xi=aux_xi, lr=schedule.get_last_lr()[0])
        if recipe.eval_every and step % recipe.eval_every == 0 and accelerator.is_main_process:
            telemetry.write(step, _scores(recipe, assignment.network, processor))
        if recipe.checkpoint_every and step % recipe.checkpoint_every == 0:
            save_checkpoint(accelerator, output_dir, step)
    telemetry.close()

    name, reason = recommendation(recipe)
    if accelerator.is_main_process:
        for directory, network in (("online", online), ("assignment", assignment.network)):
            network.save_pretrained(output_dir / directory)
            processor.save_pretrained(output_dir / directory)
        summary = {
            "recommended": name,
            "reason": reason,
            "images": len(dataset),
            "untagged_dropped": dropped,
            "hardware": _hardware(accelerator),
            "seconds": round(progress.seconds),
        }
        (output_dir / "run.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.print(f"models in {output_dir}/online and {output_dir}/assignment; recommended: {name} ({reason})")
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


def _training_data(recipe: Recipe) -> tuple[Dataset, list[str]]:
    """Tagged images, with masks only for the supervised bound; and the ids of those without a tag, left out."""
    dataset = load_dataset_by_name(
        recipe.dataset, recipe.data_dir, recipe.train_split, masks=recipe.supervision == "masks"
    )
    dataset, dropped = without_untagged(dataset)
    if not len(dataset):
        raise ValueError(f"split {recipe.train_split} of {recipe.dataset}: none of {len(dropped)} images has a tag")
    return dataset, dropped


def _build_model(recipe: Recipe, dataset: Dataset) -> CoSAForWeaklySupervisedSegmentation:
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
        seg2cam_weight=recipe.seg2cam_weight,
        separation_weight=recipe.separation_weight,
        reliability_weighting=recipe.reliability_weighting,
        alpha=recipe.perplexity_alpha,
        beta=recipe.perplexity_beta,
        epsilon=recipe.perplexity_epsilon,
        separation_temperature=recipe.separation_temperature,
        separation_scope=recipe.separation_scope,
    )


def _loader(recipe: Recipe, dataset: Dataset, processor: CoSAImageProcessor, processes: int) -> DataLoader:
    """The whole run as one sequence of batches: position in it is all that a resume has to know."""
    views = Views(
        recipe.crop_size,
        processor.image_mean,
        processor.image_std,
        scale_range=(recipe.scale_min, recipe.scale_max),
    )
    batches = recipe.max_steps * recipe.gradient_accumulation_steps * processes
    stream = TrainingStream(
        dataset,
        views,
        length=batches * recipe.batch_size,
        seed=recipe.seed,
        masks=recipe.supervision == "masks",
    )
    return DataLoader(
        stream,
        batch_size=recipe.batch_size,
        num_workers=recipe.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _scores(
    recipe: Recipe, network: CoSAForWeaklySupervisedSegmentation, processor: CoSAImageProcessor
) -> dict[str, float]:
    """mIoU on the first `eval_images` of the evaluation split, at one scale: a glance, not the protocol."""
    dataset = load_dataset_by_name(recipe.dataset, recipe.data_dir, recipe.eval_split, masks=True)
    dataset = dataset.select(range(min(recipe.eval_images, len(dataset))))
    report = evaluate_model(network, processor, dataset, scales=(1.0,), flip=False, progress=False)
    return {f"eval/{part}": report[part]["miou"] for part in ("seg", "seg_tags", "cam", "cam_aux")}


def _require_finite(losses: dict[str, Tensor], image_ids: list[str], step: int) -> None:
    if not torch.isfinite(losses["loss"]):
        parts = {name: value.item() for name, value in losses.items()}
        raise FloatingPointError(f"loss is not finite at step {step + 1}: {parts}; images {list(image_ids)}")


def _hardware(accelerator: Accelerator) -> str:
    """What the run ran on, as a model card says it."""
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    else:
        device = f"{platform.machine()} {accelerator.device.type} with {torch.get_num_threads()} threads"
    return f"{accelerator.num_processes} x {device}"


def _announce(accelerator: Accelerator, recipe: Recipe, model: Any, dataset: Dataset, dropped: list[str]) -> None:
    """Say what is about to be trained, and what about it the user may not have meant."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    images = recipe.batch_size * recipe.gradient_accumulation_steps * accelerator.num_processes
    accelerator.print(
        f"{recipe.backbone}, {millions:.1f} M parameters; {len(dataset)} images, {len(class_names(dataset))} classes; "
        f"{recipe.max_steps} steps of {images} images, the first {recipe.warmup_steps} on tags alone"
    )
    if dropped:
        shown = ", ".join(dropped[:10]) + (", ..." if len(dropped) > 10 else "")
        accelerator.print(f"left out {len(dropped)} images without a tag: {shown} (all in run.json)")
    if recipe.max_steps < 3 / (1 - recipe.ema_momentum) and recipe.supervision == "tags":
        accelerator.print(
            f"ema_momentum {recipe.ema_momentum} averages over about {1 / (1 - recipe.ema_momentum):.0f} steps, too "
            f"many for a run of {recipe.max_steps}: the assignment network will hardly leave its start. Try "
            f"{max(0.0, 1 - 10 / recipe.max_steps):.3f}"
        )
