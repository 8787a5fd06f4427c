"""The files of a run: what a checkpoint holds and refuses, and the networks of a run as they were on the way."""

import json
from pathlib import Path

import pytest
import torch
from runs_of import assert_equal
from safetensors.torch import load_file

from cosa_hf._version import __version__
from cosa_hf.training import checkpoints
from cosa_hf.training.checkpoints import Checkpoints, Progress, TrainingData, moments, read_checkpoint
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.trainer import train


class Holder:
    """A part of a checkpoint that holds what it is given."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


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


def test_the_clock_and_the_unreadable_images_go_on_where_a_checkpoint_left_them(accelerator, tmp_path):
    before, after = Progress(4), Progress(4)
    before.load_state_dict({"step": 3, "images_per_step": 4, "unreadable": ["a"], "seconds": 5000.0})
    before.unreadable.add("b")
    Checkpoints(accelerator, tmp_path, 1, {"progress": before}).save(3)
    Checkpoints(accelerator, tmp_path, 1, {"progress": after}).load()
    assert (after.step, after.unreadable) == (3, {"a", "b"})
    assert 5000 <= after.seconds < 5100


def test_any_state_comes_back_as_it_was(accelerator, tmp_path):
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


def test_a_snapshot_is_saved_in_place_of_what_has_become_of_it(accelerator, tmp_path):
    early, late = Holder({"value": torch.zeros(2)}), Holder({"value": torch.zeros(2)})
    there = Checkpoints(accelerator, tmp_path, 9, {"early": early, "late": late}, before_update=["early"])
    generator = torch.get_rng_state()
    there.snapshot()
    early.state["value"] += 1
    torch.rand(3)
    there.save(1)
    there.drop_snapshot()
    there.save(2)
    there.load()
    assert early.state["value"].tolist() == [1, 1]
    (there.directory / "step-0000002.safetensors").unlink()
    there.load()
    assert early.state["value"].tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_file_that_cannot_be_written_names_the_last_complete_one(accelerator, tmp_path, monkeypatch):
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
    with pytest.raises(OSError, match=r"step 6 .*The last complete one is step-0000005\.safetensors"):
        there.save(6)
    assert [path.name for path in there.directory.iterdir()] == ["step-0000005.safetensors"]
    assert set(read_checkpoint(there.all()[0])) == {"progress", "random"}


@pytest.mark.parametrize(
    ("written", "version"), [({}, "0.1.0"), ({"format": "99", "version": "9.8.7"}, "9.8.7")], ids=["first", "later"]
)
def test_a_checkpoint_of_another_format_names_the_version_that_reads_it(
    accelerator, tmp_path, monkeypatch, written, version
):
    there, save_file = Checkpoints(accelerator, tmp_path, 2, {"progress": Progress(4)}), checkpoints.save_file

    def save_in_other_format(tensors, path, metadata):
        save_file(tensors, path, metadata={name: metadata[name] for name in ("tree", "checksum")} | written)

    monkeypatch.setattr(checkpoints, "save_file", save_in_other_format)
    path = there.save(1)
    refusal = rf"step-0000001.safetensors was written by cosa_hf {version}, .* this version \({__version__}\) does not"
    with pytest.raises(ValueError, match=refusal):
        there.load()
    assert path.exists()  # not taken for a damaged one


ROWS = [("a", [0]), ("b", [1, 0]), ("c", [1])]


@pytest.mark.parametrize(
    ("rows", "difference"),
    [
        (ROWS[:2], "images 3 -> 2, dog 2 -> 1"),
        ([*ROWS, ("d", [])], "images 3 -> 4"),
        ([("a", [1]), *ROWS[1:]], "cat 2 -> 1, dog 2 -> 3"),
        ([("x", [0]), *ROWS[1:]], "as many of each class, but other ids or tags"),
        ([("a", [1]), ROWS[1], ("c", [0])], "as many of each class, but other ids or tags"),
        (ROWS[::-1], "as many of each class, but other ids or tags"),  # the order of images is drawn from positions
        (None, "images 3 -> 0, cat 2 -> 0, dog 2 -> 0"),
    ],
    ids=["image less", "image more", "other tag", "other id", "tags changed places", "other order", "stream"],
)
def test_other_images_and_tags_are_refused_unless_they_are_meant(rows, difference):
    before = TrainingData(["cat", "dog"], ROWS).state_dict()
    with pytest.raises(ValueError, match=rf"not those of the checkpoint's run \({difference}\): .*allow_changed_data"):
        TrainingData(["cat", "dog"], rows).load_state_dict(before)
    TrainingData(["cat", "dog"], rows, allow_changed=True).load_state_dict(before)


def test_the_same_data_go_on_whatever_the_order_of_tags():
    reordered = [(image_id, tags[::-1]) for image_id, tags in ROWS]
    TrainingData(["cat", "dog"], reordered).load_state_dict(TrainingData(["cat", "dog"], ROWS).state_dict())
    TrainingData(["cat", "dog"], None).load_state_dict(TrainingData(["cat", "dog"], None).state_dict())


@pytest.mark.parametrize("allow_changed", [False, True])
@pytest.mark.parametrize("names", [["zebra", "dog"], ["dog", "cat"], ["cat", "dog", "cow"]])
def test_other_classes_are_refused_in_any_case(names, allow_changed):
    before = TrainingData(["cat", "dog"], ROWS).state_dict()
    with pytest.raises(ValueError, match=rf"has the classes cat, dog; this one has {', '.join(names)}: give the data"):
        TrainingData(names, ROWS, allow_changed).load_state_dict(before)


@pytest.mark.usefixtures("few_shapes")
def test_snapshots_are_the_networks_of_their_step(tiny, tmp_path):
    config = tiny(max_steps=4, warmup_steps=2, snapshot_every=2, threshold=0.4)
    train(config)
    run = Path(config.output_dir)
    first, last = moments(run)
    assert (first.step, last.step) == (2, 4)
    assert (first.threshold, first.aux_threshold) == (0.4, 0.4)  # warm-up: not moved yet
    assert (last.online, last.assignment) == (run / "online", run / "assignment")
    assert sorted(path.name for path in (run / "snapshots").iterdir()) == ["step-0000002", "step-0000004"]
    for name in ("online", "assignment"):
        at_end = load_file(run / name / "model.safetensors")
        kept = load_file(run / "snapshots" / "step-0000004" / name / "model.safetensors")
        before = load_file(getattr(first, name) / "model.safetensors")
        assert all(torch.equal(at_end[key], kept[key]) for key in at_end)
        assert not all(torch.equal(at_end[key], before[key]) for key in at_end)


def written_run(tmp_path, entries, snapshots=(10,)):
    TrainingConfig(max_steps=30, warmup_steps=0, lr_warmup_steps=0).to_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for step in snapshots:
        (tmp_path / f"snapshots/step-{step:07d}/assignment").mkdir(parents=True)
        (tmp_path / f"snapshots/step-{step:07d}/assignment/config.json").touch()
    return moments(tmp_path)


def test_thresholds_are_those_of_the_nearest_line_and_of_the_last_run_over_it(tmp_path):
    found = written_run(
        tmp_path,
        [
            {"step": 8, "xi": 0.1, "aux_xi": 0.2},
            {"step": 8, "eval/seg": 3.0},
            {"step": 8, "xi": 0.3, "aux_xi": 0.4},  # resumed from an earlier step
            {"step": 30, "xi": 0.5, "aux_xi": 0.6},
        ],
    )
    assert [(moment.step, moment.threshold, moment.aux_threshold) for moment in found] == [
        (10, 0.3, 0.4),
        (30, 0.5, 0.6),
    ]


def test_a_run_that_is_not_finished_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a finished run: it has no run.json"):
        moments(tmp_path)
