"""What ends a run before its last step, and how: with a checkpoint where there can be one, and words that say why."""

import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from enum import Enum
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from cosa_hf.training.checkpoints import Checkpoints
from cosa_hf.training.states import Progress


class Phase(Enum):
    """Where a run stands within a step."""

    BETWEEN_STEPS = "between steps"
    COMPUTING = "computing"  # thresholds and random state move, weights do not: the snapshot can be saved
    CHANGING = "changing the weights"  # nothing can be saved


class RunGuard:
    """Around the loop over steps: SIGTERM, images that cannot be had, a loss that is not finite, any other error.

    Before the run ends, the state after the last complete step is saved if it is finite, without what an incomplete
    step changed. Only while the optimiser changes the weights there is none. On several processes saving takes all of
    them, so an error of one alone saves nothing and leaves the run to its regular checkpoints; SIGTERM, the loader and
    the loss are looked at together, once a step.

    Order of calls in each step, which is asserted:

    1. the next batch from `batches`: between steps -> computing
    2. `require_finite`, before the optimiser: computing -> changing the weights
    3. `commit`, once the step is counted: changing the weights -> between steps. Evaluation, checkpoints and the models
       come after it and may fail without harm.

    Args:
        accelerator: of the run.
        checkpoints: where to save.
        progress: the step counter.
    """

    def __init__(self, accelerator: Accelerator, checkpoints: Checkpoints, progress: Progress) -> None:
        self.accelerator, self.checkpoints, self.progress = accelerator, checkpoints, progress
        self.phase = Phase.BETWEEN_STEPS
        self.terminated = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "RunGuard":
        self._handle(signal.SIGTERM, self._note_termination)
        self.checkpoints.snapshot()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error is None:
            return
        if self.phase is not Phase.CHANGING and self.accelerator.num_processes == 1:
            self._save()
        kept = self.checkpoints.all()
        where = f"go on from {kept[-1]} with --resume" if kept else "there is no checkpoint to go on from"
        error.add_note(f"the run ended after {self.progress.step} complete steps; {where}")

    def batches(self, loader: Any) -> Iterator[dict[str, Any]]:
        """The batches of `loader`; before each, a check whether the run can and may go on.

        Raises:
            SystemExit: with code 143, after SIGTERM.
            Exception: whatever kept the loader from its next batch.
        """
        batches = iter(loader)
        while True:
            assert self.phase is Phase.BETWEEN_STEPS, f"the last step was not committed: {self.phase.value}"
            batch, failure = None, None
            try:
                batch = next(batches, None)
            except Exception as error:
                failure = error
            if hasattr(signal, "SIGCHLD"):
                # PyTorch's handler would raise a worker's death in the middle of whatever a step is doing. Without it
                # the loader itself finds out, here, where all processes can save together.
                self._handle(signal.SIGCHLD, signal.SIG_DFL)
            terminated, failed = self._on_any_process(self.terminated, failure is not None)
            if terminated:
                self._save()
                self._say(f"SIGTERM: stopped after step {self.progress.step}; --resume goes on from there")
                raise SystemExit(128 + signal.SIGTERM)
            if failed:
                self._save()
                raise failure or RuntimeError("another process has no images to go on with; its message says why")
            if batch is None:
                return
            self.phase = Phase.COMPUTING
            yield batch

    def require_finite(self, losses: Sequence[dict[str, Tensor]], image_ids: Sequence[str]) -> None:
        """The last check before a step changes the weights.

        Args:
            losses: of each micro-batch.
            image_ids: of the step's images.

        Raises:
            FloatingPointError: the loss is not finite; the message names the images and the loss's terms.
        """
        assert self.phase is Phase.COMPUTING, f"no step is being computed: {self.phase.value}"
        (broken,) = self._on_any_process(not torch.stack([terms["loss"] for terms in losses]).isfinite().all())
        if not broken:
            self.phase = Phase.CHANGING
            self.checkpoints.drop_snapshot()
            return
        self._save()
        values = [{name: value.item() for name, value in terms.items()} for terms in losses]
        found = gather_object([] if all(math.isfinite(terms["loss"]) for terms in values) else [(values, image_ids)])
        raise FloatingPointError(
            f"loss is not finite at step {self.progress.step + 1}: "
            + "; ".join(f"{values} of images {image_ids}" for values, image_ids in found)
        )

    def commit(self) -> None:
        """The step is complete and counted; the next may begin."""
        assert self.phase is Phase.CHANGING, f"no step has changed the weights: {self.phase.value}"
        self.checkpoints.snapshot()
        self.phase = Phase.BETWEEN_STEPS

    def _on_any_process(self, *here: Any) -> list[bool]:
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
        """Save the last complete step, unless nothing in it is new; failing must not hide what ended the run."""
        if self.progress.step in (0, self.checkpoints.saved_step):
            return
        (broken,) = self._on_any_process(not self.checkpoints.is_finite())
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


__all__ = ["Phase", "RunGuard"]
