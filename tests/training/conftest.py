import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cosa_hf.data import load_shapes
from cosa_hf.training import cosa, loop
from cosa_hf.training.checkpoints import read_checkpoint
from cosa_hf.training.config import TrainingConfig

TIMINGS = ("images_per_second", "memory_gb")


@pytest.fixture
def few_shapes(monkeypatch):
    """The embedded set, cut to six images, wherever the loop loads a dataset by name."""
    loaded = []

    def load(name, data_dir, split, masks=False, options=None):
        loaded.append((split, masks))
        return load_shapes("train" if split == "train_aug" else split, num_images=6, image_size=48, masks=masks)

    for module in (cosa, loop):
        monkeypatch.setattr(module, "load_dataset_by_name", load)
    return loaded


@pytest.fixture
def tiny(tmp_path):
    """A recipe of seconds: a test-sized ViT from random weights, two images of 48 pixels a step."""

    def make(**fields) -> TrainingConfig:
        settings = {
            "dataset": "shapes",
            "backbone": "test_vit",
            "pretrained": False,
            "aux_layer": -2,
            "decoder_channels": 16,
            "decoder_dilation": 1,
            "crop_size": 48,
            "input_size": 48,
            "batch_size": 2,
            "images_per_step": 2,
            "num_workers": 0,
            "max_steps": 6,
            "warmup_steps": 3,
            "learning_rate": 1e-3,
            "lr_warmup_steps": 1,
            "ema_momentum": 0.5,
            "label_scales": [1.0],
            "log_every": 1,
            "tracker": "none",
            "output_dir": str(tmp_path / "run"),
        }
        return TrainingConfig.from_mapping(settings | fields)

    return make


@pytest.fixture
def left() -> Callable[[TrainingConfig], dict[str, Any]]:
    """What a finished run leaves that another may equal: weights, log without timings, its last checkpoint."""

    def without_clock(checkpoint: dict[str, Any]) -> dict[str, Any]:
        progress = [pair for pair in checkpoint["progress"]["dict"] if pair[0] != "seconds"]
        return checkpoint | {"progress": progress}

    def read(recipe: TrainingConfig) -> dict[str, Any]:
        root = Path(recipe.output_dir)
        entries = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
        checkpoints = sorted((root / "checkpoints").glob("step-*"))
        return {
            "log": [{name: value for name, value in entry.items() if name not in TIMINGS} for entry in entries],
            "weights": {name: load_file(root / name / "model.safetensors") for name in ("online", "assignment")},
            "checkpoint": without_clock(read_checkpoint(checkpoints[-1])) if checkpoints else None,
        }

    return read


@pytest.fixture
def assert_equal() -> Callable[..., None]:
    """Two nested states are the same, bit for bit, or to an absolute tolerance; the message says where they differ."""

    def compare(one: Any, other: Any, tolerance: float = 0.0, where: str = "") -> None:
        assert type(one) is type(other), where
        if isinstance(one, dict):
            assert one.keys() == other.keys(), where
            for name in one:
                compare(one[name], other[name], tolerance, f"{where}/{name}")
        elif isinstance(one, list):
            assert len(one) == len(other), where
            for index, pair in enumerate(zip(one, other, strict=True)):
                compare(*pair, tolerance, f"{where}/{index}")
        elif isinstance(one, torch.Tensor):
            assert torch.equal(one, other) or (tolerance and (one - other).abs().max() <= tolerance), where
        else:
            assert one == other or (tolerance and abs(one - other) <= tolerance), f"{where}: {one} and {other}"

    return compare
