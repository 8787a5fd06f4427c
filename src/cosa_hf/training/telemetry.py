"""What a run tells while it runs: a progress bar, a line every N steps, a tracker."""

import json
import time
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor

from cosa_hf.training.recipe import Recipe


class Telemetry:
    """Averages the losses between log entries and sends them to the bar, to `log.jsonl` and to the tracker.

    Args:
        accelerator: only its main process writes.
        recipe: gives the cadence and what the tracker shows as the run's settings.
        first_step: where a resumed run goes on.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe, first_step: int) -> None:
        self.accelerator, self.every = accelerator, recipe.log_every
        self.log = Path(recipe.output_dir) / "log.jsonl"
        self.images_per_step = recipe.batch_size * recipe.gradient_accumulation_steps * accelerator.num_processes
        self.bar = tqdm(total=recipe.max_steps, initial=first_step, unit="step", dynamic_ncols=True)
        self.sums: dict[str, Tensor] = {}
        self.batches = self.steps = 0
        self.since = time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Take in the loss parts of one batch."""
        self.batches += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def step(self, step: int, **values: float) -> None:
        """Count one optimiser step; every `log_every` of them, write an entry."""
        self.steps += 1
        self.bar.update()
        if step % self.every and step != self.bar.total:
            return
        means = {name: float(value) / self.batches for name, value in self.sums.items()}
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in (means | values).items() if name != "lr"})
        seconds = time.perf_counter() - self.since
        self.write(step, means | values | {"images_per_second": self.images_per_step * self.steps / seconds})
        self.sums, self.batches, self.steps, self.since = {}, 0, 0, time.perf_counter()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One entry to the log file and the tracker."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            rounded = {name: float(f"{value:.5g}") for name, value in values.items()}
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | rounded) + "\n")

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()
