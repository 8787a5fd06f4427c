"""A run that was killed and resumed equals the one that was not, bit for bit."""

import multiprocessing
import os
import pickle
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Sequence
from runs_of import assert_equal, checkpoints_of, left, log_of, on_call
from safetensors.torch import save_file

from cosa_hf.assignment.network import AssignmentNetwork
from cosa_hf.data import load_shapes
from cosa_hf.objective.overall import CoSAObjective
from cosa_hf.training import checkpoints, setup
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.snapshots import moments, snapshots
from cosa_hf.training.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("few_shapes")

# Everything that a resume must bring back: pseudo-labels that draw from the global generator, thresholds with a queue,
# entries that sum over more steps than lie between checkpoints, evaluations in between.
EVERYTHING = {
    "max_steps": 14,
    "warmup_steps": 4,
    "guidance": "noise",
    "threshold_queue": 3,
    "threshold_decay": 0.5,
    "log_every": 4,
    "eval_every": 5,
    "eval_images": 1,
    "eval_panels": 0,
    "checkpoint_every": 3,
}


def kill_itself(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(config, patch) -> None:
    """Train in a process of its own that kills itself with signal 9 where `patch` says."""

    def child():
        patch()
        train(config)

    AcceleratorState._reset_state(True)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def die_at(owner, name: str, call: int):
    """Let a function's n-th call be the process's last act."""
    return lambda: on_call(owner, name, call, kill_itself)


def die_writing():
    """Leave half a file where a checkpoint is being written."""

    def half(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        kill_itself()

    checkpoints.save_file = half


def test_a_run_killed_at_any_moment_and_resumed_equals_the_uninterrupted_one(tiny, tmp_path):
    uninterrupted = tiny(output_dir=str(tmp_path / "uninterrupted"), **EVERYTHING)
    train(uninterrupted)
    expected = left(uninterrupted)
    assert [entry["step"] for entry in expected["log"]] == [4, 5, 8, 10, 12, 14]

    killed = tiny(output_dir=str(tmp_path / "killed"), **EVERYTHING)
    resumed = tiny(output_dir=str(tmp_path / "killed"), resume=True, **EVERYTHING)
    directory = tmp_path / "killed/checkpoints"
    draw = random.Random(0)
    # The first death comes after the checkpoint of step 3, and two steps at the least are made in between.
    run_and_die(killed, die_at(AssignmentNetwork, "update", draw.randint(4, 5)))
    run_and_die(resumed, die_at(CoSAObjective, "__call__", draw.randint(1, 3)))
    run_and_die(resumed, die_writing)
    assert list(directory.glob(".*.unfinished"))
    run_and_die(resumed, die_at(torch.optim.AdamW, "step", draw.randint(4, 6)))
    run_and_die(resumed, die_at(os, "replace", 2))  # the first is of the log
    with (tmp_path / "killed/log.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # as a run killed while it writes leaves it
    train(resumed)

    assert_equal(expected, left(resumed))
    assert not list(directory.glob(".*"))


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty", "not ours"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny, tmp_path, capsys, damage):
    config = tiny(checkpoint_every=2, guidance="noise")
    train(config)
    expected = left(config)
    newest = checkpoints_of(config)[-1]
    assert newest.name == "step-0000006.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "not ours":
        save_file({"0": torch.zeros(1)}, newest)
    else:
        content[-1] ^= 1
        newest.write_bytes({"cut short": content[:-100], "one bit": content, "empty": b""}[damage])

    capsys.readouterr()
    resumed = tiny(checkpoint_every=2, guidance="noise", resume=True)
    train(resumed)
    out = capsys.readouterr().out
    assert "step-0000006.safetensors is damaged" in out
    assert "resumed at step 4" in out
    assert_equal(expected, left(resumed))
    names = {path.name for path in newest.parent.iterdir()}
    assert names == {f"step-000000{step}.safetensors" for step in (4, 6)} | {"damaged-step-0000006.safetensors"}


def test_a_snapshot_that_the_run_owed_when_it_ended_is_written_after_all(tiny):
    fields = {"checkpoint_every": 2, "snapshot_every": 2, "max_steps": 4}
    train(tiny(**fields))
    run = Path(tiny().output_dir)
    (run / "snapshots/step-0000004/assignment/config.json").unlink()  # its checkpoint was there before
    assert list(snapshots(run)) == [2]
    train(tiny(resume=True, **fields))
    assert list(snapshots(run)) == [2, 4]


def test_a_resume_opens_no_pickle(tiny, monkeypatch):
    train(tiny(checkpoint_every=4))

    def forbidden(*_, **__):
        raise AssertionError("a pickle was opened")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, forbidden)
    train(tiny(checkpoint_every=4, resume=True))


def test_no_complete_checkpoint_to_resume_from_is_said(tiny, tmp_path):
    resumed = tiny(resume=True)
    said = r"nothing to resume: no complete checkpoint .*start without --resume, and with --checkpoint_every N"
    with pytest.raises(FileNotFoundError, match=said):
        train(resumed)
    train(tiny(max_steps=2, warmup_steps=2, checkpoint_every=2))
    train(resumed)
    (tmp_path / "run/checkpoints/step-0000006.safetensors").unlink(missing_ok=True)
    (path,) = (tmp_path / "run/checkpoints").iterdir()
    path.write_bytes(b"nonsense")
    with pytest.raises(FileNotFoundError, match="nothing to resume: no complete checkpoint"):
        train(resumed)


def test_the_newest_are_kept(tiny, tmp_path):
    train(tiny(checkpoint_every=1, keep_checkpoints=3))
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step-000000{step}.safetensors" for step in (4, 5, 6)]


def test_a_run_does_not_mix_with_the_checkpoints_of_an_earlier_one(tiny, tmp_path):
    train(tiny(checkpoint_every=3))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(FileExistsError, match=r"step-0000006\.safetensors is there already: --resume that run"):
        train(tiny(checkpoint_every=3, tracker="tensorboard"))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    shutil.rmtree(tmp_path / "run")
    train(tiny(max_steps=2, warmup_steps=2))
    assert [entry["step"] for entry in log_of(tiny())] == [1, 2]


def test_a_run_does_not_mix_with_the_snapshots_of_an_earlier_one(tiny):
    train(tiny(snapshot_every=3))
    with pytest.raises(FileExistsError, match=r"snapshots/step-0000003 is there already: no checkpoint of that run"):
        train(tiny())


@pytest.mark.parametrize("left", ["run.json", "online", "assignment"])
def test_a_finished_run_without_checkpoints_is_not_replaced(tiny, tmp_path, left):
    """And each of the two ways out that the message names is one."""
    run = tmp_path / "run"
    train(tiny(max_steps=2, warmup_steps=2))
    for name in {"run.json", "online", "assignment"} - {left}:
        (run / name).rename(tmp_path / name)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    said = rf"run/{left} is there already: no checkpoint of that run was kept: choose another --output_dir, or remove"
    with pytest.raises(FileExistsError, match=said):
        train(tiny(max_steps=2, warmup_steps=2))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    train(tiny(max_steps=2, warmup_steps=2, output_dir=str(tmp_path / "another")))
    shutil.rmtree(run)
    train(tiny(max_steps=2, warmup_steps=2))


def test_a_run_that_has_begun_is_not_done(tiny, monkeypatch):
    config = tiny(checkpoint_every=3)
    train(config)
    monkeypatch.setattr(Trainer, "losses", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny(checkpoint_every=3, resume=True, max_steps=8))
    with pytest.raises(FileNotFoundError, match=r"is not a finished run"):
        moments(Path(config.output_dir))


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        (
            {"learning_rate": 0.05},
            r"learning_rate of a resumed run stays 0.001, .* got 0.05: keep it, or start anew in",
        ),
        ({"threshold_queue": 3}, r"threshold_queue of a resumed run stays 100, .* got 3: keep it, or start anew in"),
        ({"max_steps": 4}, r"step-0000006.safetensors is beyond max_steps = 4: ask for more steps"),
        (
            {"batch_size": 3, "gradient_accumulation_steps": 2},
            "took 2 images a step, this one takes 6: keep batch_size x gradient_accumulation_steps x processes",
        ),
    ],
)
def test_what_would_not_be_the_same_run_is_refused(tiny, fields, refusal, tmp_path):
    """And what the errors advise is the same run, goes on with it, or is another."""
    train(tiny(checkpoint_every=3))
    with pytest.raises(ValueError, match=refusal):
        train(tiny(checkpoint_every=3, resume=True, **fields))
    if "max_steps" in fields:
        train(tiny(checkpoint_every=3, resume=True, max_steps=7))
    else:
        train(tiny(checkpoint_every=3, resume=True))  # what was to be kept is kept
    if "start anew" in refusal:
        train(tiny(output_dir=str(tmp_path / "anew"), **fields))


