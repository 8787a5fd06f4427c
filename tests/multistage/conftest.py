import pytest
import torch

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.data import SHAPES_CLASSES, load_shapes
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.pseudo_labels.export import export_pseudo_labels
from cosa_hf.training import loop


@pytest.fixture(scope="session")
def shapes():
    """Six drawn images with tags."""
    return load_shapes("train", num_images=6, image_size=48)


@pytest.fixture(scope="session")
def export(shapes, tmp_path_factory):
    """Exports CAM pseudo-labels of an untrained CoSA model, once for each format."""
    made = {}

    def directory(format: str):
        if format not in made:
            torch.manual_seed(0)
            config = CoSAConfig(backbone="test_vit", id2label=dict(enumerate(["background", *SHAPES_CLASSES])))
            model = CoSAForWeaklySupervisedSegmentation(config).eval()
            made[format] = tmp_path_factory.mktemp("export") / format
            export_pseudo_labels(
                model, CoSAImageProcessor(size={"height": 48, "width": 48}), shapes, made[format],
                source="cam_mean", format=format, split="train", scales=(1.0,), flip=False, progress=False,
            )  # fmt: skip
        return made[format]

    return directory


@pytest.fixture
def tiny(tmp_path, export, monkeypatch):
    """A recipe of seconds, scored on three drawn images."""

    def load(name, data_dir, split, masks=False, options=None):
        return load_shapes(split, num_images=3, image_size=48, masks=masks)

    monkeypatch.setattr(loop, "load_dataset_by_name", load)

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
