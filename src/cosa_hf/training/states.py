"""What a checkpoint holds of a run beside optimiser, schedule and thresholds: how far it is, its weights, its data."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object


class Progress:
    """How far a run has come; saved with a checkpoint.

    Attributes:
        step: optimiser steps behind us.
        images_per_step: over all processes.
        unreadable: what was wrong with images that could not be read, of this process; after loading, of all.

    Raises:
        ValueError: at loading, the checkpoint's steps were of another number of images: the position in the data is
            counted in steps.
    """

    def __init__(self, images_per_step: int) -> None:
        self.step = 0
        self.images_per_step = images_per_step
        self.unreadable: set[str] = set()
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall clock of the run, without the time between an interruption and its resume."""
        return time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """For all processes: the unreadable images are gathered from them."""
        return {
            "step": self.step,
            "images_per_step": self.images_per_step,
            "unreadable": sorted(set(gather_object(list(self.unreadable)))),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["images_per_step"] != self.images_per_step:
            raise ValueError(
                f"the checkpoint's run took {state['images_per_step']} images a step, this one takes "
                f"{self.images_per_step}: keep batch_size x gradient_accumulation_steps x processes as it was"
            )
        self.step = state["step"]
        self.unreadable = set(state["unreadable"])
        self._started = time.monotonic() - state["seconds"]


class TrainedWeights:
    """Of a network, what steps change: frozen parameters are left out, and known by their digest.

    Raises:
        ValueError: at loading, the checkpoint is of another network, or of another frozen part.

    Args:
        network: online or assignment network.
        frozen: names of its parameters that no step changes.

    Example:
        >>> network = torch.nn.Linear(2, 1)
        >>> list(TrainedWeights(network, ["bias"]).state_dict()["trained"])
        ['weight']
    """

    def __init__(self, network: torch.nn.Module, frozen: Iterable[str]) -> None:
        self.network, self.frozen = network, sorted(frozen)
        self._digest: str | None = None

    @property
    def frozen_sha256(self) -> str:
        """Computed once: nothing changes what is frozen."""
        if self._digest is None:
            weights, digest = self.network.state_dict(), hashlib.sha256()
            for name in self.frozen:
                values = weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(f"{name} {tuple(weights[name].shape)} ".encode() + values.numpy().tobytes())
            self._digest = digest.hexdigest()
        return self._digest

    def state_dict(self) -> dict[str, Any]:
        frozen = set(self.frozen)
        trained = {name: value for name, value in self.network.state_dict().items() if name not in frozen}
        return {"trained": trained, "frozen_sha256": self.frozen_sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["frozen_sha256"] != self.frozen_sha256:
            raise ValueError(
                "the frozen part of the encoder is not that of the checkpoint's run: keep frozen_blocks, backbone and "
                "backbone_weights as they were, or start anew in another output_dir"
            )
        result = self.network.load_state_dict(state["trained"], strict=False)
        if odd := [*result.unexpected_keys, *sorted(set(result.missing_keys) - set(self.frozen))]:
            raise ValueError(f"the checkpoint is of another network: only one of the two has {', '.join(odd[:8])}")


class TrainingData:
    """Which classes, images and tags a run learns from: what was learned as cat must not go on as dog.

    Raises:
        ValueError: at loading, the checkpoint's run learned from others; the message says how they differ.

    Args:
        classes: their names in order.
        rows: ids and tags (class indices) of all images; None of a stream, which is not known beforehand.
        allow_changed: take other images and tags, but never other classes.
        reading: settings of how the images are read, which stay.

    Example:
        >>> before = TrainingData(["cat", "dog"], [("a", [0]), ("b", [1])]).state_dict()
        >>> TrainingData(["zebra", "dog"], [("a", [0]), ("b", [1])]).load_state_dict(before)
        Traceback (most recent call last):
        ValueError: the checkpoint's run has the classes cat, dog; this one has zebra, dog: ...
    """

    def __init__(
        self,
        classes: Sequence[str],
        rows: Iterable[tuple[str, list[int]]] | None,
        allow_changed: bool = False,
        reading: Mapping[str, Any] | None = None,
    ) -> None:
        self.classes, self.allow_changed, self.reading = list(classes), allow_changed, dict(reading or {})
        self.images, self.tags, self.sha256 = 0, [0] * len(self.classes), None
        if rows is not None:
            digest = hashlib.sha256()
            for image_id, labels in rows:
                digest.update(json.dumps([image_id, sorted(labels)]).encode())
                self.images += 1
                for label in labels:
                    self.tags[label] += 1
            self.sha256 = digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        names = ("classes", "images", "tags", "sha256", "reading")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["classes"] != self.classes:
            raise ValueError(
                f"the checkpoint's run has the classes {', '.join(state['classes'])}; this one has "
                f"{', '.join(self.classes)}: give the data its former classes, or start anew in another output_dir"
            )
        if state["reading"] != self.reading:
            flags = [f"--{name} {_typed_out(value)}" for name, value in state["reading"].items()]
            raise ValueError(
                f"the images are read as {self.reading or 'photos'}, those of the checkpoint's run were read as "
                f"{state['reading'] or 'photos'}: to go on as before, "
                + (f"pass {' '.join(flags)}" if flags else "restore the images, without --value_range and --bands")
            )
        if state["sha256"] != self.sha256 and not self.allow_changed:
            changes = [
                f"{name} {before} -> {now}"
                for name, before, now in zip(
                    ["images", *self.classes], [state["images"], *state["tags"]], [self.images, *self.tags], strict=True
                )
                if before != now
            ]
            raise ValueError(
                "images or tags are not those of the checkpoint's run "
                f"({', '.join(changes) or 'as many of each class, but other ids or tags'}): restore them, pass "
                "--allow_changed_data true if the change is meant, or start anew in another output_dir"
            )


def _typed_out(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


__all__ = ["Progress", "TrainedWeights", "TrainingData"]
