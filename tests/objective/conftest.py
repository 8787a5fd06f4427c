"""What the tests of the equations share: processes that really wait for each other."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor


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
