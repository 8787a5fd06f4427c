"""One measurement in a process of its own: the package's own training loop, or the straight version of it."""

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
from cosa_hf.evaluation.maps import SCALES, predict_maps
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from torch.utils.flop_counter import FlopCounterMode
from views import photos

from cosa_hf.assignment import network as assignment
from cosa_hf.assignment.threshold import DynamicThreshold
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.inference import forward_multiscale
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective import overall
from cosa_hf.training import cosa, loop
from cosa_hf.training.config import TrainingConfig
from speed import straight
from speed.stopwatch import Stopwatch, matmul_rate, peak_memory

# What `instruments` finds in a step of the training loop.
PARTS = (
    "data", "AN forward", "pseudo-labels", "threshold", "ON forward", "classification", "CAM2Seg (two)", "Seg2CAM",
    "separation", "objective, rest", "objective, backward", "ON backward", "optimiser", "EMA", "telemetry", "rest",
)  # fmt: skip
FIRST = 1  # steps that are not counted: memory is taken and kernels are chosen in them


def measure(
    kind: str, recipe: str, changes: dict[str, Any], steps: int, classes: int, cpu_time: bool
) -> dict[str, Any]:
    """Run `steps` steps and say where their time went.

    Args:
        kind: `package`, the training loop; `sklearn`, the same with the threshold fitted as the paper does;
            `straight`, the released code's plan; `floor`, FLOPs and matmul rates; `evaluation`, prediction alone.
        recipe: its name.
        changes: fields of it to replace.
        steps: how many, after one that is not counted.
        classes: C.
        cpu_time: see `Stopwatch`.

    Returns:
        JSON-serialisable: `steps`, a dict of seconds by part for each; `memory`, peak bytes; or what `kind` gives.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "dataset": "folder", "pretrained": False, "tracker": "none", "num_workers": 0, "warmup_steps": 0,
            "lr_warmup_steps": 0, "eval_every": 0, "checkpoint_every": 0, "output_dir": folder,
        }  # fmt: skip
        chosen = TrainingConfig.named(recipe, **{**changes, **settings, "max_steps": FIRST + steps})
        if kind == "floor":
            plan = TrainingConfig.named(recipe, **changes)
            return floor(chosen, plan.warmup_steps / plan.max_steps, classes, device, cpu_time)
        if kind == "evaluation":
            return evaluation(chosen, classes, device, cpu_time)
        watch = Stopwatch(device, cpu_time)
        dataset = tagged_photos(classes, chosen.batch_size * chosen.gradient_accumulation_steps)
        if kind == "straight":
            straight.train(chosen, dataset, watch, device)
        else:
            with contextlib.ExitStack() as patches:
                patches.enter_context(contextlib.redirect_stdout(sys.stderr))  # what the loop says of the run
                patches.enter_context(mock.patch.object(cosa, "_training_data", return_value=(dataset, [])))
                for patch in instruments(watch, fitted_by_sklearn=kind == "sklearn"):
                    patches.enter_context(patch)
                loop.train(chosen)
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
    """What makes the training loop tell the time of its parts, as context managers."""

    def timed(owner: Any, attribute: str, part: str) -> Any:
        return mock.patch.object(owner, attribute, watch.timed(part, getattr(owner, attribute)))

    steps, forward, backward = loop.Watch.steps, CoSAForWeaklySupervisedSegmentation.forward, Accelerator.backward
    objective = overall.CoSAObjective.__call__

    def counted_steps(self: Any, loader: Any) -> Iterator[Any]:
        batches = steps(self, loader)
        while True:
            watch.begin()
            with watch.part("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            watch.end()

    def online_forward(self: Any, *arguments: Any, **options: Any) -> Any:
        with watch.part("ON forward" if torch.is_grad_enabled() else watch.inside[-1]):
            return forward(self, *arguments, **options)

    reached: list[bool] = []

    def timed_objective(self: Any, outputs: Any, *arguments: Any) -> Any:
        # All of the objective comes before any of the network in the backward pass: autograd takes what was recorded
        # last first. So the first gradient that reaches an output parts the two.
        reached.clear()

        def objective_is_through(_: torch.Tensor) -> None:
            if not reached:
                watch.split("objective, backward")
                reached.append(True)

        for name in ("logits", "cls_logits", "aux_cls_logits", "cam_logits"):
            if outputs[name].requires_grad:
                outputs[name].register_hook(objective_is_through)
        with watch.part("objective, rest"):
            return objective(self, outputs, *arguments)

    yield mock.patch.object(loop.Watch, "steps", counted_steps)
    yield timed(cosa, "assign", "pseudo-labels")
    yield timed(assignment, "forward_multiscale", "AN forward")
    if fitted_by_sklearn:
        yield mock.patch.object(DynamicThreshold, "update", straight.update_with_sklearn)
    yield timed(DynamicThreshold, "update", "threshold")
    yield mock.patch.object(CoSAForWeaklySupervisedSegmentation, "forward", online_forward)
    yield mock.patch.object(overall.CoSAObjective, "__call__", timed_objective)
    yield timed(overall, "classification_loss", "classification")
    yield timed(overall.CoSAObjective, "_cam2seg", "CAM2Seg (two)")
    yield timed(overall.CoSAObjective, "_seg2cam", "Seg2CAM")
    yield timed(overall.CoSAObjective, "_separation", "separation")
    yield timed(overall.CoSAObjective, "_dense_energy", "dense energy")
    yield mock.patch.object(Accelerator, "backward", watch.timed("ON backward", backward))
    yield timed(AcceleratedOptimizer, "step", "optimiser")
    yield timed(assignment.AssignmentNetwork, "update", "EMA")
    yield timed(loop.Telemetry, "add", "telemetry")
    yield timed(loop.Telemetry, "step", "telemetry")
    yield mock.patch.object(cosa, "save_networks")  # the models of a benchmark are of no use


def floor(recipe: TrainingConfig, warm_up: float, classes: int, device: torch.device, cpu_time: bool) -> dict[str, Any]:
    """FLOPs of the network in one step, counted without computing any, and what matrix products reach here."""
    with torch.device("meta"):
        model = cosa.build_model(recipe, tagged_photos(classes, 1))
        images = torch.empty(recipe.batch_size, 3, recipe.crop_size, recipe.crop_size)
    flops = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward_multiscale(model, images, recipe.label_scales)
    flops["AN forward"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    flops["ON forward"] = counter.get_total_flops()
    # Each product has two in the backward pass; the counter takes those of grouped convolutions for dense ones.
    flops["ON backward"] = 2 * flops["ON forward"]
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    rates = {name: matmul_rate(device, dtype, cpu_time) for name, dtype in kinds.items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": name}
    of_recipe = {"crop_size": recipe.crop_size, "warm-up share": warm_up}
    return {"flops": flops, "rates": rates, **versions, **of_recipe}


def evaluation(recipe: TrainingConfig, classes: int, device: torch.device, cpu_time: bool) -> dict[str, Any]:
    """Seconds an image, from JPEG to label map: 5 scales and flip, and a single scale."""
    dataset = tagged_photos(classes, recipe.batch_size).select(range(recipe.batch_size))
    model = cosa.build_model(recipe, dataset).to(device)
    processor = CoSAImageProcessor(size={"height": recipe.input_size, "width": recipe.input_size})
    watch, seconds = Stopwatch(device, cpu_time), {}
    for name, scales, flip in (("single scale", (1.0,), False), ("5 scales and flip", SCALES, True)):
        for _ in range(2):  # the first is not counted
            watch.begin()
            for maps in predict_maps(model, processor, dataset, scales, flip, recipe.batch_size):
                maps.label("seg")
            watch.end()
        seconds[name] = sum(watch.steps[-1].values()) / len(dataset)
    return {"seconds": seconds, "memory": peak_memory(device)}
