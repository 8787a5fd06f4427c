"""Time by phase of a step, the rate of matrix products, the peak of memory."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

STEP_REST = "rest"


class Stopwatch:
    """Assigns every moment of a step to exactly one phase, so that the phases add up to the step.

    A phase inside another interrupts it. Time in no phase is `rest`.

    Args:
        device: synchronised at each change, where it works asynchronously.
        cpu_time: count what this process computes, not what it waits for: on a machine with other load, with one
            thread. The work of a GPU is not counted.
    """

    def __init__(self, device: torch.device, cpu_time: bool = False) -> None:
        self.device, self.clock = device, time.process_time if cpu_time else time.perf_counter
        self.steps: list[dict[str, float]] = []
        self.inside = [STEP_REST]
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self.phases: dict[str, float] = defaultdict(float)
        self.last = self._now()

    def end(self) -> None:
        """End the step."""
        self.split(self.inside[-1])
        self.steps.append(dict(self.phases))

    def split(self, name: str) -> None:
        """Assign the time since the last change to a phase."""
        now = self._now()
        self.phases[name] += now - self.last
        self.last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.split(self.inside[-1])
        self.inside.append(name)
        try:
            yield
        finally:
            self.split(name)
            self.inside.pop()

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, its time assigned to a phase."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **options)

        return call

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def matmul_rate(device: torch.device, dtype: torch.dtype, cpu_time: bool) -> float:
    """FLOP/s of a product as in the MLP of a ViT-B for two images of 448 pixels; larger on a GPU. Best of a second."""
    tokens, channels, hidden = (16384, 4096, 4096) if device.type == "cuda" else (1568, 768, 3072)
    left = torch.randn(tokens, channels, device=device, dtype=dtype)
    right = torch.randn(channels, hidden, device=device, dtype=dtype)
    watch = Stopwatch(device, cpu_time)
    while sum(step[STEP_REST] for step in watch.steps) < 1:  # bfloat16 alone takes many, where it is emulated
        watch.begin()
        left @ right
        watch.end()
    return 2 * tokens * channels * hidden / min(step[STEP_REST] for step in watch.steps)


def peak_memory(device: torch.device) -> float:
    """Peak memory in bytes: of the GPU, or without one of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
