"""`cosa-hf demo` with a recipe of seconds: everything that it promises is there afterwards."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from cosa_hf import TrainingConfig
from cosa_hf.demo import run as demo


@pytest.mark.slow
def test_the_demo_leaves_what_it_promises(tmp_path, subprocess_of):
    recipe = tmp_path / "seconds.yaml"
    seconds = {"max_steps": 8, "warmup_steps": 4, "lr_warmup_steps": 1, "batch_size": 4, "eval_every": 0}
    small = {"backbone": "test_vit", "aux_layer": -2, "decoder_channels": 16, "crop_size": 64, "input_size": 64}
    few = {"train_split": "test", "log_every": 1}  # 200 images are soon drawn
    TrainingConfig.named("shapes-tiny", **seconds, **small, **few, ema_momentum=0.5).to_yaml(recipe)
    output_dir = tmp_path / "demo"
    run = subprocess_of("demo", "--output_dir", output_dir, "--recipe", recipe)
    assert run.returncode == 0, run.stderr[-3000:]

    report = json.loads((output_dir / "report.json").read_text())
    cams = ("cam", "cam_aux", "cam_mean")
    for part in (*(report[name] for name in ("seg", "seg_tags", *cams)), *map(report["classification_only"].get, cams)):
        assert 0 <= part["miou"] <= 100
        assert part["per_class"].keys() == report["seg"]["per_class"].keys()
    assert report["images"] == 200
    assert len(list((output_dir / "panels").glob("*.png"))) == 6
    assert Image.open(output_dir / "panels.png").width > 400
    assert Image.open(output_dir / "unseen" / "unseen.png").size == Image.open(output_dir / "unseen.png").size
    plain, alone = report["cam_aux"]["miou"], report["classification_only"]["cam_aux"]["miou"]
    assert re.search(rf"auxiliary layer, tags given +{plain:.1f} +{alone:.1f}\n", run.stdout)

    # The baseline is the classification-only run of the same length.
    entries = [json.loads(line) for line in (output_dir / "classification" / "log.jsonl").read_text().splitlines()]
    assert len(entries) == 8
    assert all("c2s" not in entry for entry in entries)


@pytest.mark.slow
def test_a_training_ends_with_all_its_processes(tmp_path, monkeypatch):
    """Whatever ends the demo, no training and no data worker of one goes on alone."""
    # A training that never ends, with a data worker.
    (tmp_path / "train.py").write_text(
        "import os, pathlib, subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path(sys.argv[2] + '.unfinished').write_text(f'{os.getpid()} {worker.pid}')\n"
        "os.replace(sys.argv[2] + '.unfinished', sys.argv[2])\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(demo, "COMMAND", (str(tmp_path / "train.py"),))
    started = tmp_path / "pids"
    with demo.training(started, log=tmp_path / "log") as launcher:
        while not started.exists():
            assert launcher.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        training, worker = map(int, started.read_text().split())
        assert is_running(training)
        assert is_running(worker)
    deadline = time.monotonic() + 10
    while is_running(training) or is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_ends_it_with_the_status_of_one_killed(tmp_path, monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(demo, "train_both", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit) as stopped:
            demo.run(tmp_path / "demo", "shapes-tiny")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stopped.value.code == 143


def test_a_directory_with_something_in_it_is_left_alone(tmp_path, complaint):
    (tmp_path / "thesis.tex").touch()
    said = complaint("demo", "--output_dir", tmp_path)
    assert said == (
        f"error: {tmp_path}/thesis.tex is there already: choose another --output_dir, or remove {tmp_path}\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_command_that_fails_ends_it(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        demo.command("predict", tmp_path / "nowhere", "cat.jpg", "--output_dir", tmp_path / "masks")
    printed = capsys.readouterr()
    assert f"\n$ cosa-hf predict {tmp_path}/nowhere cat.jpg" in printed.out
    assert printed.err.startswith("error: no model at ")


def test_a_training_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "COMMAND", ("-c", "raise SystemExit('this is why')"))
    said = pytest.raises(ChildProcessError, match=r"training failed; .*/log says why")
    with demo.training("--max_steps", "2", log=tmp_path / "log") as process, said:
        demo.finish(process, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "this is why\n"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # The dead whom nobody has waited for still have a number.
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
