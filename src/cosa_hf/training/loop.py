"""The training loop: Algorithm 1, on Accelerate."""

import dataclasses
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, gather_object, set_seed
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import get_polynomial_decay_schedule_with_warmup

from cosa_hf.data import class_names, load_dataset_by_name, streaming_loader
from cosa_hf.data.dataset import TrainingDataset
from cosa_hf.data.tags import list_some
from cosa_hf.data.views import Views
from cosa_hf.evaluation.evaluate import evaluate
from cosa_hf.evaluation.figures import save_visualizations
from cosa_hf.inference import Segmenter, label_names
from cosa_hf.training.accumulation import mean_over_parts, parts_of
from cosa_hf.training.checkpoints import Checkpoints, Progress, snapshot_directory
from cosa_hf.training.config import RunConfig
from cosa_hf.training.cosa import CoSATask
from cosa_hf.training.guard import RunGuard
from cosa_hf.training.resume import require_unused, resume
from cosa_hf.training.task import Task
from cosa_hf.training.telemetry import Telemetry


def train(recipe: RunConfig, make_task: Callable[[Any, Accelerator], Task] = CoSATask) -> Path:
    """Train CoSA from tags, or another task, as the recipe says; returns the directory of the recommended model.

    Leaves in `recipe.output_dir`: `recipe.yaml`, `log.jsonl`, `run.json` (what was dropped, what is recommended and
    why, on what hardware and how long it ran), the task's models (`online` and `assignment` of CoSA), each with its
    processor and code, and checkpoints, snapshots and panels if asked for (docs/training.md). The run is the same on
    any number of processes that share a step's images among them, unless it streams its data.

    Args:
        recipe: of the kind that the task reads.
        make_task: what is trained.

    Raises:
        ValueError: data or settings that cannot be trained on; the message names them.
        FloatingPointError: the loss is no longer finite; the message names the images and the parts.
        OSError: a checkpoint or the log cannot be written, as on a full disk.
        SystemExit: after SIGTERM, once a checkpoint is saved.
    """
    output_dir = Path(recipe.output_dir)
    accelerator = _accelerator(recipe)
    set_seed(recipe.seed)
    task = make_task(recipe, accelerator)
    images_per_step = recipe.batch_size * recipe.gradient_accumulation_steps * accelerator.num_processes
    _announce(task, images_per_step)

    optimizer = task.optimizer()
    schedule = get_polynomial_decay_schedule_with_warmup(
        optimizer, recipe.lr_warmup_steps, recipe.max_steps, lr_end=0.0, power=recipe.lr_power
    )
    loader = _loader(task)
    model, optimizer = accelerator.prepare(task.network, optimizer)
    progress = Progress(images_per_step)
    telemetry = Telemetry(accelerator, recipe, images_per_step, task.shown)
    states: dict[str, Any] = task.states() | {
        "optimizer": optimizer,
        "schedule": schedule,
        "progress": progress,
        "telemetry": telemetry,
    }
    if accelerator.scaler is not None:
        states["scaler"] = accelerator.scaler
    checkpoints = Checkpoints(accelerator, output_dir, recipe.keep_checkpoints, states, task.before_update)
    if recipe.resume:
        resume(recipe, checkpoints, progress, accelerator)
        loader = accelerator.skip_first_batches(loader, progress.step)
    else:
        require_unused(output_dir, checkpoints)
    evaluated = _evaluation_data(task) if recipe.eval_every else None
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        dataclasses.replace(recipe, resume=False).to_yaml(output_dir / "recipe.yaml")
        (output_dir / "run.json").unlink(missing_ok=True)  # it says that a run is done
    telemetry.begin(progress.step)

    def mean(value: Tensor) -> Tensor:
        return accelerator.reduce(value, "mean")

    def vitals() -> dict[str, float]:
        return task.vitals() | {"lr": schedule.get_last_lr()[0]}

    task.train(model)
    with RunGuard(accelerator, checkpoints, progress) as watch:
        for batch in watch.steps(loader):
            targets = task.targets(batch, progress.step, mean)
            parts = list(parts_of(batch, targets, recipe.batch_size))
            step_mean = mean_over_parts(parts, task.rehearse, mean)
            losses = []
            for part, taught in parts:
                with accelerator.accumulate(model):
                    losses.append(task.losses(task.outputs(model, part), part, taught, step_mean))
                    accelerator.backward(losses[-1]["loss"])
            watch.require_finite(losses, batch["image_id"])
            if recipe.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if not accelerator.optimizer_step_was_skipped:  # as fp16 does where its gradients overflow
                schedule.step()
                task.update()

            progress.step += 1
            progress.unreadable.update(filter(None, batch["unreadable"]))
            telemetry.add(losses, task.shares(targets, batch))
            telemetry.step(progress.step, vitals)
            watch.whole()
            if evaluated is not None and progress.step % recipe.eval_every == 0:
                telemetry.write(progress.step, _evaluate(task, evaluated, progress.step))
            if recipe.checkpoint_every and progress.step % recipe.checkpoint_every == 0:
                checkpoints.save(progress.step)
            if recipe.snapshot_every and progress.step % recipe.snapshot_every == 0 and accelerator.is_main_process:
                task.save(snapshot_directory(output_dir, progress.step))

        name, reason = task.recommendation()
        dropped, unreadable = (sorted(set(gather_object(list(ids)))) for ids in (task.dropped, progress.unreadable))
        if accelerator.is_main_process:
            task.save(output_dir)
            summary = {
                "recommended": name,
                "reason": reason,
                "images": len(task.dataset) if isinstance(task.dataset, Dataset) else None,
                "untagged_dropped": dropped,
                "unreadable_replaced": unreadable,
                "hardware": _hardware(accelerator),
                "seconds": round(progress.seconds),
                **task.record(),
            }
            (output_dir / "run.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    if unreadable:
        accelerator.print(f"{len(unreadable)} images could not be read, others took their places (all in run.json):")
        accelerator.print("\n".join(unreadable[:10]))
    accelerator.print(f"models in {output_dir}; recommended: {name} ({reason})")
    telemetry.close()  # at the very end: Accelerate takes the processes' connection down with the trackers
    return output_dir / name


def _accelerator(recipe: RunConfig) -> Accelerator:
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


def _loader(task: Task) -> DataLoader:
    """The whole run as one sequence of steps, each a batch here: position in it is all that a resume has to know."""
    recipe, accelerator, dataset = task.recipe, task.accelerator, task.dataset
    views = Views(
        recipe.crop_size,
        task.processor.image_mean,
        task.processor.image_std,
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
            dataset, views, items, recipe.seed, shuffle_buffer=recipe.shuffle_buffer, untagged=task.dropped,
            process=process, **options,
        )  # fmt: skip
        # It gives this process its own rows already; Accelerate is left to move them to the device.
        return prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True)
    stream = TrainingDataset(
        dataset,
        views,
        length=items * accelerator.num_processes,
        seed=recipe.seed,
        **task.reads,
    )
    return accelerator.prepare(DataLoader(stream, **options))


