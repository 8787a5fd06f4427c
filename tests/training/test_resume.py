"""A run that was killed and resumed equals the one that was not, bit for bit."""

import json
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
from cosa_hf.training.loop import train
from safetensors.torch import save_file

from cosa_hf.assignment.network import AssignmentNetwork
from cosa_hf.training import checkpoints, cosa, loop
from cosa_hf.training.checkpoints import Checkpoints, Progress, moments, read_checkpoint
from cosa_hf.training.config import TrainingConfig

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


def run_and_die(recipe, patch) -> None:
    """Train in a process of its own that kills itself with signal 9 where `patch` says."""

    def child():
        patch()
        train(recipe)

    AcceleratorState._reset_state(True)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def die_at(owner, name: str, call: int):
    """Let a function's n-th call be the process's last act."""

    def patch():
        whole, calls = getattr(owner, name), []

        def counted(*arguments, **options):
            calls.append(1)
            if len(calls) == call:
                kill_itself()
            return whole(*arguments, **options)

        setattr(owner, name, counted)

    return patch


def die_writing():
    """Leave half a file where a checkpoint is being written."""

    def half(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        kill_itself()

    checkpoints.save_file = half


def test_a_run_killed_at_any_moment_and_resumed_equals_the_uninterrupted_one(tiny, tmp_path, left, assert_equal):
    whole = tiny(output_dir=str(tmp_path / "whole"), **EVERYTHING)
    train(whole)
    expected = left(whole)
    assert [entry["step"] for entry in expected["log"]] == [4, 5, 8, 10, 12, 14]

    killed = tiny(output_dir=str(tmp_path / "killed"), **EVERYTHING)
    resumed = tiny(output_dir=str(tmp_path / "killed"), resume=True, **EVERYTHING)
    directory = tmp_path / "killed/checkpoints"
    draw = random.Random(0)
    # The first death comes after the checkpoint of step 3, and two steps at the least are made in between.
    run_and_die(killed, die_at(AssignmentNetwork, "update", draw.randint(4, 5)))
    run_and_die(resumed, die_at(cosa.CoSAObjective, "__call__", draw.randint(1, 3)))
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
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny, tmp_path, left, assert_equal, capsys, damage):
    recipe = tiny(checkpoint_every=2, guidance="noise")
    train(recipe)
    expected = left(recipe)
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
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


def test_a_resume_opens_no_pickle(tiny, monkeypatch):
    train(tiny(checkpoint_every=4))

    def forbidden(*_, **__):
        raise AssertionError("a pickle was opened")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, forbidden)
    train(tiny(checkpoint_every=4, resume=True))


def test_nothing_whole_to_resume_from_is_said(tiny, tmp_path):
    resumed = tiny(resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume: no whole checkpoint"):
        train(resumed)
    train(tiny(max_steps=2, warmup_steps=2, checkpoint_every=2))
    (path,) = (tmp_path / "run/checkpoints").iterdir()
    path.write_bytes(b"nonsense")
    with pytest.raises(FileNotFoundError, match="nothing to resume: no whole checkpoint"):
        train(resumed)


def test_the_newest_are_kept(tiny, tmp_path):
    train(tiny(checkpoint_every=1, keep_checkpoints=3))
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step-000000{step}.safetensors" for step in (4, 5, 6)]


def test_a_run_does_not_mix_with_the_checkpoints_of_an_earlier_one(tiny, tmp_path):
    train(tiny(checkpoint_every=3))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match=r"step-0000006\.safetensors is of an earlier run"):
        train(tiny(checkpoint_every=3, tracker="tensorboard"))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    shutil.rmtree(tmp_path / "run/checkpoints")
    train(tiny(max_steps=2, warmup_steps=2))
    entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]


def test_a_run_does_not_mix_with_the_snapshots_of_an_earlier_one(tiny):
    train(tiny(snapshot_every=3))
    with pytest.raises(ValueError, match=r"snapshots/step-0000006 is of an earlier run: --resume it, remove it"):
        train(tiny())


