"""Smaller copies of a model: what must not change does not, and what changes changes little."""

import pytest
import torch
from compress import main, narrow_decoder
from tiny import square, tiny_cosa

from cosa_hf import CoSAImageProcessor
from cosa_hf.files import CONFIG


@pytest.fixture
def redundant():
    """A decoder of 16 channels in each layer, of which every second half follows from the first."""
    model = tiny_cosa(decoder_dilation=1)
    with torch.no_grad():
        model.decoder.conv6.weight[8:] = 2 * model.decoder.conv6.weight[:8]
        model.decoder.conv7.weight[8:] = 0.5 * model.decoder.conv7.weight[:8]
    return model


def test_what_follows_from_the_rest_can_go(redundant):
    images = torch.rand(4, 3, 64, 64)
    narrow = narrow_decoder(redundant, images.split(2), 8)
    assert narrow.config.decoder_channels == 8
    assert redundant.config.decoder_channels == 16
    unseen = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        before, after = redundant(unseen), narrow(unseen)
    assert torch.allclose(before.logits, after.logits, atol=1e-4 * before.logits.abs().max())
    for name in ("cam_logits", "aux_cam_logits", "cls_logits", "aux_cls_logits"):
        assert torch.equal(before[name], after[name])


def test_dead_channels_leave_nothing_to_fit(redundant):
    """More channels are kept than carry anything."""
    with torch.no_grad():
        redundant.decoder.conv6.weight[4:] = 0
        narrow = narrow_decoder(redundant, [torch.rand(2, 3, 64, 64)], 10)
        unseen = torch.rand(1, 3, 64, 64)
        before, after = redundant(unseen).logits, narrow(unseen).logits
    assert torch.allclose(before, after, atol=1e-4 * before.abs().max())


@pytest.mark.parametrize("channels", [0, 17])
def test_width_out_of_range(redundant, channels):
    with pytest.raises(ValueError, match=f"channels={channels} must be between 1 and the decoder's 16"):
        narrow_decoder(redundant, [], channels)


def full_disk(*_):
    raise OSError("No space left on device")


def test_command(redundant, tmp_path, capsys, monkeypatch):
    redundant.save_pretrained(tmp_path / "model")
    square(64).save_pretrained(tmp_path / "model")
    options = ["--decoder_channels", "8", "--dataset", "shapes", "--split", "val", "--num_images", "3"]
    command = [str(tmp_path / "model"), str(tmp_path / "small"), *options]
    with monkeypatch.context() as patch:
        patch.setattr(CoSAImageProcessor, "save_pretrained", full_disk)
        with pytest.raises(SystemExit):
            main(command)
    assert not (tmp_path / "small" / CONFIG).exists(), "half a model is none"
    main(command)
    assert capsys.readouterr().out.endswith("M parameters\n")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "model")]
    assert sizes[0] < sizes[1] / 2
    assert CoSAImageProcessor.from_pretrained(tmp_path / "small").size["height"] == 64
    with pytest.raises(SystemExit, match="error: no model at"):
        main([str(tmp_path / "none"), str(tmp_path / "other"), *options])
    before = (tmp_path / "model/model.safetensors").read_bytes()
    for target, message in (("model", "is there already: name a new directory"), ("model/config.json/x", "is a file")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main([str(tmp_path / "model"), str(tmp_path / target), *options])
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
