"""`cosa-hf check` as a user runs it."""

import json
from pathlib import Path

import pytest
from in_process import run_command
from PIL import Image

VOC = Path(__file__).resolve().parents[3] / "shared" / "data" / "VOC2012"


@pytest.fixture
def folder(tmp_path):
    for index, name in enumerate(("train/cat/a", "train/dog/b", "val/cat/c")):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (20, 20), (index, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def check(*arguments):
    return run_command("check", "--num_workers", 1, *arguments)


def test_counts_and_errors(folder, capsys):
    (folder / "val/cat/c.png").write_bytes((folder / "train/cat/a.png").read_bytes())
    (folder / "train/dog/b.png").write_bytes(b"not an image")
    report = folder / "r.json"
    assert check("--dataset", "folder", "--data_dir", folder, "--split", "train", "val", "--report", report) == 1
    printed = capsys.readouterr().out
    assert "error  leak, 1: take these images out" in printed
    assert "error  unreadable, 1: replace these files" in printed
    assert "cat         1      1" in printed
    assert "masks of split 'train' are not checked (training from tags needs none)" in printed
    assert json.loads((folder / "r.json").read_text())["images"] == {"train": 2, "val": 1}


def test_what_the_reader_refuses_is_named(folder, complaint):
    (folder / "tags.json").write_text('{"train/cat/a.png": ["cat"], "gone.png": ["cat"]}')
    said = complaint("check", "--dataset", "folder", "--data_dir", folder, "--split", "train")
    assert "lacks 1 file (gone.png" in said


def test_a_report_that_cannot_be_written_is_refused_first(folder, complaint):
    report = folder / "train/cat/a.png/report.json"
    said = complaint("check", "--dataset", "folder", "--data_dir", folder, "--report", report)
    assert said.startswith(f"error: cannot write {report}: ")


@pytest.mark.slow
@pytest.mark.skipif(not VOC.is_dir(), reason="needs the VOC images beside the repository")
def test_real_voc_has_no_errors(capsys):
    status = check("--dataset", "voc", "--data_dir", VOC, "--split", "train_aug", "val")
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "no errors" in printed
