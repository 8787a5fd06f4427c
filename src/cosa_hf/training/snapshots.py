"""The networks that a run saves: at its end, and as snapshots of its steps, kept to be analysed."""

import json
from dataclasses import dataclass
from pathlib import Path

from cosa_hf.files import CONFIG
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.inference import save_model
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.training.config import TrainingConfig


@dataclass(frozen=True)
class Moment:
    """Both networks of a run after one step, and the thresholds of their CAMs at that step.

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
        save_model(network, processor, directory / name)


def snapshot_directory(output_dir: Path, step: int) -> Path:
    """Where a run keeps its networks as they were after `step`."""
    return output_dir / "snapshots" / f"step-{step:07d}"


def snapshots(output_dir: Path) -> dict[int, Path]:
    """The snapshots that a run has kept so far, by step."""
    found = (output_dir / "snapshots").glob(f"step-[0-9]*/assignment/{CONFIG}")  # which is written last
    places = sorted(path.parents[1] for path in found)
    return {int(path.name.removeprefix("step-")): path for path in places}


def moments(output_dir: Path) -> list[Moment]:
    """The snapshots of a run in the order of their steps, and its end.

    Raises:
        FileNotFoundError: the directory is not that of a finished run.
    """
    if not (output_dir / "run.json").is_file():
        raise FileNotFoundError(f"{output_dir} is not a finished run: it has no run.json")
    last = TrainingConfig.from_yaml(output_dir / "recipe.yaml").max_steps
    places = snapshots(output_dir) | {last: output_dir}
    entries = [json.loads(line) for line in (output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = {entry["step"]: (entry["xi"], entry["aux_xi"]) for entry in entries if "xi" in entry}
    found = []
    for step, place in sorted(places.items()):
        nearest = min(logged, key=lambda known: (abs(known - step), known))
        found.append(Moment(step, place / "online", place / "assignment", *logged[nearest]))
    return found


__all__ = ["Moment", "moments", "save_networks", "snapshot_directory", "snapshots"]
