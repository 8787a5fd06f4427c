"""What several tests of commands work on, and with."""

import os
import subprocess
import sys

import pytest
import torch
from in_process import run_command

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


@pytest.fixture
def cosa_hf(capsys):
    """Runs a command that works, and returns what it prints."""

    def cosa_hf(*arguments):
        capsys.readouterr()
        status = run_command(*arguments)
        printed = capsys.readouterr()
        assert status == 0, printed.out + printed.err
        return printed.out

    return cosa_hf


@pytest.fixture
def complaint(capsys):
    """What a command prints on stderr that ends with status 1 (2 with `usage`): errors, never a traceback."""

    def complaint(*arguments, usage=False):
        capsys.readouterr()
        try:
            status = run_command(*arguments)
        except SystemExit as stopped:
            status = stopped.code
        printed = capsys.readouterr()
        assert status == (2 if usage else 1), printed.out + printed.err
        return printed.err

    return complaint


@pytest.fixture(scope="session")
def subprocess_of():
    """Runs a command in a process of its own, by default as `python -m cosa_hf.cli`."""

    def run(*arguments, launch=("-m", "cosa_hf.cli"), **environment):
        words = [sys.executable, *map(str, (*launch, *arguments))]
        settings = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
        return subprocess.run(words, capture_output=True, text=True, env=settings, timeout=600)

    return run
