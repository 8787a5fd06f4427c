"""What a run tells while it runs. Trackers that fail are in test_guard.py."""

from pathlib import Path

import pytest
import torch

from cosa_hf.training import telemetry
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.setup import make_accelerator
from cosa_hf.training.telemetry import Telemetry


def test_the_bar_of_a_resumed_run_goes_on_from_its_step(accelerator, tiny, capsys):
    config = tiny(max_steps=4)
    Path(config.output_dir).mkdir()
    told = Telemetry(accelerator, config, images_per_step=2)
    told.begin(3)
    told.add([{"loss": torch.ones(())}], {})
    told.step(4, dict)
    told.close()
    assert "4/4 [" in capsys.readouterr().err


@pytest.mark.parametrize(("tracker", "package"), [("trackio", r"cosa-hf\[trackio\]"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_is_refused(tracker, package, monkeypatch):
    monkeypatch.setattr(telemetry, "get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match=f'tracker {tracker} is not installed: pip install "{package}"'):
        make_accelerator(TrainingConfig(tracker=tracker))


@pytest.mark.parametrize("tracker", ["tensorboard", "none", "all"])
def test_what_is_there_passes(tracker):
    telemetry.check_tracker(tracker)
