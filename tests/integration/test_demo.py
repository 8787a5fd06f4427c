"""scripts/demo.py with a recipe of seconds: everything that `make demo` promises is there afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_demo_leaves_what_it_promises(tmp_path):
    recipe = tmp_path / "seconds.yaml"
    settings = yaml.safe_load((ROOT / "recipes" / "shapes-tiny.yaml").read_text())
    settings |= {"max_steps": 8, "warmup_steps": 4, "lr_warmup_steps": 1, "batch_size": 4, "eval_every": 0}
    recipe.write_text(yaml.safe_dump(settings | {"ema_momentum": 0.5, "log_every": 1}))
    output_dir = tmp_path / "demo"
    command = [sys.executable, ROOT / "scripts" / "demo.py", "--output_dir", output_dir, "--recipe", recipe]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=800)
    assert run.returncode == 0, run.stderr[-3000:]

    report = json.loads((output_dir / "report.json").read_text())
    for part in ("seg", "seg_tags", "cam", "cam_aux", "cam_mean", "cam_baseline"):
        assert 0 <= report[part]["miou"] <= 100
        assert report[part]["per_class"].keys() == report["seg"]["per_class"].keys()
    assert report["images"] == 200
    assert len(list((output_dir / "panels").glob("*.png"))) == 6
    assert Image.open(output_dir / "panels.png").width > 400
    assert Image.open(output_dir / "unseen" / "unseen.png").size == Image.open(output_dir / "unseen.png").size
    assert f"segmentation, tags unknown          {report['seg']['miou']:5.1f}" in run.stdout

    # The baseline is the classification-only run of the same length.
    entries = [json.loads(line) for line in (output_dir / "classification" / "log.jsonl").read_text().splitlines()]
    assert len(entries) == 8
    assert all("c2s" not in entry for entry in entries)
