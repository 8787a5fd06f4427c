"""In what precision a run computes where its recipe leaves that to the machine."""

import dataclasses
from typing import Literal

import torch
from accelerate.utils import parse_flag_from_env

from cosa_hf.training.config import AnyConfig


def settle_precision(config: AnyConfig) -> AnyConfig:
    """A configuration whose `mixed_precision` is no longer `auto`: bf16 where it is native, else fp32.

    Example:
        >>> from cosa_hf import TrainingConfig
        >>> settle_precision(TrainingConfig(mixed_precision="auto")).mixed_precision in ("bf16", "no")
        True
    """
    if config.mixed_precision != "auto":
        return config
    return dataclasses.replace(config, mixed_precision=native_precision())


def native_precision() -> Literal["bf16", "no"]:
    """`bf16` where it is native, else `no`, which is fp32.

    Example:
        >>> native_precision() in ("bf16", "no")
        True
    """
    return "bf16" if computes_bf16() else "no"


def computes_bf16() -> bool:
    """Whether the device that Accelerate takes has bf16 arithmetic of its own.

    Where it is emulated, a forward pass takes many times as long as in fp32 (research/notes/speed.md).
    """
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or parse_flag_from_env("ACCELERATE_USE_CPU"):
        processor = torch.cpu.get_capabilities()
        native = any(processor.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return native and torch.backends.mkldnn.is_available()  # nothing else makes use of these instructions
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


__all__ = ["computes_bf16", "native_precision", "settle_precision"]
