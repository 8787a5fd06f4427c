"""Algorithm 1, on Accelerate."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from torch import Tensor

from cosa_hf.assignment.network import AssignmentNetwork
from cosa_hf.backbone_cosa import ENCODED
from cosa_hf.data import class_names
from cosa_hf.data.tags import list_some
from cosa_hf.data.value_range import settled_reading
from cosa_hf.evaluation.evaluate import evaluate
from cosa_hf.evaluation.figures import save_visualizations
from cosa_hf.files import whole_file
from cosa_hf.inference import Segmenter
from cosa_hf.objective.overall import CoSAObjective, mask_targets
from cosa_hf.objective.pseudo_labels import PseudoLabels
from cosa_hf.objective.targets import Targets
from cosa_hf.training.checkpoints import Checkpoints, checkpoint_files
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.guard import RunGuard
from cosa_hf.training.precision import settle_precision
from cosa_hf.training.resume import require_unused, resume
from cosa_hf.training.setup import (
    build_optimizer,
    build_processor,
    build_schedule,
    build_student,
    encoded_images,
    evaluation_data,
    hardware,
    make_accelerator,
    run_warnings,
    standardize,
    training_data,
    training_loader,
)
from cosa_hf.training.snapshots import save_networks, snapshot_directory, snapshots
from cosa_hf.training.states import Progress, TrainedWeights, TrainingData
from cosa_hf.training.telemetry import Telemetry, label_statistics, mixture_values


def train(config: TrainingConfig) -> Path:
    """Train CoSA from image-level tags; returns the directory of the recommended model.

    Leaves in `config.output_dir`: `recipe.yaml`, `log.jsonl`, `run.json` (what was left out, what is recommended and
    why, on what hardware and how long it ran), the models `online` and `assignment`, each with its processor and code,
    and checkpoints, snapshots and visualizations if asked for (docs/training.md). The run is the same on any number of
    processes that share a step's images among them, unless it streams its data.

    Raises:
        ValueError: data or settings that cannot be trained on; the message names them.
        FloatingPointError: the loss is no longer finite; the message names the images and the terms.
        OSError: a checkpoint or the log cannot be written, as on a full disk.
        SystemExit: after SIGTERM, once a checkpoint is saved.

    Example:
        >>> config = TrainingConfig.named("shapes-tiny", max_steps=2, warmup_steps=1, lr_warmup_steps=1, num_workers=0)
        >>> train(config).name  # doctest: +SKIP
        'online'
    """
    return Trainer(config).train()


class Trainer:
    """One run of CoSA: everything that goes on from step to step, and the step itself.

    Attributes:
        student: the online network; `model` is the same as Accelerate wrapped it.
        teacher: the assignment network.
        objective: Eq. 11.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config = settle_precision(config)
        self.accelerator = make_accelerator(config)
        if not config.resume:
            output_dir = Path(config.output_dir)
            results = [output_dir / name for name in ("run.json", "online", "assignment")]
            require_unused(output_dir, checkpoint_files(output_dir), [*snapshots(output_dir).values(), *results])
        set_seed(config.seed)
        self.dataset, self.untagged, self.labelled_by = training_data(config)
        names = class_names(self.dataset)
        self.evaluated = evaluation_data(config, names)
        self.student = build_student(config, names)
        reading = settled_reading(config, self.dataset, config.num_workers, self.accelerator.print)
        self.processor = build_processor(config, self.student, reading)
        self.student.to(self.accelerator.device)  # so that the teacher can share what is frozen
        encoded = encoded_images(config, self.student, self.processor, self.dataset, self.accelerator)
        standardize(self.student, self.processor, self.dataset, encoded)
        self.teacher = AssignmentNetwork(self.student, config, config).to(self.accelerator.device)
        self.objective = _objective(config)
        # Of a normalised image to 0..255, up to an offset: the dense energy compares colours.
        self.color_steps = 255 * torch.tensor(self.processor.image_std, device=self.accelerator.device).view(3, 1, 1)

        optimizer = build_optimizer(config, self.student)
        self.schedule = build_schedule(config, optimizer)
        self.loader = training_loader(config, self.dataset, self.untagged, self.processor, self.accelerator, encoded)
        self.model, self.optimizer = self.accelerator.prepare(self.student, optimizer)
        images = config.images_taken(self.accelerator.num_processes)
        self.progress = Progress(images)
        self.telemetry = Telemetry(self.accelerator, config, images, shown=("loss", "cls", "xi"))
        threshold, aux_threshold = self.teacher.thresholds
        frozen = [name for name, parameter in self.student.named_parameters() if not parameter.requires_grad]
        states: dict[str, Any] = {
            "data": _training_data(config, self.dataset, names, reading.settings),
            "online": TrainedWeights(self.student, frozen),
            "assignment": TrainedWeights(self.teacher.network, frozen),
            "threshold": threshold,
            "aux_threshold": aux_threshold,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "progress": self.progress,
            "telemetry": self.telemetry,
        }
        if self.accelerator.scaler is not None:
            states["scaler"] = self.accelerator.scaler
        self.checkpoints = Checkpoints(
            self.accelerator,
            Path(config.output_dir),
            config.keep_checkpoints,
            states,
            before_update=("threshold", "aux_threshold"),
        )
        self.guard = RunGuard(self.accelerator, self.checkpoints, self.progress)

    def training_step(self, batch: dict[str, Any]) -> None:
        """One step of Algorithm 1."""
        labels = self.pseudo_labels(batch)  # lines 7-10 and 13
        targets = self.targets(labels, batch)  # lines 14-18
        losses = []
        for micro, micro_targets in micro_batches(batch, targets, self.config.batch_size):
            with self.accelerator.accumulate(self.model):
                outputs = self.model(**student_inputs(micro), output_hidden_states=self.config.detach != "none")  # 11
                losses.append(self.losses(outputs, micro, micro_targets))  # lines 12 and 19-22
                self.accelerator.backward(losses[-1]["loss"])  # line 23
        self.guard.require_finite(losses, batch["image_id"])
        if self.config.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()  # line 24
        self.optimizer.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:  # as fp16 does where its gradients overflow
            self.schedule.step()
            self.teacher.update(self.student)  # line 25
        self.progress.step += 1
        self.progress.unreadable.update(filter(None, batch["unreadable"]))
        self.telemetry.add(losses, self.label_statistics(labels, batch))

    def pseudo_labels(self, batch: dict[str, Any]) -> PseudoLabels | None:
        """What the teacher says of the weak view; nothing during warm-up, and of images with masks to follow."""
        if self.config.follows_masks or self.progress.step < self.config.warmup_steps:
            return None
        bf16 = torch.autocast(self.accelerator.device.type, torch.bfloat16)
        with bf16 if self.config.bf16_assignment else self.accelerator.autocast():
            return self.teacher.label(
                batch.get("weak"), batch["labels"], batch["valid"], batch.get("mask"), self.config.batch_size,
                self.mean, encoded_part(batch),
            )  # fmt: skip

    def targets(self, labels: PseudoLabels | None, batch: dict[str, Any]) -> Targets | None:
        """The targets of the step, normalised over all its images."""
        micro = self.config.gradient_accumulation_steps
        if self.config.follows_masks:
            return mask_targets(batch["mask"], self.student.config.semantic_loss_ignore_index, micro, self.mean)
        return None if labels is None else self.objective.targets(labels, batch["valid"], micro, self.mean)

    def losses(self, outputs: Any, micro: dict[str, Any], targets: Targets | None) -> dict[str, Tensor]:
        """Eq. 11 of one micro-batch."""
        colors = micro["strong"] * self.color_steps if self.objective.dense_energy_weight else None
        weight, bias = self.student.classifier.weight, self.student.classifier.bias
        return self.objective(outputs, micro["labels"], targets, micro["valid"], colors, weight, bias)

    def mean(self, value: Tensor) -> Tensor:
        """Over processes."""
        return self.accelerator.reduce(value, "mean")

    def train(self) -> Path:
        """All steps; what they leave, see `train`."""
        self._begin()
        self.model.train()
        with self.guard:
            for batch in self.guard.batches(self.loader):
                self.training_step(batch)
                self.telemetry.step(self.progress.step, self.metrics)
                self.guard.commit()
                self._after_step()
            return self._end()

    def label_statistics(self, labels: PseudoLabels | None, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What is logged of the step's pseudo-labels."""
        if labels is None:
            return {}
        return label_statistics(labels, batch["valid"], self.config.perplexity_alpha, self.config.perplexity_beta)

    def metrics(self) -> dict[str, float]:
        """What is logged as it is at a step."""
        threshold, aux_threshold = self.teacher.thresholds
        mixtures = mixture_values(threshold) | mixture_values(aux_threshold, "aux_")
        rate = float(self.schedule.get_last_lr()[0])
        return mixtures | {"an_on_distance": self.teacher.distance(self.student), "lr": rate}

    def _begin(self) -> None:
        """Go on from a checkpoint, if need be, and say what begins."""
        config, output_dir = self.config, Path(self.config.output_dir)
        self._announce()
        if config.resume:
            resume(config, self.checkpoints, self.progress, self.accelerator)
            self.loader = self.accelerator.skip_first_batches(self.loader, self.progress.step)
            self._snapshot()  # the run may have ended between the checkpoint and it
        if self.accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            dataclasses.replace(config, resume=False).to_yaml(output_dir / "recipe.yaml")
            (output_dir / "run.json").unlink(missing_ok=True)  # it says that a run is done
        self.telemetry.begin(self.progress.step)

    def _after_step(self) -> None:
        config, step = self.config, self.progress.step
        if self.evaluated is not None and step % config.eval_every == 0:
            self.telemetry.write(step, self._evaluate(self.evaluated))
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            self.checkpoints.save(step)
        self._snapshot()

    def _evaluate(self, dataset: Dataset) -> dict[str, float]:
        """mIoU at one scale (not the protocol), and visualizations. The run is not changed by it."""
        segmenter = Segmenter(self.teacher.network, self.processor)
        shown = dataset.select(range(min(self.config.eval_panels, len(dataset))))
        directory = Path(self.config.output_dir) / "panels" / f"step-{self.progress.step:07d}"
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            report = evaluate(segmenter, dataset, progress=False, accelerator=self.accelerator)
            if self.accelerator.is_main_process:
                save_visualizations(segmenter, shown, directory)
        names = [name for name in ("seg", "seg_tags", "cam", "cam_aux") if name in report]
        return {f"eval/{name}": report[name]["miou"] for name in names}

    def _snapshot(self) -> None:
        every, step = self.config.snapshot_every, self.progress.step
        if every and step % every == 0:
            self._save(snapshot_directory(Path(self.config.output_dir), step))

    def _save(self, directory: Path) -> None:
        if self.accelerator.is_main_process:
            save_networks(directory, self.student, self.teacher.network, self.processor)

    def _end(self) -> Path:
        """Save the models, and say what there is to say of the run."""
        config, accelerator, output_dir = self.config, self.accelerator, Path(self.config.output_dir)
        name, reason = recommendation(config)
        dropped, unreadable = (
            sorted(set(gather_object(list(ids)))) for ids in (self.untagged, self.progress.unreadable)
        )
        self._save(output_dir)
        if accelerator.is_main_process:
            summary = {
                "recommended": name,
                "reason": reason,
                "images": len(self.dataset) if isinstance(self.dataset, Dataset) else None,
                "untagged_dropped": dropped,
                "unreadable_replaced": unreadable,
                "hardware": hardware(accelerator),
                "seconds": round(self.progress.seconds),
                "pseudo_labels": self.labelled_by or None,
            }
            with whole_file(output_dir / "run.json") as unfinished:
                unfinished.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        accelerator.wait_for_everyone()
        if unreadable:
            accelerator.print(
                f"{len(unreadable)} images could not be read, others took their places (all in run.json):"
            )
            accelerator.print("\n".join(unreadable[:10]))
        accelerator.print(f"models in {output_dir}; recommended: {name} ({reason})")
        self.telemetry.close()  # at the very end: Accelerate takes the processes' connection down with the trackers
        return output_dir / name

    def _announce(self) -> None:
        """Say what is about to be trained, and what about it the user may not have meant."""
        config, say, images = self.config, self.accelerator.print, self.progress.images_per_step
        names = class_names(self.dataset)
        amount = f"{len(self.dataset)} images" if isinstance(self.dataset, Dataset) else "a stream of images"
        millions = sum(parameter.numel() for parameter in self.student.parameters()) / 1e6
        schedule = f"the first {config.warmup_steps} steps on tags alone"
        if config.follows_masks:
            schedule = f"on the masks of {config.pseudo_labels or 'the ground truth'}"
        say(
            f"CoSA on {config.backbone}, {schedule}; {millions:.1f} M "
            f"parameters; {amount}, {len(names)} classes ({', '.join(names)}); {config.max_steps} steps of "
            f"{images} images"
        )
        for warning in run_warnings(config, self.accelerator.num_processes):
            say(warning)
        if self.untagged:
            say(f"left out {len(self.untagged)} images without a tag: {list_some(self.untagged)} (all in run.json)")
        if config.guidance == "gt" and not config.follows_masks:
            say(
                "ORACLE: guidance gt reads the ground-truth masks of the training images (Fig. 1). This run is not "
                "weakly supervised; do not report it as such"
            )
        window = 1 / (1 - config.ema_momentum)
        if config.max_steps < 3 * window and not config.follows_masks:
            say(
                f"ema_momentum {config.ema_momentum} averages over about {window:.0f} steps, too many for a run of "
                f"{config.max_steps}: the assignment network will hardly leave its start. Try "
                f"{max(0.0, 1 - 10 / config.max_steps):.3f}"
            )


def encoded_part(batch: dict[str, Any]) -> dict[str, Tensor] | None:
    """What the encoder's frozen part has made of the images beforehand; None of a batch of views."""
    return {name: batch[name] for name in ENCODED if name in batch} or None


def student_inputs(micro: dict[str, Any]) -> dict[str, Any]:
    """What the online network sees: the strong view, or what the frozen part of it has made already."""
    encoded = encoded_part(micro)
    return {"pixel_values": micro["strong"]} if encoded is None else {"encoded": encoded}


def micro_batches(
    batch: dict[str, Any], targets: Targets | None, size: int
) -> Iterator[tuple[dict[str, Any], Targets | None]]:
    """The batch of an optimiser step and its targets, `size` images at a time.

    Example:
        >>> [micro["image_id"] for micro, _ in micro_batches({"image_id": ["a", "b", "c", "d"]}, None, size=2)]
        [['a', 'b'], ['c', 'd']]
    """
    for start in range(0, len(batch["image_id"]), size):
        micro = slice(start, start + size)
        micro_targets = None if targets is None else Targets(*(values[micro] for values in targets))
        yield {name: value[micro] for name, value in batch.items()}, micro_targets


def recommendation(config: TrainingConfig) -> tuple[str, str]:
    """Which of the two networks to use, and why: decided by the schedule alone, so that no score chooses it.

    Example:
        >>> recommendation(TrainingConfig())[0]
        'assignment'
    """
    window = 1 / (1 - config.ema_momentum)
    if config.max_steps >= 3 * window:
        return "assignment", f"the average over about {window:.0f} steps is steadier than the last step's weights"
    return "online", f"{config.max_steps} steps are too few for an average over about {window:.0f}"


def _objective(config: TrainingConfig) -> CoSAObjective:
    """Eq. 11, or where there are masks to follow its classification and the cross-entropy against them."""
    if config.follows_masks:
        return CoSAObjective(cam2seg_weight=1.0, aux_cam2seg_weight=0.0, seg2cam_weight=0.0, separation_weight=0.0)
    unguided = {"seg2cam_weight": 0.0} if config.guidance == "none" else {}
    return config.part(CoSAObjective, **unguided)


def _training_data(config: TrainingConfig, dataset: Any, names: list[str], reading: dict[str, Any]) -> TrainingData:
    rows = None
    if isinstance(dataset, Dataset):
        rows = zip(dataset["image_id"][:], dataset["labels"][:], strict=True)
    return TrainingData(names, rows, config.allow_changed_data, reading)


__all__ = ["Trainer", "micro_batches", "recommendation", "train"]
