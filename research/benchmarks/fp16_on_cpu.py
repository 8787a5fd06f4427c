"""Train in fp16 on a CPU as `cosa-hf train` does on a GPU: the same loop, autocast to fp16, scaled gradients.

Accelerate does not offer fp16 on CPUs, where it is several times as slow as fp32; torch has both halves of it.

    python research/benchmarks/fp16_on_cpu.py --recipe shapes-tiny --max_steps 650 --warmup_steps 225 \\
        --output_dir runs/fp16
"""

import sys
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

from cosa_hf.commands.train import parse
from cosa_hf.training import setup, trainer


class HalfAccelerator(Accelerator):
    """An Accelerator that takes `mixed_precision="fp16"` at its word on any device."""

    scaling: dict[str, Any] = {}  # noqa: RUF012 (arguments of the scaler, for tests)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.native_amp, self.scaler = True, torch.amp.GradScaler(self.device.type, **self.scaling)


if __name__ == "__main__":
    with mock.patch.object(setup, "Accelerator", HalfAccelerator):
        print(trainer.train(parse([*sys.argv[1:], "--mixed_precision", "fp16"])))
