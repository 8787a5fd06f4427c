"""A tracker that is not installed is refused by name; one that fails is in test_guard.py."""

import pytest

from cosa_hf.training import telemetry
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.setup import make_accelerator


@pytest.mark.parametrize(("tracker", "package"), [("trackio", r"cosa-hf\[trackio\]"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_is_refused(tracker, package, monkeypatch):
    monkeypatch.setattr(telemetry, "get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match=f'tracker {tracker} is not installed: pip install "{package}"'):
        make_accelerator(TrainingConfig(tracker=tracker))


@pytest.mark.parametrize("tracker", ["tensorboard", "none", "all"])
def test_what_is_there_passes(tracker):
    telemetry.check_tracker(tracker)
