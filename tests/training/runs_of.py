"""What the tests of training share: runs of seconds, what they leave, and how two of them are compared."""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from cosa_hf.data import load_shapes
from cosa_hf.training.checkpoints import read_checkpoint
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.trainer import train

TIMINGS = ("images_per_second", "memory_gb")


def tiny_config(**fields: Any) -> TrainingConfig:
    """A run of seconds: a test-sized ViT from random weights, two images of 48 pixels a step."""
    settings = {
        "dataset": "shapes", "backbone": "test_vit", "pretrained": False, "aux_layer": -2, "decoder_channels": 16,
        "decoder_dilation": 1, "crop_size": 48, "input_size": 48, "batch_size": 2, "images_per_step": 2,
        "num_workers": 0, "max_steps": 6, "warmup_steps": 3, "learning_rate": 1e-3, "lr_warmup_steps": 1,
        "ema_momentum": 0.5, "label_scales": [1.0], "log_every": 1, "tracker": "none",
    }  # fmt: skip
    return TrainingConfig.from_mapping(settings | fields)


def load_few_shapes(name, data_dir, split, masks=False, options=None):
    """In the place of `load_dataset_by_name`: the embedded set, cut to six images."""
    return load_shapes("train" if split == "train_aug" else split, num_images=6, image_size=48, masks=masks)


def train_on(processes: int, config: TrainingConfig, run: Callable[..., Any] = train, *arguments: Any) -> None:
    """`run(config, *arguments)` on one process, which is this one, or on several."""
    AcceleratorState._reset_state(True)
    if processes == 1:
        run(config, *arguments)
    else:
        debug_launcher(run, args=(config, *arguments), num_processes=processes)
    AcceleratorState._reset_state(True)


def on_call(owner: Any, name: str, number: int, act: Callable[[Callable[[], Any]], Any], patch=setattr) -> None:
    """From now on the `number`-th call of a function returns `act(call)`, where `call()` is what it would have done."""
    function, calls = getattr(owner, name), itertools.count(1)

    def counted(*arguments, **options):
        call = functools.partial(function, *arguments, **options)
        return act(call) if next(calls) == number else call()

    patch(owner, name, counted)


def log_of(config: TrainingConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]


def summary_of(config: TrainingConfig) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "run.json").read_text())


def weights_of(config: TrainingConfig) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(Path(config.output_dir) / name / "model.safetensors") for name in ("online", "assignment")}


def checkpoints_of(config: TrainingConfig) -> list[Path]:
    return sorted((Path(config.output_dir) / "checkpoints").glob("*"))


def left(config: TrainingConfig) -> dict[str, Any]:
    """What a finished run leaves that another may equal: weights, log without timings, its last checkpoint."""
    checkpoint = read_checkpoint(checkpoints_of(config)[-1]) if checkpoints_of(config) else None
    if checkpoint:
        checkpoint["progress"] = [pair for pair in checkpoint["progress"]["dict"] if pair[0] != "seconds"]
    log = [{name: value for name, value in entry.items() if name not in TIMINGS} for entry in log_of(config)]
    return {"log": log, "weights": weights_of(config), "checkpoint": checkpoint}


def assert_equal(one: Any, other: Any, tolerance: float = 0.0, where: str = "") -> None:
    """Two nested states are the same, bit for bit, or to a tolerance, of numbers above 1 a relative one."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_equal(one[name], other[name], tolerance, f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, tolerance, f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other) or (tolerance and (one - other).abs().max() <= tolerance), where
    else:
        assert one == other or (tolerance and abs(one - other) <= tolerance * max(1, abs(other))), (
            f"{where}: {one} and {other}"
        )
