"""Settings and fixtures that all tests share.

Fixtures import what they need themselves: pytest-xdist reads this file before it starts a process that runs tests, and
torch and transformers take seconds.
"""

import functools
import os
import subprocess
import sys

# Before torch is imported. Some tests fork, and the child of a process whose OpenMP threads have worked waits for them
# forever; the models of the tests are too small to gain from threads anyway.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import settings

# The same examples in every run: a check that fails now and then tells a contributor nothing about the change at hand.
settings.register_profile("same every run", deadline=None, derandomize=True, max_examples=60)
# Looks for new ones: pytest --hypothesis-profile search
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("same every run")


def pytest_collection_modifyitems(items):
    """Slow tests first: whoever is done early then takes over many short ones, not waits for a long one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def known_before():
    """What takes most of a test's time and is the same in hundreds of them is done once.

    That is to draw all of the embedded set, of which a command looks at a few images, and to find out what a backbone
    gives, which is nearly all that building a tiny model takes.
    """
    import datasets

    from cosa_hf import data
    from cosa_hf.backbone_cosa import CoSABackbone

    probe, probed = CoSABackbone._probe, {}

    def probe_once(self):
        key = self.config.to_json_string(use_diff=False)
        if key not in probed:
            probed[key] = probe(self)
        return probed[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_shapes", functools.cache(data.load_shapes))
        patch.setattr(CoSABackbone, "_probe", probe_once)
        # Five seconds, wherever a stream of parquet files ends: for Arrow's threads, which have read these long ago.
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
        yield


@pytest.fixture
def cosa_hf(capsys):
    """Runs a command that works, and returns what it prints."""
    from in_process import run_command

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
    from in_process import run_command

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


@pytest.fixture
def any_precision():
    """A process has one precision; these tests want another."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def subprocess_of():
    """Runs a command in a process of its own, by default as `python -m cosa_hf.cli`."""

    def run(*arguments, launch=("-m", "cosa_hf.cli"), **environment):
        words = [sys.executable, *map(str, (*launch, *arguments))]
        settings = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
        return subprocess.run(words, capture_output=True, text=True, env=settings, timeout=600)

    return run


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    """Exports CAM pseudo-labels of six drawn images, once for each format, by an untrained CoSA model."""
    from tiny import square, tiny_cosa

    from cosa_hf import Segmenter
    from cosa_hf.data import load_shapes
    from cosa_hf.pseudo_labels.export import export_pseudo_labels

    made = {}

    def directory(format):
        if format not in made:
            segmenter = Segmenter(tiny_cosa(), square(48))
            made[format] = tmp_path_factory.mktemp("export") / format
            images = load_shapes("train", num_images=6, image_size=48)
            export_pseudo_labels(
                segmenter, images, made[format], source="cam_mean", format=format, split="train", progress=False
            )
        return made[format]

    return directory


@pytest.fixture(scope="session")
def mask2former(tmp_path_factory):
    """A directory with a tiny Mask2Former of 150 classes, as one downloads them."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    directory = tmp_path_factory.mktemp("mask2former")
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
        out_features=[f"stage{index}" for index in range(1, 5)],
    )  # fmt: skip
    width = dict.fromkeys(
        ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward"), 32
    )
    config = Mask2FormerConfig(
        backbone_config=swin, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6, num_labels=150,
        **width,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(directory)
    Mask2FormerImageProcessor().save_pretrained(directory)
    return str(directory)


@pytest.fixture(params=["cosa-ms", "segformer"])
def segmentation_only(request, tmp_path):
    """A directory with a tiny network of another kind than CoSA, untrained."""
    from pets import CLASSES
    from tiny import save_segformer

    from cosa_hf.multistage.config import MultistageConfig
    from cosa_hf.multistage.networks import build_network

    names = ["background", *CLASSES]
    if request.param == "segformer":
        return save_segformer(tmp_path / "network", id2label=dict(enumerate(names)))
    recipe = MultistageConfig(
        network="largefov/test_resnet", pseudo_labels="labels", pretrained=False, decoder_channels=16
    )
    for part in build_network(recipe, names):
        part.save_pretrained(tmp_path / "network")
    return tmp_path / "network"
