import dataclasses

import pytest
import torch

from cosa_hf import TrainingConfig
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.training.precision import computes_bf16, settle_precision
from cosa_hf.training.setup import run_warnings


@pytest.fixture
def processor(monkeypatch):
    """A machine without an accelerator whose CPU has these instructions."""

    def with_instructions(*names):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True} | dict.fromkeys(names, True))

    return with_instructions


@pytest.mark.parametrize(
    ("instructions", "settled"),
    [((), "no"), (("avx512_f",), "no"), (("avx512_bf16",), "bf16"), (("amx_bf16",), "bf16")],
)
@pytest.mark.parametrize("config", [TrainingConfig(), MultistageConfig(pseudo_labels="labels")])
def test_auto_is_bf16_where_the_processor_has_it(processor, config, instructions, settled):
    processor(*instructions)
    assert settle_precision(dataclasses.replace(config, mixed_precision="auto")).mixed_precision == settled


@pytest.mark.parametrize("chosen", ["no", "bf16", "fp16"])
def test_what_is_chosen_is_kept(processor, chosen):
    processor()
    assert settle_precision(TrainingConfig(mixed_precision=chosen)).mixed_precision == chosen


@pytest.mark.parametrize("config", [TrainingConfig(), MultistageConfig(pseudo_labels="labels", images_per_step=4)])
def test_emulated_bf16_is_said_and_native_is_not(processor, config):
    config = dataclasses.replace(config, batch_size=4, mixed_precision="bf16")
    processor("avx512_f")
    assert [warning[:16] for warning in run_warnings(config, processes=1)] == ["bf16 is emulated"]
    processor("avx512_bf16")
    assert list(run_warnings(config, processes=1)) == []


def test_without_onednn_bf16_is_emulated(processor, monkeypatch):
    processor("bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not computes_bf16()


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_is_asked_unless_the_run_is_on_the_cpu(processor, monkeypatch, native):
    processor()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert computes_bf16() == native
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert not computes_bf16()
