"""The networks of a run as they were on the way."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.snapshots import moments
from cosa_hf.training.trainer import train


@pytest.mark.usefixtures("few_shapes")
def test_snapshots_are_the_networks_of_their_step(tiny, tmp_path):
    config = tiny(max_steps=4, warmup_steps=2, snapshot_every=2, threshold=0.4)
    train(config)
    run = Path(config.output_dir)
    first, last = moments(run)
    assert (first.step, last.step) == (2, 4)
    assert (first.threshold, first.aux_threshold) == (0.4, 0.4)  # warm-up: not moved yet
    assert (last.online, last.assignment) == (run / "online", run / "assignment")
    assert sorted(path.name for path in (run / "snapshots").iterdir()) == ["step-0000002", "step-0000004"]
    for name in ("online", "assignment"):
        at_end = load_file(run / name / "model.safetensors")
        kept = load_file(run / "snapshots" / "step-0000004" / name / "model.safetensors")
        before = load_file(getattr(first, name) / "model.safetensors")
        assert all(torch.equal(at_end[key], kept[key]) for key in at_end)
        assert not all(torch.equal(at_end[key], before[key]) for key in at_end)


def written_run(tmp_path, entries, snapshots=(10,)):
    TrainingConfig(max_steps=30, warmup_steps=0, lr_warmup_steps=0).to_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for step in snapshots:
        (tmp_path / f"snapshots/step-{step:07d}/assignment").mkdir(parents=True)
        (tmp_path / f"snapshots/step-{step:07d}/assignment/config.json").touch()
    return moments(tmp_path)


def test_thresholds_are_those_of_the_nearest_line_and_of_the_last_run_over_it(tmp_path):
    found = written_run(
        tmp_path,
        [
            {"step": 8, "xi": 0.1, "aux_xi": 0.2},
            {"step": 8, "eval/seg": 3.0},
            {"step": 8, "xi": 0.3, "aux_xi": 0.4},  # resumed from an earlier step
            {"step": 30, "xi": 0.5, "aux_xi": 0.6},
        ],
    )
    assert [(moment.step, moment.threshold, moment.aux_threshold) for moment in found] == [
        (10, 0.3, 0.4),
        (30, 0.5, 0.6),
    ]


def test_a_run_that_is_not_finished_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a finished run: it has no run.json"):
        moments(tmp_path)
