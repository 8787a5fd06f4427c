"""README and docs/ against the package: their code runs, their commands exist, the site builds without a warning."""

import functools
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
from drawn import write_photos
from in_process import ROOT, run_command, run_script
from tiny import save_cosa, square, tiny_cosa

from cosa_hf import Segmenter, TrainingConfig, export_pseudo_labels
from cosa_hf.cli import COMMANDS
from cosa_hf.data import load_shapes

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "model_cards").glob("*.md"))]
NOTES = [ROOT / "research/README.md", *sorted((ROOT / "research/notes").glob("*.md"))]


#: What makes a training of seconds of any recipe.
CUT = {
    "max_steps": 2, "warmup_steps": 1, "lr_warmup_steps": 1, "ema_momentum": 0.2, "batch_size": 2, "num_workers": 0,
    "backbone": "test_vit", "affinity_blocks": [-2],
    "crop_size": 48, "input_size": 48, "pretrained": False, "tracker": "none", "eval_every": 0,
}  # fmt: skip


def blocks(page, *languages):
    """(language, code) of the fenced blocks of a page."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [(language, code) for language, code in found if language in languages]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The directory of somebody who has done what the pages say comes before."""
    directory = tmp_path_factory.mktemp("reader")
    for name in ("runs/demo/model", "runs/upernet/model", "org/cosa-voc"):
        save_cosa(directory / name, 64)
    shapes = load_shapes("val", num_images=2)
    shapes[0]["image"].save(directory / "runs/demo/unseen.png")
    shapes[0]["image"].save(directory / "photo.jpg")
    (directory / "src").symlink_to(ROOT / "src")
    write_photos(directory / "photos", 3)
    np.save(directory / "cls_labels.npy", {"2007_000032": np.array([0.0, 1.0])}, allow_pickle=True)
    settings = {"source": "cam", "format": "parquet", "split": "train"}
    export_pseudo_labels(Segmenter(tiny_cosa(), square(64)), shapes, directory / "VOC2012-pseudo", **settings)
    return directory


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_runs(page, reader, monkeypatch):
    monkeypatch.chdir(reader)
    monkeypatch.setattr(datasets.DatasetDict, "push_to_hub", lambda *arguments, **options: None)
    named = TrainingConfig.named
    monkeypatch.setattr(TrainingConfig, "named", lambda name, **fields: named(name, **fields | CUT))
    for _, code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def commands():
    """{command or script: {flag: page}} of everything that the pages tell a reader to type."""
    found: dict[str, dict[str, str]] = {}
    command = rf"(?:cosa-hf|cosa_hf\.cli) ({'|'.join(COMMANDS)})"
    for page in [*PAGES, *NOTES, ROOT / "Makefile"]:
        script = rf"(?:python research/{'|[|] `' if page in NOTES else ''})([a-z_/]+\.py)"
        pattern = rf"(?:{command}|{script})\b([^\n`;&|#]*)"
        for command_name, path, rest in re.findall(pattern, page.read_text().replace("\\\n", " ")):
            flags = found.setdefault(command_name or f"research/{path}", {})
            flags |= dict.fromkeys(re.findall(r"(?<=\s)--[a-z]\w+", rest), page.name)
    return found


@pytest.mark.parametrize("command", sorted(commands()))
def test_commands_have_the_flags_that_the_pages_name(command, monkeypatch, capsys):
    lines = [[command]] if command != "convert" else [["convert", "checkpoint"], ["convert", "coco-masks"]]
    if command == "research/ablate.py":
        lines.append(["train"])  # to which it hands on what it does not know
    for first, *kind in lines:
        run = run_command if first in COMMANDS else functools.partial(run_script, monkeypatch)
        with pytest.raises(SystemExit) as stopped:
            run(first, *kind, "--help")
        assert stopped.value.code == 0
    flags = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert {flag: page for flag, page in commands()[command].items() if flag not in flags} == {}


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "contrastive_separation_loss" in (tmp_path / "site/api/objective/index.html").read_text()
