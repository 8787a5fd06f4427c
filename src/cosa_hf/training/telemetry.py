"""What a run tells while it runs: a progress bar, a line every N steps, a tracker."""

import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch import Tensor

from cosa_hf.assignment.threshold import DynamicThreshold
from cosa_hf.files import whole_file
from cosa_hf.objective.overall import valid_tokens
from cosa_hf.objective.pseudo_labels import PseudoLabels, cam_pseudo_labels
from cosa_hf.objective.reliability import perplexity
from cosa_hf.progress import progress
from cosa_hf.training.config import RunConfig


class Telemetry:
    """Averages what it is told between log entries, over all processes; sends it to bar, `log.jsonl` and tracker.

    What has been summed up since the last entry is its state, so that a resumed run's entries equal the other's. A
    tracker that fails is warned about once and then left alone.

    Args:
        accelerator: only its main process writes.
        config: gives the cadence and what the tracker shows as the run's settings.
        images_per_step: over all processes.
        shown: entries in the progress bar.
    """

    def __init__(
        self, accelerator: Accelerator, config: RunConfig, images_per_step: int, shown: Sequence[str] = ("loss",)
    ) -> None:
        self.accelerator, self.config, self.images_per_step = accelerator, config, images_per_step
        self.shown = shown
        self.log = Path(config.output_dir) / "log.jsonl"
        self.sums: dict[str, Tensor] = {}
        self.batches = 0
        self.label_statistics: dict[str, Tensor] = {}
        self.tracking = True

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "batches": self.batches, "label_statistics": self.label_statistics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.accelerator.device
        self.sums, self.label_statistics = (
            {name: value.to(device) for name, value in state[kind].items()} for kind in ("sums", "label_statistics")
        )
        self.batches = state["batches"]

    def begin(self, step: int) -> None:
        """Start after `step` steps: drop the entries of those that a resumed run will take again."""
        self.bar = progress(
            total=self.config.max_steps, initial=step, unit="step", disable=not self.accelerator.is_main_process
        )
        settings = {name: str(value) for name, value in vars(self.config).items()}
        self._track(self.accelerator.init_trackers, "cosa_hf", config=settings)
        if self.accelerator.is_main_process:
            kept = [line for line in self._entries() if json.loads(line)["step"] <= step] if step else []
            with whole_file(self.log) as rewritten:
                rewritten.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        self.steps, self.since = 0, time.perf_counter()

    def add(self, losses: Sequence[dict[str, Tensor]], statistics: dict[str, Tensor]) -> None:
        """Take in the loss terms of a step's micro-batches, and sums over the tokens of what they learned from."""
        self.batches += len(losses)
        for terms in losses:
            _add(self.sums, {name: value.detach() for name, value in terms.items()})
        _add(self.label_statistics, statistics)

    def step(self, step: int, metrics: Callable[[], dict[str, float]]) -> None:
        """Count one optimiser step; every `log_every` of them, write an entry.

        Args:
            step: its number.
            metrics: gives what is to be logged as it is then, the same on every process.
        """
        self.steps += 1
        self.bar.update()
        if step % self.config.log_every and step != self.config.max_steps:
            return
        means = {name: value / self.batches for name, value in self._over_processes(self.sums).items()}
        statistics = self._over_processes(self.label_statistics)
        tokens = max(statistics.pop("tokens", 0.0), 1.0)
        values = means | {name: value / tokens for name, value in statistics.items()} | metrics()
        self.bar.set_postfix({name: f"{values[name]:.3f}" for name in self.shown})
        seconds = time.perf_counter() - self.since
        values["images_per_second"] = self.images_per_step * self.steps / seconds
        self.write(step, values | {"memory_gb": memory(self.accelerator.device)})
        self.sums, self.batches, self.label_statistics = {}, 0, {}
        self.steps, self.since = 0, time.perf_counter()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One entry to the log file and the tracker."""
        self._track(self.accelerator.log, values, step=step)
        if self.accelerator.is_main_process:
            rounded = {name: float(f"{value:.7g}") for name, value in values.items()}
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | rounded) + "\n")

    def close(self) -> None:
        self.bar.close()
        self._track(self.accelerator.end_training)

    def _entries(self) -> list[str]:
        """The lines of the log; the last may be one that a killed run could not finish."""
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True) if self.log.exists() else []
        return [line.rstrip("\n") for line in lines if line.endswith("\n")]

    def _over_processes(self, sums: dict[str, Tensor]) -> dict[str, float]:
        if not sums:
            return {}
        names = sorted(sums)
        reduced = self.accelerator.reduce(torch.stack([sums[name].double() for name in names]), "mean")
        return dict(zip(names, reduced.tolist(), strict=True))

    def _track(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if not self.tracking:
            return
        try:
            call(*arguments, **options)
        except Exception as error:
            # Whatever a service may raise: no dashboard is worth a run.
            self.tracking = False
            warnings.warn(
                f"tracker {self.config.tracker} failed and is left out from now on, {self.log} goes on: {error!r}",
                stacklevel=2,
            )


def check_tracker(name: str) -> None:
    """That the package of a tracker is there: Accelerate leaves out what is not installed without a word.

    Raises:
        ImportError: it is not; says how to install it.

    Example:
        >>> check_tracker("tensorboard")
    """
    if name in LoggerType.list() and name not in ("all", *map(str, get_available_trackers())):
        package = "cosa-hf[trackio]" if name == "trackio" else name
        raise ImportError(f'tracker {name} is not installed: pip install "{package}"')


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def label_statistics(pseudo_labels: PseudoLabels, valid: Tensor, alpha: float, beta: float) -> dict[str, Tensor]:
    """Statistics of a batch's pseudo-labels, summed over its valid tokens, and `tokens`, their number.

    Args:
        pseudo_labels: of the batch.
        valid: V, (B, H, W).
        alpha: of Eq. 4.
        beta: of Eq. 4.

    Returns:
        foreground: tokens that CPL gives a class. reliability: 1 / perplexity. agreement: tokens that CPL and SPL give
        the same class.

    Example:
        >>> cams = torch.tensor([[[[0.9, 0.1]]]])
        >>> spl = torch.tensor([[[[0.0, 0.2]], [[1.0, 0.8]]]])
        >>> labels = PseudoLabels(cams, cams, spl, threshold=0.5, aux_threshold=0.5)
        >>> sums = label_statistics(labels, torch.ones(1, 1, 2, dtype=torch.bool), alpha=0.8, beta=1.0)
        >>> {name: round(value.item(), 2) for name, value in sums.items()}
        {'foreground': 1.0, 'reliability': 4.48, 'agreement': 1.0, 'tokens': 2.0}
    """
    cams, xi = pseudo_labels.cams, pseudo_labels.threshold
    tokens = valid_tokens(valid, cams)
    ids = cam_pseudo_labels(cams, xi)
    sums = {
        "foreground": (ids > 0) & tokens,
        "reliability": tokens / perplexity(cams.amax(dim=1), xi, alpha, beta),
        "agreement": (ids == pseudo_labels.segmentation.argmax(dim=1)) & tokens,
        "tokens": tokens,
    }
    return {name: values.sum(dtype=torch.float32) for name, values in sums.items()}


def mixture_values(threshold: DynamicThreshold, prefix: str = "") -> dict[str, float]:
    """xi, and the mixture that the last step fitted, by name; without one, xi alone.

    Example:
        >>> from cosa_hf.assignment.threshold import ThresholdConfig
        >>> mixture_values(DynamicThreshold(ThresholdConfig(threshold=0.4)), prefix="aux_")
        {'aux_xi': 0.4}
    """
    values = {f"{prefix}xi": threshold.value}
    if threshold.mixture is not None:
        for name, pair in zip(("weight", "mean", "variance"), threshold.mixture[:3], strict=True):
            values |= {f"{prefix}background_{name}": pair[0], f"{prefix}foreground_{name}": pair[1]}
    return values


def memory(device: torch.device) -> float:
    """Gigabytes: the most that the accelerator has held, or what this process holds of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
