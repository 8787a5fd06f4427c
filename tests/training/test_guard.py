"""Runs that end before their last step: what they save, and what they say."""

import gc
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from cosa_hf.training.loop import train

from cosa_hf.data.dataset import TrainingDataset
from cosa_hf.training import checkpoints, cosa, loop

pytestmark = pytest.mark.usefixtures("few_shapes")

NOISY = {"max_steps": 8, "warmup_steps": 2, "guidance": "noise", "threshold_queue": 3, "threshold_decay": 0.5}


@pytest.fixture
def whole(tiny, tmp_path, left):
    """What the uninterrupted run leaves; without its checkpoints."""
    recipe = tiny(output_dir=str(tmp_path / "whole"), **NOISY)
    train(recipe)
    return left(recipe)


@pytest.fixture
def at_objective(monkeypatch):
    """Call a function with the losses of the n-th step there is, once, and take what it returns for them."""

    def install(step, act):
        objective, calls = cosa.CoSAObjective.__call__, []

        def counted(self, *arguments):
            losses = objective(self, *arguments)
            calls.append(1)
            return act(losses) if len(calls) == step else losses

        monkeypatch.setattr(cosa.CoSAObjective, "__call__", counted)

    return install


def checkpoints_of(recipe) -> list[str]:
    return [path.stem for path in sorted((Path(recipe.output_dir) / "checkpoints").glob("*"))]


def assert_resumes_to(whole, tiny, left, assert_equal, **fields):
    resumed = tiny(resume=True, **NOISY | fields)
    train(resumed)
    assert_equal(whole | {"checkpoint": None}, left(resumed) | {"checkpoint": None})


def test_a_loss_that_is_not_finite_ends_the_run_before_it_does_harm(tiny, whole, left, assert_equal, at_objective):
    at_objective(5, lambda losses: losses | {"loss": losses["loss"] * torch.nan})
    recipe = tiny(**NOISY)
    with pytest.raises(FloatingPointError, match=r"step 5: \[{'cls': .*'csc': .*\] of images \['train-0000") as caught:
        train(recipe)
    assert checkpoints_of(recipe) == ["step-0000004"]
    assert "ended after 4 whole steps; go on from" in caught.value.__notes__[0]
    assert_resumes_to(whole, tiny, left, assert_equal)


def test_weights_that_are_not_finite_are_never_saved(tiny, at_objective, capsys):
    def break_weights(losses):
        # A finite loss whose gradient is not: the step destroys the weights, the next one notices.
        return losses | {"loss": losses["loss"] + (losses["cls"] * 0).sqrt()}

    at_objective(5, break_weights)
    recipe = tiny(checkpoint_every=3, **NOISY)
    with pytest.raises(FloatingPointError, match="step 6"):
        train(recipe)
    assert checkpoints_of(recipe) == ["step-0000003"]
    assert "weights or state are not finite themselves any more: not saved" in capsys.readouterr().err


def test_sigterm_ends_the_run_after_its_step_with_a_checkpoint(tiny, whole, left, assert_equal, at_objective, capsys):
    def terminate(losses):
        os.kill(os.getpid(), signal.SIGTERM)
        return losses

    before = signal.getsignal(signal.SIGTERM)
    at_objective(5, terminate)
    recipe = tiny(**NOISY)
    with pytest.raises(SystemExit) as caught:
        train(recipe)
    assert caught.value.code == 143
    assert "SIGTERM: stopped after step 5; --resume goes on from there" in capsys.readouterr().err
    assert checkpoints_of(recipe) == ["step-0000005"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert_resumes_to(whole, tiny, left, assert_equal)


def test_a_dead_worker_ends_the_run_with_a_checkpoint(tiny, whole, left, assert_equal, monkeypatch, tmp_path):
    item, mark = TrainingDataset.__getitem__, tmp_path / "died"

    def deadly(self, position):
        if position == 11 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, position)

    monkeypatch.setattr(TrainingDataset, "__getitem__", deadly)
    recipe = tiny(num_workers=1, **NOISY)
    # Which of them depends on whether the loader was taking over a batch from the worker just then.
    with pytest.raises((RuntimeError, ConnectionError), match=r"DataLoader worker .* exited|reset by peer") as caught:
        train(recipe)
    assert "go on from" in caught.value.__notes__[-1]
    # The traceback holds the loader, and torch blames a loader's dead worker on whatever child process ends next.
    del caught
    gc.collect()
    (saved,) = checkpoints_of(recipe)
    assert 1 <= int(saved.removeprefix("step-")) <= 5
    assert_resumes_to(whole, tiny, left, assert_equal)


