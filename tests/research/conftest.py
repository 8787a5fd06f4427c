"""A small random model, and what a command that ends with an error says."""

import pytest
import torch

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.data import SHAPES_CLASSES


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A directory with a small random model of the shapes' classes."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = CoSAConfig(
        backbone="test_vit", decoder_channels=16, id2label=dict(enumerate(["background", *SHAPES_CLASSES]))
    )
    CoSAForWeaklySupervisedSegmentation(config).save_pretrained(directory)
    CoSAImageProcessor(size={"height": 64, "width": 64}).save_pretrained(directory)
    return directory


@pytest.fixture
def complaint(capsys):
    """What the `main` of a command says where it ends with an error."""

    def complaint(main, *arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        return f"{stopped.value.code}{capsys.readouterr().err}"

    return complaint