def test_a_run_that_has_begun_is_not_done(tiny, monkeypatch):
    recipe = tiny()
    train(recipe)
    monkeypatch.setattr(cosa.CoSATask, "losses", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(recipe)
    with pytest.raises(FileNotFoundError, match=r"is no finished run"):
        moments(Path(recipe.output_dir))


def test_what_the_checkpoint_holds_cannot_be_changed(tiny):
    train(tiny(checkpoint_every=3))
    with pytest.raises(ValueError, match=r"learning_rate of a resumed run stays 0.001, .* got 0.05"):
        train(tiny(resume=True, learning_rate=0.05))
    with pytest.raises(ValueError, match=r"threshold_queue of a resumed run stays 100, .* got 3"):
        train(tiny(resume=True, threshold_queue=3))


def test_fewer_steps_than_are_done_are_refused(tiny):
    train(tiny(checkpoint_every=3))
    with pytest.raises(ValueError, match=r"step-0000006.safetensors is beyond max_steps = 4"):
        train(tiny(resume=True, max_steps=4))


def test_a_run_that_goes_on_in_another_way_says_so_and_keeps_both_recipes(tiny, capsys):
    recipe = tiny(checkpoint_every=3)
    train(recipe)
    train(tiny(resume=True, checkpoint_every=3, max_steps=8, guidance="noise"))
    said = "other settings from here on: max_steps 6 -> 8, guidance spl -> noise; those so far are in"
    assert said in capsys.readouterr().out
    run = Path(recipe.output_dir)
    assert TrainingConfig.from_yaml(run / "recipe-to-step-0000006.yaml") == recipe
    assert TrainingConfig.from_yaml(run / "recipe.yaml") == tiny(checkpoint_every=3, max_steps=8, guidance="noise")


def test_a_checkpoint_of_another_kind_of_run_is_named(accelerator, tmp_path):
    Checkpoints(accelerator, tmp_path, 2, {"network": torch.nn.Linear(1, 1)}).save(1)
    other = Checkpoints(accelerator, tmp_path, 2, {"online": torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match=r"of another kind of run: only one of the two has network, online"):
        other.load()


def test_files_that_are_no_checkpoints_are_left_alone(accelerator, tmp_path):
    checkpoints = Checkpoints(accelerator, tmp_path, 1, {"network": torch.nn.Linear(1, 1)})
    checkpoints.save(1)
    mine = tmp_path / "checkpoints" / "step-final.safetensors"
    mine.touch()
    checkpoints.save(2)
    assert checkpoints.load().stem == "step-0000002"
    assert mine.exists()


def test_steps_of_another_size_cannot_be_resumed(tiny):
    train(tiny(checkpoint_every=3))
    with pytest.raises(ValueError, match="took 2 images a step, this one takes 6"):
        train(tiny(checkpoint_every=3, resume=True, batch_size=3, gradient_accumulation_steps=2))


def test_the_clock_and_the_unreadable_images_go_on_where_a_checkpoint_left_them(accelerator, tmp_path):
    before, after = Progress(4), Progress(4)
    before.load_state_dict({"step": 3, "images_per_step": 4, "unreadable": ["a"], "seconds": 5000.0})
    before.unreadable.add("b")
    Checkpoints(accelerator, tmp_path, 1, {"progress": before}).save(3)
    Checkpoints(accelerator, tmp_path, 1, {"progress": after}).load()
    assert (after.step, after.unreadable) == (3, {"a", "b"})
    assert 5000 <= after.seconds < 5100


class Holder:
    """A part of a checkpoint that holds what it is given."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    return loop.Accelerator(cpu=True)


def test_any_state_comes_back_as_it_was(accelerator, tmp_path, assert_equal):
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {
        0: {"step": torch.tensor(3.0), "weights": channels_last, "none": None, "empty": {}},
        "flags": torch.tensor([True, False]),
        "half": torch.randn(3).bfloat16(),
        "rates": (0.1, 1e-300, float("inf")),
        "names": ["a", "ξ†"],
    }
    Checkpoints(accelerator, tmp_path, 1, {"part": Holder(state)}).save(7)
    part = Holder(None)
    there = Checkpoints(accelerator, tmp_path, 1, {"part": part})
    assert there.load().name == "step-0000007.safetensors"
    assert_equal(state | {"rates": list(state["rates"])}, part.state)
    assert part.state[0]["weights"].is_contiguous(memory_format=torch.channels_last)
    assert there.saved_step == 7


def test_what_is_held_is_saved_in_place_of_what_has_become_of_it(accelerator, tmp_path):
    early, late = Holder({"value": torch.zeros(2)}), Holder({"value": torch.zeros(2)})
    there = Checkpoints(accelerator, tmp_path, 9, {"early": early, "late": late}, before_update=["early"])
    generator = torch.get_rng_state()
    there.hold()
    early.state["value"] += 1
    torch.rand(3)
    assert there.held
    there.save(1)
    there.release()
    assert not there.held
    there.save(2)
    there.load()
    assert early.state["value"].tolist() == [1, 1]
    (there.directory / "step-0000002.safetensors").unlink()
    there.load()
    assert early.state["value"].tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_file_that_cannot_be_written_names_the_last_whole_one(accelerator, tmp_path, monkeypatch):
    there = Checkpoints(accelerator, tmp_path, 2, {"progress": Progress(4)})

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"step 5 .*No space left on device.*There is none before it"):
        there.save(5)
    monkeypatch.undo()
    there.save(5)
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"step 6 .*The last whole one is step-0000005\.safetensors"):
        there.save(6)
    assert [path.name for path in there.directory.iterdir()] == ["step-0000005.safetensors"]
    assert set(read_checkpoint(there.all()[0])) == {"progress", "random"}