def test_an_error_of_any_kind_saves_the_last_whole_step(tiny, whole, left, assert_equal, at_objective):
    def fail(losses):
        raise MemoryError("CUDA out of memory, say")

    at_objective(4, fail)
    recipe = tiny(**NOISY)
    with pytest.raises(MemoryError) as caught:
        train(recipe)
    assert checkpoints_of(recipe) == ["step-0000003"]
    assert "ended after 3 whole steps; go on from" in caught.value.__notes__[0]
    assert_resumes_to(whole, tiny, left, assert_equal)


def test_what_fails_after_a_step_leaves_that_step(tiny, whole, left, assert_equal, monkeypatch):
    def fail(*arguments, **options):
        raise KeyboardInterrupt

    recipe = tiny(eval_every=5, eval_images=1, **NOISY)
    with monkeypatch.context() as context:
        context.setattr(loop, "evaluate_model", fail)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert checkpoints_of(recipe) == ["step-0000005"]
    assert_resumes_to(whole, tiny, left, assert_equal)


def test_a_run_does_not_notice_that_it_is_evaluated(tiny, whole, left, assert_equal):
    recipe = tiny(eval_every=2, eval_images=1, checkpoint_every=4, **NOISY)
    train(recipe)
    assert_equal(whole["weights"], left(recipe)["weights"])
    sorted((Path(recipe.output_dir) / "checkpoints").iterdir())[-1].unlink()
    train(tiny(resume=True, eval_every=2, eval_images=1, checkpoint_every=4, **NOISY))
    assert_equal(whole["weights"], left(recipe)["weights"])


def test_models_that_cannot_be_saved_leave_the_last_step(tiny, whole, left, assert_equal, monkeypatch):
    def full(*arguments):
        raise OSError("no space left on device")

    recipe = tiny(**NOISY)
    with monkeypatch.context() as context:
        context.setattr(cosa.CoSATask, "save", full)
        with pytest.raises(OSError, match="no space left") as caught:
            train(recipe)
    assert checkpoints_of(recipe) == ["step-0000008"]
    assert "ended after 8 whole steps; go on from" in caught.value.__notes__[0]
    assert_resumes_to(whole, tiny, left, assert_equal)


def test_a_split_to_evaluate_on_is_looked_for_before_the_first_step(tiny, monkeypatch):
    def missing(name, data_dir, split, **options):
        raise FileNotFoundError(f"no list {split}.txt")

    monkeypatch.setattr(loop, "load_dataset_by_name", missing)
    recipe = tiny(eval_every=4, eval_split="nope")
    with pytest.raises(FileNotFoundError, match=r"no list nope.txt"):
        train(recipe)
    assert not Path(recipe.output_dir).exists()


def test_statistics_that_are_not_finite_are_never_saved(tiny, monkeypatch, capsys):
    update = cosa.CoSATask.update

    def poison(self):
        update(self)
        next(self.network.buffers()).fill_(torch.nan)

    monkeypatch.setattr(cosa.CoSATask, "update", poison)
    recipe = tiny(backbone="test_resnet")
    with pytest.raises(FloatingPointError, match="step 2"):
        train(recipe)
    assert checkpoints_of(recipe) == []
    assert "not finite themselves any more: not saved" in capsys.readouterr().err


@pytest.fixture
def no_room():
    """Call it, and the kernel takes no more bytes of a checkpoint."""
    resource = pytest.importorskip("resource")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_ends_the_run_and_says_from_where_to_go_on(tiny, monkeypatch, no_room):
    save, calls = checkpoints.save_file, []

    def filling_up(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            no_room()
        save(*arguments, **options)

    monkeypatch.setattr(checkpoints, "save_file", filling_up)
    recipe = tiny(checkpoint_every=2)
    with pytest.raises(OSError, match=r"cannot write the checkpoint of step 4 .*too large.* step-0000002") as caught:
        train(recipe)
    assert checkpoints_of(recipe) == ["step-0000002"]
    assert "step-0000002.safetensors with --resume" in caught.value.__notes__[0]


@pytest.mark.parametrize("name", ["init_trackers", "log", "end_training"])
def test_a_tracker_that_fails_is_warned_about_once(tiny, monkeypatch, name, left):
    def unreachable(*arguments, **options):
        raise ConnectionError("no route to the dashboard")

    monkeypatch.setattr(Accelerator, name, unreachable)
    recipe = tiny(max_steps=3, tracker="tensorboard")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(recipe)
    said = [str(warning.message) for warning in caught if "tracker tensorboard failed" in str(warning.message)]
    assert len(said) == 1
    assert "no route to the dashboard" in said[0]
    assert [entry["step"] for entry in left(recipe)["log"]] == [1, 2, 3]
