"""Models stored in half precision and computed with in single."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import square, tiny_cosa

from cosa_hf import CoSAForWeaklySupervisedSegmentation
from cosa_hf.files import CONFIG
from cosa_hf.inference import load_model
from cosa_hf.publishing.half import save_half


def test_stored_in_half_and_computed_with_in_single_precision(tmp_path):
    model = tiny_cosa()
    save_half(model, square(64), tmp_path / "half")
    stored = load_file(tmp_path / "half/model.safetensors")
    assert stored["classifier.weight"].dtype == torch.float16
    loaded = CoSAForWeaklySupervisedSegmentation.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.classifier.weight, model.classifier.weight.half().float())


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    model = tiny_cosa()
    with torch.no_grad():
        model.classifier.weight[0] = 1e6
    with pytest.raises(ValueError, match=r"^classifier.weight: values that float16 cannot hold"):
        save_half(model, square(64), tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_command_writes_a_model_of_half_the_size_that_any_command_takes(segmentation_only, tmp_path, cosa_hf):
    before, _ = load_model(str(segmentation_only), "cpu")
    printed = cosa_hf("export", segmentation_only, tmp_path / "small", "--format", "half")
    assert printed.startswith(f"{tmp_path / 'small'}: ")
    after, processor = load_model(str(tmp_path / "small"), "cpu")
    assert type(after) is type(before)
    assert after.dtype == torch.float32
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, rtol=1e-3, atol=1e-6)
    assert type(processor) is type(load_model(str(segmentation_only), "cpu")[1])
    half, whole = (
        sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        for directory in (tmp_path / "small", type(tmp_path)(segmentation_only))
    )
    assert half < 0.6 * whole


def test_command_replaces_nothing(segmentation_only, tmp_path, complaint):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / CONFIG).write_text("mine")
    said = complaint("export", segmentation_only, tmp_path / "small", "--format", "half")
    assert "is there already" in said
    assert (tmp_path / "small" / CONFIG).read_text() == "mine"
