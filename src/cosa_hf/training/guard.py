"""What ends a run before its last step, and how: with a checkpoint where there can be one, and words that say why."""

import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from cosa_hf.training.checkpoints import Checkpoints, Progress


class RunGuard:
    """Around the loop over steps: SIGTERM, images that cannot be had, a loss that is not finite, any other error.

    Before the run ends, the state after the last whole step is saved if it is finite, without what an unfinished step
    changed. Only while the optimiser changes the weights there is none, until the step is `whole`. On several processes
    that takes all of them, so an error of one alone saves nothing and leaves the run to its regular checkpoints;
    SIGTERM, the loader and the loss are looked at together, once a step.

    Args:
        accelerator: of the run.
        checkpoints: where to save.
        progress: the step counter.
    """

    def __init__(self, accelerator: Accelerator, checkpoints: Checkpoints, progress: Progress) -> None:
        self.accelerator, self.checkpoints, self.progress = accelerator, checkpoints, progress
        self.terminated = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "RunGuard":
        self._handle(signal.SIGTERM, self._note_termination)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error is None:
            return
        if self.checkpoints.held and self.accelerator.num_processes == 1:
            self._save()
        whole = self.checkpoints.all()
        where = f"go on from {whole[-1]} with --resume" if whole else "there is no checkpoint to go on from"
        error.add_note(f"the run ended after {self.progress.step} whole steps; {where}")

    def steps(self, loader: Any) -> Iterator[dict[str, Any]]:
        """The batches of `loader`; between two of them, a look at whether the run can and may go on.

        Raises:
            SystemExit: with code 143, after SIGTERM.
            Exception: whatever kept the loader from its next batch.
        """
        batches = iter(loader)
        self.checkpoints.hold()
        while True:
            batch, failure = None, None
            try:
                batch = next(batches, None)
            except Exception as error:
                failure = error
            if hasattr(signal, "SIGCHLD"):
                # PyTorch's handler would raise a worker's death in the middle of whatever a step is doing. Without it
                # the loader itself finds out, here, where all processes can save together.
                self._handle(signal.SIGCHLD, signal.SIG_DFL)
            terminated, failed = self._anywhere(self.terminated, failure is not None)
            if terminated:
                self._save()
                self._say(f"SIGTERM: stopped after step {self.progress.step}; --resume goes on from there")
                raise SystemExit(128 + signal.SIGTERM)
            if failed:
                self._save()
                raise failure or RuntimeError("another process has no images to go on with; its message says why")
            if batch is None:
                return
            yield batch

    def whole(self) -> None:
        """The step is done and counted: what follows it (evaluation, checkpoints, the models) may fail without harm."""
        self.checkpoints.hold()

    def require_finite(self, losses: Sequence[dict[str, Tensor]], image_ids: Sequence[str]) -> None:
        """The last look before a step changes the weights.

        Args:
            losses: of each part of the batch.
            image_ids: of its images.

        Raises:
            FloatingPointError: the loss is not finite; the message names the images and the loss's parts.
        """
        (broken,) = self._anywhere(not torch.stack([part["loss"] for part in losses]).isfinite().all())
        if not broken:
            self.checkpoints.release()
            return
        self._save()
        values = [{name: value.item() for name, value in part.items()} for part in losses]
        found = gather_object([] if all(math.isfinite(part["loss"]) for part in values) else [(values, image_ids)])
        raise FloatingPointError(
            f"loss is not finite at step {self.progress.step + 1}: "
            + "; ".join(f"{values} of images {image_ids}" for values, image_ids in found)
        )

    def _anywhere(self, *here: Any) -> list[bool]:
        """Whether something is true on any process."""
        if self.accelerator.num_processes == 1:
            return [bool(value) for value in here]
        flags = torch.tensor([float(value) for value in here], device=self.accelerator.device)
        return [bool(value) for value in self.accelerator.reduce(flags, "sum")]

    def _handle(self, number: int, handler: Any) -> None:
        """Until the end of the run. Only a main thread may."""
        if number not in self._handlers and threading.current_thread() is threading.main_thread():
            self._handlers[number] = signal.signal(number, handler)

    def _note_termination(self, *_: Any) -> None:
        self.terminated = True

    def _save(self) -> None:
        """Save the last whole step, unless there is nothing new in it; failing must not hide what ended the run."""
        if self.progress.step in (0, self.checkpoints.saved_step):
            return
        (broken,) = self._anywhere(not self.checkpoints.is_finite())
        if broken:
            self._say("weights or state are not finite themselves any more: not saved")
            return
        try:
            self._say(f"saved {self.checkpoints.save(self.progress.step)}")
        except OSError as error:
            self._say(f"error: {error}")

    def _say(self, words: str) -> None:
        if self.accelerator.is_main_process:
            print(f"\n{words}", file=sys.stderr, flush=True)  # below the progress bar
