"""What a run tells while it runs."""

from pathlib import Path

import torch

from cosa_hf.training.telemetry import Telemetry


def test_the_bar_of_a_resumed_run_goes_on_from_its_step(accelerator, tiny, capsys):
    config = tiny(max_steps=4)
    Path(config.output_dir).mkdir()
    telemetry = Telemetry(accelerator, config, images_per_step=2)
    telemetry.begin(3)
    telemetry.add([{"loss": torch.ones(())}], {})
    telemetry.step(4, dict)
    telemetry.close()
    assert "4/4 [" in capsys.readouterr().err
