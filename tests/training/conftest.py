import functools

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs_of import load_few_shapes, tiny_config

from cosa_hf.training import setup


@pytest.fixture
def few_shapes(monkeypatch):
    """The embedded set, cut to six images, wherever training loads a dataset by name; returns what was loaded."""
    loaded = []

    def load(name, data_dir, split, masks=False, options=None):
        loaded.append((split, masks))
        return load_few_shapes(name, data_dir, split, masks)

    monkeypatch.setattr(setup, "load_dataset_by_name", load)
    return loaded


@pytest.fixture
def tiny(tmp_path):
    """Configurations of runs of seconds, by default all into one directory."""
    return functools.partial(tiny_config, output_dir=str(tmp_path / "run"))


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True)