def test_other_classes_are_never_gone_on_with_and_other_images_only_where_they_are_meant(
    tiny, tmp_path, monkeypatch, capsys
):
    config = tiny(checkpoint_every=3)
    train(config)
    before = left(config)
    fewer = load_shapes("train", num_images=5, image_size=48)
    monkeypatch.setattr(setup, "load_dataset_by_name", lambda *_, **__: fewer)
    resumed = {"checkpoint_every": 3, "max_steps": 8, "resume": True}
    advice = r"images or tags are not .* \(images 6 -> 5.*--allow_changed_data true if .*, or start anew in another"
    with pytest.raises(ValueError, match=advice):
        train(tiny(**resumed))
    train(tiny(max_steps=2, warmup_steps=2, output_dir=str(tmp_path / "fewer")))
    features = fewer.features.copy()
    names = ["zebra", *features["labels"].feature.names[1:]]
    features["labels"] = Sequence(ClassLabel(names=names))
    monkeypatch.setattr(setup, "load_dataset_by_name", lambda *_, **__: fewer.cast(features))
    said = (
        "has the classes disc, square, .*; this one has zebra, square, .*: give the data its former classes, or start "
        "anew in another output_dir"
    )
    for allowed in (False, True):
        with pytest.raises(ValueError, match=said):
            train(tiny(**resumed, allow_changed_data=allowed))
    train(tiny(max_steps=2, warmup_steps=2, output_dir=str(tmp_path / "zebras")))
    assert_equal(before, left(config))

    monkeypatch.setattr(setup, "load_dataset_by_name", lambda *_, **__: fewer)
    train(tiny(**resumed, allow_changed_data=True))
    assert [entry["step"] for entry in log_of(config)] == list(range(1, 9))
    said = capsys.readouterr().out
    assert "resumed at step 6" in said
    assert "allow_changed_data" not in said  # no setting whose change would keep the earlier recipe


def test_a_run_that_goes_on_in_another_way_says_so_and_keeps_both_recipes(tiny, capsys):
    config = tiny(checkpoint_every=3)
    train(config)
    train(tiny(resume=True, checkpoint_every=3, max_steps=8, guidance="noise"))
    said = "other settings from here on: guidance spl -> noise, max_steps 6 -> 8; those so far are in"
    assert said in capsys.readouterr().out
    run = Path(config.output_dir)
    assert TrainingConfig.from_yaml(run / "recipe-to-step-0000006.yaml") == config
    assert TrainingConfig.from_yaml(run / "recipe.yaml") == tiny(checkpoint_every=3, max_steps=8, guidance="noise")
