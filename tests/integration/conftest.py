"""What several tests of commands work on, and with."""

import pytest
from tiny import save_cosa

from cosa_hf.data import SHAPES_CLASSES


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A small random model of the shapes' classes, for images of 96 x 96."""
    fields = {"decoder_channels": 32, "coexistence_classes": list(SHAPES_CLASSES[:2])}
    return save_cosa(tmp_path_factory.mktemp("model"), 96, **fields)
