"""scripts/check_data.py as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
VOC = ROOT.parent / "shared" / "data" / "VOC2012"


def check(*arguments):
    command = [sys.executable, ROOT / "scripts" / "check_data.py", "--num_workers", "1", *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture
def folder(tmp_path):
    for index, name in enumerate(("train/cat/a", "train/dog/b", "val/cat/c")):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (20, 20), (index, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_counts_and_what_must_be_mended(folder):
    (folder / "val/cat/c.png").write_bytes((folder / "train/cat/a.png").read_bytes())
    (folder / "train/dog/b.png").write_bytes(b"no picture")
    run = check("--dataset", "folder", "--data_dir", folder, "--split", "train", "val", "--report", folder / "r.json")
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert "MEND  leak, 1: take these pictures out" in run.stdout
    assert "MEND  unreadable, 1: replace these files" in run.stdout
    assert "cat         1      1" in run.stdout
    assert "masks of split 'train' are not checked (training from tags needs none)" in run.stdout
    assert json.loads((folder / "r.json").read_text())["images"] == {"train": 2, "val": 1}


def test_what_the_reader_refuses_is_named(folder):
    (folder / "tags.json").write_text('{"train/cat/a.png": ["cat"], "gone.png": ["cat"]}')
    run = check("--dataset", "folder", "--data_dir", folder, "--split", "train")
    assert run.returncode == 1
    assert "lacks 1 file (gone.png" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_report_that_cannot_be_written_is_refused_first(folder, complaint):
    report = folder / "train/cat/a.png/report.json"
    said = complaint("scripts/check_data.py", "--dataset", "folder", "--data_dir", folder, "--report", report)
    assert said.startswith(f"error: cannot write {report}: ")


@pytest.mark.slow
@pytest.mark.skipif(not VOC.is_dir(), reason="needs the VOC images beside the repository")
def test_real_voc_has_nothing_to_mend():
    run = check("--dataset", "voc", "--data_dir", VOC, "--split", "train_aug", "val")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "nothing to mend" in run.stdout
