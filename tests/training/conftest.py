import pytest

from cosa_hf.data import load_shapes
from cosa_hf.training import loop
from cosa_hf.training.recipe import Recipe


@pytest.fixture
def few_shapes(monkeypatch):
    """The embedded set, cut to six images, wherever the loop loads a dataset by name."""
    loaded = []

    def load(name, data_dir, split, masks=False, options=None):
        loaded.append((split, masks))
        return load_shapes("train" if split == "train_aug" else split, num_images=6, image_size=48, masks=masks)

    monkeypatch.setattr(loop, "load_dataset_by_name", load)
    return loaded


@pytest.fixture
def tiny(tmp_path):
    """A recipe of seconds: a test-sized ViT from random weights, two images of 48 pixels a step."""

    def make(**fields) -> Recipe:
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
        return Recipe.from_mapping(settings | fields)

    return make
