import pytest

from cosa_hf.data import load_shapes
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.training import setup


@pytest.fixture
def tiny(tmp_path, export, monkeypatch):
    """A configuration of seconds, scored on three drawn images."""

    def load(name, data_dir, split, masks=False, options=None):
        return load_shapes(split, num_images=3, image_size=48, masks=masks)

    monkeypatch.setattr(setup, "load_dataset_by_name", load)

    def make(**fields) -> MultistageConfig:
        settings = {
            "pseudo_labels": str(export("parquet")),
            "network": "largefov/test_resnet",
            "pretrained": False,
            "decoder_channels": 16,
            "freeze_batch_norm": False,
            "dataset": "shapes",
            "crop_size": 48,
            "input_size": 64,
            "batch_size": 2,
            "images_per_step": 2,
            "num_workers": 0,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "lr_warmup_steps": 1,
            "label_scales": [1.0],
            "log_every": 1,
            "tracker": "none",
            "output_dir": str(tmp_path / "run"),
        }
        return MultistageConfig.from_mapping(settings | fields)

    return make
