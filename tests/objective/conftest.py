"""What the tests of the equations share: numeric gradients, and processes that really wait for each other."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture
def numeric_gradient() -> Callable[[Callable[[np.ndarray], float], np.ndarray], np.ndarray]:
    """Central differences of a float64 function of one array, entry by entry."""

    def gradient(function: Callable[[np.ndarray], float], point: np.ndarray, step: float = 1e-5) -> np.ndarray:
        point = point.astype(np.float64).copy()
        result = np.zeros_like(point)
        for index in np.ndindex(point.shape):
            kept = point[index]
            point[index] = kept + step
            above = function(point)
            point[index] = kept - step
            below = function(point)
            point[index] = kept
            result[index] = (above - below) / (2 * step)
        return result

    return gradient


@pytest.fixture
def as_processes() -> Callable[..., list[Any]]:
    """Run one task per process, each with a `mean` that blocks until all processes have called it.

    Like a collective, it fails where the processes do not call it equally often.
    """

    def run(*tasks: Callable[[Callable[[Tensor], Tensor]], Any]) -> list[Any]:
        slots: list[Tensor | None] = [None] * len(tasks)
        barrier = threading.Barrier(len(tasks), timeout=20)

        def start(rank: int) -> Any:
            def mean(value: Tensor) -> Tensor:
                slots[rank] = value.detach().clone()
                barrier.wait()
                result = torch.stack(slots).mean(dim=0)
                barrier.wait()
                return result

            try:
                return tasks[rank](mean)
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(len(tasks)) as pool:
            return list(pool.map(start, range(len(tasks))))

    return run
