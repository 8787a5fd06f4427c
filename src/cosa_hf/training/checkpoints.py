"""What a run keeps: checkpoints to go on from, written whole or not at all, and snapshots to look back at."""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.training.recipe import Recipe


class Progress:
    """Optimiser steps behind us, the time they took, and images that could not be read; saved with a checkpoint."""

    def __init__(self) -> None:
        self.step = 0
        self.unreadable: set[str] = set()
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall clock of the run, without the time between an interruption and its resume."""
        return time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "unreadable": sorted(self.unreadable), "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.unreadable = set(state["unreadable"])
        self._started = time.monotonic() - state["seconds"]


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


@dataclass(frozen=True)
class Moment:
    """Both networks of a run after one step, and where their CAMs part foreground from background then.

    Attributes:
        step: optimiser steps behind them.
        online: directory of the online network.
        assignment: directory of the assignment network.
        threshold: xi of M'.
        aux_threshold: xi of M†'.
    """

    step: int
    online: Path
    assignment: Path
    threshold: float
    aux_threshold: float


def save_networks(
    directory: Path,
    online: CoSAForWeaklySupervisedSegmentation,
    assignment: CoSAForWeaklySupervisedSegmentation,
    processor: CoSAImageProcessor,
) -> None:
    """Write `directory/online` and `directory/assignment`, each a model that loads by itself."""
    for name, network in (("online", online), ("assignment", assignment)):
        network.save_pretrained(directory / name)
        processor.save_pretrained(directory / name)


def snapshot_directory(output_dir: Path, step: int) -> Path:
    """Where a run keeps its networks as they were after `step`."""
    return output_dir / "snapshots" / f"step-{step:07d}"


def moments(output_dir: Path) -> list[Moment]:
    """The snapshots of a run in the order of their steps, and its end.

    Raises:
        FileNotFoundError: the directory is not that of a finished run.
    """
    if not (output_dir / "run.json").is_file():
        raise FileNotFoundError(f"{output_dir} is no finished run: it has no run.json")
    last = Recipe.from_yaml(output_dir / "recipe.yaml").max_steps
    places = {int(path.name.removeprefix("step-")): path for path in (output_dir / "snapshots").glob("step-*")}
    places[last] = output_dir
    # A run that was resumed has some steps twice; the later line is the one that the weights come from.
    entries = [json.loads(line) for line in (output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = {entry["step"]: (entry["xi"], entry["aux_xi"]) for entry in entries if "xi" in entry}
    found = []
    for step, place in sorted(places.items()):
        nearest = min(logged, key=lambda known: (abs(known - step), known))
        found.append(Moment(step, place / "online", place / "assignment", *logged[nearest]))
    return found
