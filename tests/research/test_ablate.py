"""research/ablate.py as a user runs it, on drawn shapes with a tiny network."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import ablate
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = shlex.split(
    "--recipe shapes-tiny --backbone test_vit --aux_layer -2 --decoder_channels 16 --decoder_dilation 1 --crop_size 64 "
    "--input_size 64 --batch_size 2 --num_workers 0 --max_steps 4 --warmup_steps 2 --lr_warmup_steps 1 "
    "--ema_momentum 0.2 --tracker none --log_every 1 --scales 1 --no_flip"
)


def run_table(*arguments, timeout=1800):
    command = [sys.executable, ROOT / "research" / "ablate.py", *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment, timeout=timeout, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a dozen processes, each of which has to import everything first
def test_a_table_is_run_once_and_its_markdown_is_what_was_measured(tmp_path):
    table = ("--table", "4b", *TINY, "--output_dir", tmp_path)
    first = run_table(*table, "--seeds", 2, "--parallel", 2)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "without CSC: separation_weight 0.1 -> 0.0" in first.stdout
    assert first.stdout.count(": training, ") == 4

    values = {}
    for line in csv.DictReader((tmp_path / "4b-val.csv").open()):
        values.setdefault((line["row"], line["metric"]), []).append(float(line["value"]))
    assert set(values) >= {
        (row, metric) for row in ("with CSC", "without CSC") for metric in ("seg", "cam_coexistence")
    }
    markdown = (tmp_path / "4b-val.md").read_text()
    header, _, *rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    for name, _, count, *cells, _ in rows:
        assert count == "2"
        for metric, cell in zip(header[3:-1], cells, strict=True):
            found = values[name, metric]
            assert cell == f"{mean(found):.2f} +- {stdev(found):.2f}"
    report = json.loads((tmp_path / "4b-with-CSC-seed-1" / "report-val.json").read_text())
    assert report["seg"]["miou"] == values["with CSC", "seg"][1]
    assert (tmp_path / "4b-val.png").is_file() == ("4b-val.png: matplotlib" not in first.stdout)

    again = run_table(*table, "--seeds", 2)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == 4
    assert (tmp_path / "4b-val.md").read_text() == markdown

    longer = run_table(*table, "--max_steps", 5, "--rows", "with CSC")
    assert longer.returncode == 0, longer.stderr
    assert ": training, " in longer.stdout
    assert "max_steps: 5" in (tmp_path / "4b-with-CSC-seed-0-2" / "recipe.yaml").read_text()


@pytest.mark.slow
def test_what_cannot_be_trained_is_told_with_its_reason_and_the_rest_is_kept(tmp_path):
    run = run_table("--table", "4b", *TINY, "--train_split", "nowhere", "--output_dir", tmp_path, "--rows", "with CSC")
    assert run.returncode != 0
    assert "FAILED with CSC, seed 0: " in run.stdout
    assert "nowhere" in run.stdout
    assert "1 of 1 runs failed" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--table", "9"), "invalid choice: '9'"),
        (("--table", "4b", "--rows", "no CSC"), r"unknown rows \['no CSC'\]; the table has \['with CSC'"),
        (("--table", "4b", "--max_stepz", "3"), "max_stepz"),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments, message, tmp_path, complaint):
    said = complaint(ablate.main, "--recipe", "shapes-tiny", *arguments, "--output_dir", tmp_path / "runs")
    assert re.search(message, said), said
    assert not (tmp_path / "runs").exists()