def _evaluation_data(task: Task) -> Dataset:
    """The first `eval_images` of the evaluation split, with masks."""
    recipe = task.recipe
    options = dataclasses.replace(recipe, classes=label_names(task.evaluated.config)[1:])
    dataset = load_dataset_by_name(recipe.dataset, recipe.data_dir, recipe.eval_split, masks=True, options=options)
    return dataset.select(range(min(recipe.eval_images, len(dataset))))


def _evaluate(task: Task, dataset: Dataset, step: int) -> dict[str, float]:
    """mIoU at one scale, a glance and not the protocol; and panels. The run goes on as if nobody had looked."""
    recipe, accelerator = task.recipe, task.accelerator
    segmenter = Segmenter(task.evaluated, task.processor)
    with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
        report = evaluate(segmenter, dataset, progress=False, accelerator=accelerator)
        if accelerator.is_main_process:
            shown = dataset.select(range(min(recipe.eval_panels, len(dataset))))
            save_visualizations(segmenter, shown, Path(recipe.output_dir) / "panels" / f"step-{step:07d}")
    return {f"eval/{part}": report[part]["miou"] for part in ("seg", "seg_tags", "cam", "cam_aux") if part in report}


def _hardware(accelerator: Accelerator) -> str:
    """What the run ran on, as a model card says it."""
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    else:
        device = f"{platform.machine()} {accelerator.device.type} with {torch.get_num_threads()} threads"
    return f"{accelerator.num_processes} x {device}"


def _announce(task: Task, images_per_step: int) -> None:
    """Say what is about to be trained, and what about it the user may not have meant."""
    recipe, say = task.recipe, task.accelerator.print
    names = class_names(task.dataset)
    amount = f"{len(task.dataset)} images" if isinstance(task.dataset, Dataset) else "a stream of images"
    millions = sum(parameter.numel() for parameter in task.network.parameters()) / 1e6
    what, *remarks = task.description()
    say(
        f"{what}; {millions:.1f} M parameters; {amount}, {len(names)} classes ({', '.join(names)}); "
        f"{recipe.max_steps} steps of {images_per_step} images"
    )
    if images_per_step != recipe.images_per_step:
        say(
            f"the schedule is made for {recipe.images_per_step} images a step, this run takes {images_per_step}: "
            f"{recipe.batch_size} (batch_size) x {recipe.gradient_accumulation_steps} (gradient_accumulation_steps) x "
            f"{task.accelerator.num_processes} (processes). Change one of them, or images_per_step if it is meant"
        )
    if task.dropped:
        say(f"left out {len(task.dropped)} images without a tag: {list_some(task.dropped)} (all in run.json)")
    for remark in remarks:
        say(remark)
