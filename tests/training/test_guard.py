"""Runs that end before their last step: what they save, and what they say."""

import gc
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from runs_of import assert_equal, checkpoints_of, left, load_few_shapes, log_of, on_call, tiny_config

from cosa_hf.assignment.network import AssignmentNetwork
from cosa_hf.data.dataset import TrainingDataset
from cosa_hf.objective.overall import CoSAObjective
from cosa_hf.training import checkpoints, setup, trainer
from cosa_hf.training.checkpoints import Checkpoints
from cosa_hf.training.guard import Phase, RunGuard
from cosa_hf.training.states import Progress
from cosa_hf.training.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("few_shapes")

NOISY = {"max_steps": 8, "warmup_steps": 2, "guidance": "noise", "threshold_queue": 3, "threshold_decay": 0.5}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What the uninterrupted run leaves; without its checkpoints."""
    config = tiny_config(output_dir=str(tmp_path_factory.mktemp("uninterrupted")), **NOISY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_dataset_by_name", load_few_shapes)
        train(config)
    return left(config)


def names_of(config) -> list[str]:
    return [path.stem for path in checkpoints_of(config)]


def assert_resumes_to(uninterrupted, config):
    train(tiny_config(resume=True, output_dir=config.output_dir, **NOISY))
    assert_equal(uninterrupted | {"checkpoint": None}, left(config) | {"checkpoint": None})


def fail_with(error):
    def act(call):
        raise error

    return act


def not_finite(call):
    losses = call()
    return losses | {"loss": losses["loss"] * torch.nan}


def terminate(call):
    os.kill(os.getpid(), signal.SIGTERM)
    return call()


@pytest.mark.parametrize(
    ("owner", "name", "number", "act", "error", "steps"),
    [
        pytest.param(CoSAObjective, "__call__", 5, not_finite, FloatingPointError, 4, id="loss is not finite"),
        pytest.param(CoSAObjective, "__call__", 5, terminate, SystemExit, 5, id="SIGTERM"),
        pytest.param(CoSAObjective, "__call__", 4, fail_with(MemoryError()), MemoryError, 3, id="error in a step"),
        pytest.param(trainer, "evaluate", 1, fail_with(KeyboardInterrupt()), KeyboardInterrupt, 5, id="evaluation"),
        pytest.param(Trainer, "_save", 1, fail_with(OSError("no room")), OSError, 8, id="models cannot be saved"),
    ],
)
def test_a_run_that_is_cut_short_saves_its_last_complete_step_and_goes_on_from_it(
    tiny, uninterrupted, monkeypatch, capsys, owner, name, number, act, error, steps
):
    handler = signal.getsignal(signal.SIGTERM)
    config = tiny(eval_every=5 if name == "evaluate" else 0, eval_images=1, **NOISY)
    with monkeypatch.context() as patch:
        on_call(owner, name, number, act, patch.setattr)
        with pytest.raises(error) as caught:
            train(config)
    assert names_of(config) == [f"step-000000{steps}"]
    assert f"ended after {steps} complete steps; go on from" in caught.value.__notes__[0]
    assert signal.getsignal(signal.SIGTERM) is handler
    if error is FloatingPointError:
        caught.match(r"step 5: \[{'cls': .*'csc': .*\] of images \['train-0000")
    if error is SystemExit:
        assert caught.value.code == 143
        assert "SIGTERM: stopped after step 5; --resume goes on from there" in capsys.readouterr().err
    assert_resumes_to(uninterrupted, config)


def test_a_dead_worker_ends_the_run_with_a_checkpoint(tiny, uninterrupted, monkeypatch, tmp_path):
    item, mark = TrainingDataset.__getitem__, tmp_path / "died"

    def deadly(self, position):
        if position == 11 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, position)

    monkeypatch.setattr(TrainingDataset, "__getitem__", deadly)
    config = tiny(num_workers=1, **NOISY)
    # Which of them depends on whether the loader was taking over a batch from the worker just then.
    with pytest.raises((RuntimeError, ConnectionError), match=r"DataLoader worker .* exited|reset by peer") as caught:
        train(config)
    assert "go on from" in caught.value.__notes__[-1]
    # The traceback holds the loader, and torch blames a loader's dead worker on whatever child process ends next.
    del caught
    gc.collect()
    (saved,) = names_of(config)
    assert 1 <= int(saved.removeprefix("step-")) <= 5
    assert_resumes_to(uninterrupted, config)


def destroy_weights(call):
    """A finite loss whose gradient is not: the step destroys the weights, the next one notices."""
    losses = call()
    return losses | {"loss": losses["loss"] + (losses["cls"] * 0).sqrt()}


def test_weights_that_are_not_finite_are_never_saved(tiny, monkeypatch, capsys):
    on_call(CoSAObjective, "__call__", 5, destroy_weights, monkeypatch.setattr)
    config = tiny(checkpoint_every=3, **NOISY)
    with pytest.raises(FloatingPointError, match="step 6"):
        train(config)
    assert names_of(config) == ["step-0000003"]
    assert "weights or state are not finite themselves any more: not saved" in capsys.readouterr().err


def test_statistics_that_are_not_finite_are_never_saved(tiny, monkeypatch, capsys):
    update = AssignmentNetwork.update

    def poison(self, online):
        update(self, online)
        next(online.buffers()).fill_(torch.nan)

    monkeypatch.setattr(AssignmentNetwork, "update", poison)
    config = tiny(backbone="test_resnet")
    with pytest.raises(FloatingPointError, match="step 2"):
        train(config)
    assert names_of(config) == []
    assert "not finite themselves any more: not saved" in capsys.readouterr().err


def test_a_run_does_not_notice_that_it_is_evaluated(tiny, uninterrupted):
    settings = {"eval_every": 2, "eval_images": 1, "checkpoint_every": 4, **NOISY}
    config = tiny(**settings)
    train(config)
    assert_equal(uninterrupted["weights"], left(config)["weights"])
    checkpoints_of(config)[-1].unlink()
    train(tiny(resume=True, **settings))
    assert_equal(uninterrupted["weights"], left(config)["weights"])


def test_a_split_to_evaluate_on_is_looked_for_before_the_first_step(tiny, monkeypatch):
    def only_training(name, data_dir, split, masks=False, options=None):
        if split == "nope":
            raise FileNotFoundError(f"no list {split}.txt")
        return load_few_shapes(name, data_dir, split, masks)

    monkeypatch.setattr(setup, "load_dataset_by_name", only_training)
    config = tiny(eval_every=4, eval_split="nope")
    with pytest.raises(FileNotFoundError, match=r"no list nope.txt"):
        train(config)
    assert not Path(config.output_dir).exists()


@pytest.fixture
def no_room():
    """Call it, and the kernel takes no more bytes of a checkpoint."""
    resource = pytest.importorskip("resource")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_ends_the_run_and_says_from_where_to_go_on(tiny, monkeypatch, capsys, no_room):
    on_call(checkpoints, "save_file", 2, lambda call: no_room() or call(), monkeypatch.setattr)
    config = tiny(checkpoint_every=2)
    with pytest.raises(OSError, match=r"cannot write the checkpoint of step 4 .*too large.* step-0000002") as caught:
        train(config)
    assert names_of(config) == ["step-0000002"]
    assert "step-0000002.safetensors with --resume" in caught.value.__notes__[0]
    assert "\nerror: cannot write the checkpoint of step 4" in capsys.readouterr().err  # nor is there room at the end


@pytest.mark.parametrize("name", ["init_trackers", "log", "end_training"])
def test_a_tracker_that_fails_is_warned_about_once(tiny, monkeypatch, name):
    def unreachable(*arguments, **options):
        raise ConnectionError("no route to the dashboard")

    monkeypatch.setattr(Accelerator, name, unreachable)
    config = tiny(max_steps=3, tracker="tensorboard")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config)
    said = [str(warning.message) for warning in caught if "tracker tensorboard failed" in str(warning.message)]
    assert len(said) == 1
    assert "no route to the dashboard" in said[0]
    assert [entry["step"] for entry in log_of(config)] == [1, 2, 3]


class Steps:
    """A guard after three complete steps, and its calls in the order of a step."""

    def __init__(self, accelerator, directory):
        progress = Progress(1)
        progress.step = 3
        self.checkpoints = Checkpoints(accelerator, directory, 2, {"progress": progress})
        self.guard = RunGuard(accelerator, self.checkpoints, progress)
        self.batches = self.guard.batches([{}, {}, {}])

    def take(self, call: str) -> None:
        if call == "next batch":
            next(self.batches)
        elif call == "require_finite":
            self.guard.require_finite([{"loss": torch.tensor(1.0)}], ["a"])
        else:
            self.guard.commit()

    def take_until(self, phase: Phase) -> None:
        for call in ("next batch", "require_finite", "commit"):
            if self.guard.phase is not phase:
                self.take(call)


@pytest.fixture
def steps(accelerator, tmp_path):
    return Steps(accelerator, tmp_path)


IN_ORDER = {
    Phase.BETWEEN_STEPS: ("next batch", Phase.COMPUTING),
    Phase.COMPUTING: ("require_finite", Phase.CHANGING),
    Phase.CHANGING: ("commit", Phase.BETWEEN_STEPS),
}


def test_calls_in_their_order_go_round(steps):
    with steps.guard:
        for _ in range(2):
            for phase, (call, after) in IN_ORDER.items():
                assert steps.guard.phase is phase
                steps.take(call)
                assert steps.guard.phase is after


@pytest.mark.parametrize(
    ("phase", "call"),
    [(phase, call) for phase, (right, _) in IN_ORDER.items() for call, _ in IN_ORDER.values() if call != right],
)
def test_a_call_out_of_order_is_refused(steps, phase, call):
    with steps.guard:
        steps.take_until(phase)
        with pytest.raises(AssertionError, match=f": {phase.value}$"):
            steps.take(call)


@pytest.mark.parametrize("phase", list(Phase), ids=lambda phase: phase.value)
def test_an_error_saves_the_last_complete_step_but_not_while_weights_change(steps, phase):
    def fail():
        with steps.guard:
            steps.take_until(phase)
            raise MemoryError

    with pytest.raises(MemoryError) as caught:
        fail()
    saved = [path.stem for path in steps.checkpoints.all()]
    assert saved == ([] if phase is Phase.CHANGING else ["step-0000003"])
    where = "go on from" if saved else "there is no checkpoint to go on from"
    assert f"the run ended after 3 complete steps; {where}" in caught.value.__notes__[0]
