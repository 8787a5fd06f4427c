"""One measurement in a process of its own: the package's own training, the naive baseline, or prediction."""

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from torch.utils.flop_counter import FlopCounterMode

from cosa_hf.assignment import network as assignment
from cosa_hf.assignment.threshold import DynamicThreshold
from cosa_hf.data import class_names
from cosa_hf.evaluation.crf import DenseCRF
from cosa_hf.inference import SCALES, Segmenter, forward_multiscale
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective import overall
from cosa_hf.training import trainer
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.guard import RunGuard
from cosa_hf.training.setup import build_processor, build_student

from ..views import photos
from . import naive_baseline
from .stopwatch import Stopwatch, matmul_rate, peak_memory

#: What `instruments` finds in a training step.
PHASES = (
    "data", "AN forward", "pseudo-labels", "threshold", "targets", "ON forward", "classification", "CAM2Seg (two)",
    "Seg2CAM", "separation", "objective, rest", "objective, backward", "ON backward", "optimiser", "EMA", "telemetry",
    "rest",
)  # fmt: skip
FIRST = 1  # steps that are not counted: memory is allocated and kernels are chosen in them


def measure(
    kind: str, recipe: str, changes: dict[str, Any], steps: int, classes: int, cpu_time: bool
) -> dict[str, Any]:
    """Run `steps` steps and say where their time went.

    Args:
        kind: `package`, the package's training; `sklearn`, the same with the threshold fitted as the paper does;
            `naive`, the naive baseline; `flop_bound`, FLOPs and matmul rates; `evaluation`, prediction alone.
        recipe: its name.
        changes: fields of it to replace.
        steps: how many, after one that is not counted.
        classes: C.
        cpu_time: see `Stopwatch`.

    Returns:
        JSON-serialisable: `steps`, a dict of seconds by phase for each; `memory`, peak bytes; or what `kind` gives.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "dataset": "folder", "pretrained": False, "tracker": "none", "num_workers": 0, "warmup_steps": 0,
            "lr_warmup_steps": 0, "eval_every": 0, "checkpoint_every": 0, "output_dir": folder,
        }  # fmt: skip
        config = TrainingConfig.named(recipe, **{**changes, **settings, "max_steps": FIRST + steps})
        if kind == "flop_bound":
            plan = TrainingConfig.named(recipe, **changes)
            return flop_bound(config, plan.warmup_steps / plan.max_steps, classes, device, cpu_time)
        if kind == "evaluation":
            return evaluation(config, classes, device, cpu_time)
        watch = Stopwatch(device, cpu_time)
        dataset = tagged_photos(classes, config.batch_size * config.gradient_accumulation_steps)
        if kind == "naive":
            naive_baseline.train(config, dataset, watch, device)
        else:
            with contextlib.ExitStack() as patches:
                patches.enter_context(contextlib.redirect_stdout(sys.stderr))  # what training says of the run
                patches.enter_context(mock.patch.object(trainer, "training_data", return_value=(dataset, [], {})))
                for patch in instruments(watch, fitted_by_sklearn=kind == "sklearn"):
                    patches.enter_context(patch)
                trainer.train(config)
        return {"steps": watch.steps[FIRST:], "memory": peak_memory(device)}


def tagged_photos(classes: int, count: int) -> Dataset:
    """Drawn photos as JPEG, with two tags each."""
    files = list(itertools.islice(itertools.cycle(photos(None)), max(count, 4)))
    tags = [[index % classes, (3 * index + 1) % classes] for index in range(len(files))]
    names = [f"class {index}" for index in range(classes)]
    return Dataset.from_dict(
        {
            "image": [{"bytes": file, "path": None} for file in files],
            "labels": [sorted(set(pair)) for pair in tags],
            "image_id": [str(index) for index in range(len(files))],
        },
        features=Features({"image": Image(), "labels": List(ClassLabel(names=names)), "image_id": Value("string")}),
    )


def instruments(watch: Stopwatch, fitted_by_sklearn: bool) -> Iterator[Any]:
    """Patches that assign the time of a training step to its phases, as context managers."""

    def timed(owner: Any, attribute: str, phase: str) -> Any:
        return mock.patch.object(owner, attribute, watch.timed(phase, getattr(owner, attribute)))

    batches, forward = RunGuard.batches, CoSAForWeaklySupervisedSegmentation.forward
    objective = overall.CoSAObjective.__call__

    def timed_batches(self: RunGuard, loader: Any) -> Iterator[Any]:
        remaining = batches(self, loader)
        while True:
            watch.begin()
            with watch.phase("data"):
                batch = next(remaining, None)
            if batch is None:
                return
            yield batch
            watch.end()

    def timed_forward(self: Any, *arguments: Any, **options: Any) -> Any:
        with watch.phase("ON forward" if torch.is_grad_enabled() else watch.inside[-1]):
            return forward(self, *arguments, **options)

    reached: list[bool] = []

    def timed_objective(self: Any, outputs: Any, *arguments: Any) -> Any:
        # The backward pass goes through all of the objective before it reaches the network, because autograd takes
        # first what was recorded last. So the first gradient that reaches an output separates the two.
        reached.clear()

        def objective_is_through(_: torch.Tensor) -> None:
            if not reached:
                watch.split("objective, backward")
                reached.append(True)

        for name in ("logits", "cls_logits", "aux_cls_logits", "cam_logits"):
            if outputs[name].requires_grad:
                outputs[name].register_hook(objective_is_through)
        with watch.phase("objective, rest"):
            return objective(self, outputs, *arguments)

    if fitted_by_sklearn:
        yield mock.patch.object(DynamicThreshold, "update", naive_baseline.update_with_sklearn)
    yield mock.patch.object(RunGuard, "batches", timed_batches)
    yield mock.patch.object(CoSAForWeaklySupervisedSegmentation, "forward", timed_forward)
    yield mock.patch.object(overall.CoSAObjective, "__call__", timed_objective)
    yield mock.patch.object(trainer.Trainer, "_save")  # the models of a benchmark are of no use
    for owner, attribute, phase in (
        (assignment.AssignmentNetwork, "label", "pseudo-labels"),
        (assignment, "forward_multiscale", "AN forward"),
        (DynamicThreshold, "update", "threshold"),
        (trainer.Trainer, "targets", "targets"),
        (overall, "classification_loss", "classification"),
        (overall, "cam2seg_loss", "CAM2Seg (two)"),
        (overall, "seg2cam_loss", "Seg2CAM"),
        (overall, "contrastive_separation_loss", "separation"),
        (overall, "dense_energy_loss", "dense energy"),
        (Accelerator, "backward", "ON backward"),
        (AcceleratedOptimizer, "step", "optimiser"),
        (assignment.AssignmentNetwork, "update", "EMA"),
        (trainer.Trainer, "label_statistics", "telemetry"),
        (trainer.Telemetry, "add", "telemetry"),
        (trainer.Telemetry, "step", "telemetry"),
    ):
        yield timed(owner, attribute, phase)


def flop_bound(
    config: TrainingConfig, warm_up: float, classes: int, device: torch.device, cpu_time: bool
) -> dict[str, Any]:
    """FLOPs of the network in one step, counted without computing any, and the rate of matrix products here."""
    with torch.device("meta"):
        model = build_student(config, class_names(tagged_photos(classes, 1)))
        images = torch.empty(config.batch_size, 3, config.crop_size, config.crop_size)
    flops = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward_multiscale(model, images, config.label_scales)
    flops["AN forward"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    flops["ON forward"] = counter.get_total_flops()
    # Each product has two in the backward pass; the counter takes those of grouped convolutions for dense ones.
    flops["ON backward"] = 2 * flops["ON forward"]
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {
        "flops": flops,
        "rates": {name: matmul_rate(device, dtype, cpu_time) for name, dtype in kinds.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "crop_size": config.crop_size,
        "warm-up share": warm_up,
    }


def evaluation(config: TrainingConfig, classes: int, device: torch.device, cpu_time: bool) -> dict[str, Any]:
    """Seconds an image, from JPEG to label map, at one scale and at five with flips, without and with CRF (Tab. 6b)."""
    dataset = tagged_photos(classes, config.batch_size).select(range(config.batch_size))
    model = build_student(config, class_names(dataset)).to(device)
    processor, crf = build_processor(config, model), DenseCRF()
    watch, seconds = Stopwatch(device, cpu_time), {}
    for name, scales, flip in (("single scale", (1.0,), False), ("5 scales and flip", SCALES, True)):
        seconds[name] = {}
        for column, refinement in (("no CRF", None), (f"CRF ({crf.backend})", crf)):
            segmenter = Segmenter(model, processor, scales, flip, config.batch_size, refinement)
            for images in (dataset.select(range(1)), dataset):  # the first is not counted
                watch.begin()
                for image in segmenter.predict(images):
                    image.label("seg")
                watch.end()
            seconds[name][column] = sum(watch.steps[-1].values()) / len(dataset)
    return {"seconds": seconds, "memory": peak_memory(device)}
