"""Checkpoints of a run: written whole or not at all, found again by their step."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator


class Progress:
    """How many optimiser steps are behind us and how long they took; saved with a checkpoint."""

    def __init__(self) -> None:
        self.step = 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall clock of the run, without the time between an interruption and its resume."""
        return time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        # The first checkpoints did not count time.
        self._started = time.monotonic() - state.get("seconds", 0.0)


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int) -> Path:
    """Write all registered state to `output_dir/checkpoints/step-N`, and only then remove the one before."""
    final = output_dir / "checkpoints" / f"step-{step:07d}"
    unfinished = final.with_name(f".{final.name}")
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(unfinished, final)
        for older in _checkpoints(output_dir)[:-1]:
            shutil.rmtree(older)
    accelerator.wait_for_everyone()
    return final


def newest_checkpoint(output_dir: Path) -> Path:
    """The checkpoint of the latest step.

    Raises:
        FileNotFoundError: there is none to resume from.
    """
    checkpoints = _checkpoints(output_dir)
    if not checkpoints:
        raise FileNotFoundError(
            f"nothing to resume: no checkpoint in {output_dir / 'checkpoints'} (start without --resume, and with "
            "--checkpoint_every N)"
        )
    return checkpoints[-1]


def _checkpoints(output_dir: Path) -> list[Path]:
    return sorted((output_dir / "checkpoints").glob("step-*"))
