"""What several tests of scripts work on, and with."""

import pytest
import torch
from in_process import run_script

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.data import SHAPES_CLASSES


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A small random model of the shapes' classes."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = CoSAConfig(
        backbone="test_vit", decoder_channels=32, id2label=dict(enumerate(["background", *SHAPES_CLASSES]))
    )
    CoSAForWeaklySupervisedSegmentation(config).save_pretrained(directory)
    CoSAImageProcessor(size={"height": 96, "width": 96}).save_pretrained(directory)
    return directory


@pytest.fixture
def complaint(monkeypatch, capsys):
    """What a script that ends with an error says."""

    def complaint(script, *arguments):
        with pytest.raises(SystemExit) as stopped:
            run_script(monkeypatch, script, *arguments)
        return f"{stopped.value.code}{capsys.readouterr().err}"

    return complaint
