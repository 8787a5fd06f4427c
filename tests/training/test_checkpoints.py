"""What a checkpoint holds and refuses."""

from pathlib import Path

import pytest
import torch
from runs_of import assert_equal

from cosa_hf._version import __version__
from cosa_hf.training import checkpoints
from cosa_hf.training.checkpoints import Checkpoints, read_checkpoint
from cosa_hf.training.states import Progress


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
