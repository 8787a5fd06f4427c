"""What several tests of commands work on, and with."""

import pytest
import torch

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.data import SHAPES_CLASSES


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A small random model of the shapes' classes, for images of 96 x 96."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = CoSAConfig(
        backbone="test_vit",
        decoder_channels=32,
        id2label=dict(enumerate(["background", *SHAPES_CLASSES])),
        coexistence_classes=list(SHAPES_CLASSES[:2]),
    )
    CoSAForWeaklySupervisedSegmentation(config).save_pretrained(directory)
    CoSAImageProcessor(size={"height": 96, "width": 96}).save_pretrained(directory)
    return directory
