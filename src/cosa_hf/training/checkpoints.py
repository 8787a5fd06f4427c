"""What a run keeps: checkpoints to resume from, and snapshots to analyse.

A checkpoint is written completely or not at all, checked when read, and nothing in it could run code.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosa_hf._version import __version__
from cosa_hf.files import CONFIG, remove_unfinished, whole_file, whole_model
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.training.config import TrainingConfig

FORMAT = "2"
"""Of the files written here. Files of the first format do not say so, nor by which version they were written."""
FIRST_VERSION = "0.1.0"


class Stateful(Protocol):
    """What a checkpoint is made of: networks, optimiser, schedule, thresholds, telemetry."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


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


class Checkpoints:
    """The checkpoints of one run, `output_dir/checkpoints/step-N.safetensors`, the newest `keep` of them.

    A file holds tensors and JSON, and no pickle. It is written under another name and renamed, so that a killed run
    leaves no half of one; a checksum over all of it tells a file that was damaged later.

    Args:
        accelerator: its main process writes, all read: several machines need a common file system to resume.
        output_dir: of the run.
        keep: how many to keep.
        states: everything with a state, by name. torch's random generators are added, one for each process; nothing in
            a run draws from any other that is not seeded anew for each image.
        before_update: names of those that a step changes before it changes the weights.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        keep: int,
        states: dict[str, Any],
        before_update: Sequence[str] = (),
    ) -> None:
        self.accelerator, self.keep = accelerator, keep
        self.directory = output_dir / "checkpoints"
        self.states: dict[str, Stateful] = states
        self.before_update = before_update
        self.saved_step = 0
        self._snapshot: dict[str, Any] | None = None

    def snapshot(self) -> None:
        """Between two steps: remember what the next changes before it changes the weights, so that `save` can leave
        that out."""
        self._snapshot = {name: _pack(self.states[name].state_dict(), copy=True) for name in self.before_update}
        self._snapshot["random"] = self._random_state()

    def drop_snapshot(self) -> None:
        """Weights change from here on, and the next save is of what there is then."""
        self._snapshot = None

    def is_finite(self) -> bool:
        """Whether all numbers that `save` would write are."""
        return all(bool(tensor.isfinite().all()) for tensor in _tensors(self._packed()))

    def _packed(self) -> dict[str, Any]:
        snapshot = self._snapshot or {"random": self._random_state()}
        return {name: _pack(each.state_dict()) for name, each in self.states.items() if name not in snapshot} | snapshot

    def save(self, step: int) -> Path:
        """Write the state after `step` steps and remove what is older than the newest `keep`. For all processes.

        Raises:
            OSError: the file cannot be written; the message names the last complete one.
        """
        packed = self._packed()
        packed["random"] = {name: self._of_all_processes(state) for name, state in packed["random"].items()}
        final = self.directory / f"step-{step:07d}.safetensors"
        failure = None
        if self.accelerator.is_main_process:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                remove_unfinished(self.directory)
                with whole_file(final) as unfinished:
                    _write(unfinished, packed)
                for older in self.all()[: -self.keep]:
                    older.unlink()
            except (OSError, SafetensorError) as error:
                failure = error
        # The others wait for the file here, and stop with the process that could not write it.
        (reason,) = broadcast_object_list([None if failure is None else str(failure)])
        if reason is not None:
            complete = self.all()
            raise OSError(
                f"cannot write the checkpoint of step {step} to {self.directory}: {reason}. "
                + (f"The last complete one is {complete[-1].name}" if complete else "There is none before it")
            ) from failure
        self.saved_step = step
        return final

    def load(self) -> Path:
        """Load all states from the newest complete checkpoint. For all processes.

        A damaged one is renamed to `damaged-...`, with a line that says so, and the one before it taken.

        Raises:
            FileNotFoundError: there is none to resume from.
            ValueError: it is of another version or another kind of run; the message names what differs.
        """
        with self.accelerator.main_process_first():
            path, packed = self._newest_complete()
        if odd := sorted(packed.keys() ^ {*self.states, "random"}):
            raise ValueError(
                f"{path} is of another kind of run: only one of the two has {', '.join(odd)} (a scaler comes with "
                "mixed_precision fp16)"
            )
        for name, each in self.states.items():
            each.load_state_dict(_unpack(packed[name]))
        self._restore_random_state(packed["random"])
        self.saved_step = int(path.stem.removeprefix("step-"))
        return path

    def _newest_complete(self) -> tuple[Path, dict[str, Any]]:
        for path in reversed(self.all()):
            _require_known_format(path)
            try:
                return path, read_checkpoint(path)
            except (OSError, SafetensorError, ValueError) as error:
                aside = path.with_name(f"damaged-{path.name}")
                path.rename(aside)
                self.accelerator.print(f"{path} is damaged ({error}); now {aside.name}. Going back to the one before")
        raise FileNotFoundError(
            f"nothing to resume: no complete checkpoint in {self.directory} (start without --resume, and with "
            "--checkpoint_every N)"
        )

    def all(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        return checkpoint_files(self.directory.parent)

    def _random_state(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        return states

    def _of_all_processes(self, state: Tensor) -> Tensor:
        return self.accelerator.gather(state[None].to(self.accelerator.device)).cpu()  # (processes, bytes)

    def _restore_random_state(self, states: dict[str, Tensor]) -> None:
        processes, rank = len(states["cpu"]), self.accelerator.process_index
        if processes != self.accelerator.num_processes:
            self.accelerator.print(
                f"the checkpoint is of {processes} processes, this run has {self.accelerator.num_processes}: it goes "
                "on like the other up to rounding, not bit for bit"
            )
        # Copies: torch reads a state from the start of its memory, and crashes on a view of a later row.
        torch.set_rng_state(states["cpu"][rank % processes].clone())
        if self.accelerator.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"][rank % processes].clone(), self.accelerator.device)


def _pack(value: Any, copy: bool = False) -> Any:
    """A nested state in main memory. Dicts as pairs: JSON would make strings of the numbers an optimiser counts by."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=copy)
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, copy)] for key, item in value.items()]}
    return {"list": [_pack(item, copy) for item in value]} if isinstance(value, list | tuple) else value


def _tensors(packed: Any) -> Iterator[Tensor]:
    if isinstance(packed, Tensor):
        yield packed
    elif isinstance(packed, dict | list):
        for item in packed.values() if isinstance(packed, dict) else packed:
            yield from _tensors(item)


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if "dict" in value:
            return {key: _unpack(item) for key, item in value["dict"]}
        return [_unpack(item) for item in value["list"]]
    return value


def _write(path: Path, packed: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}

    def name_tensors(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.contiguous()
            channels_last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
            return {"tensor": name, "channels_last": channels_last and not value.is_contiguous()}
        if isinstance(value, dict):
            return {key: name_tensors(item) for key, item in value.items()}
        return [name_tensors(item) for item in value] if isinstance(value, list) else value

    tree = json.dumps(name_tensors(packed))
    about = {"format": FORMAT, "version": __version__}
    save_file(tensors, path, metadata=about | {"tree": tree, "checksum": _checksum(tree, tensors)})


def _require_known_format(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return  # whoever reads it says that it is damaged
    if "tree" in metadata and metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} was written by cosa_hf {metadata.get('version', FIRST_VERSION)}, whose checkpoints this version "
            f"({__version__}) does not read: finish the run with that version, or start anew in another output_dir"
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The states in a checkpoint by name, nested as they were, dicts as lists of pairs; for inspection.

    Raises:
        SafetensorError, ValueError: it is damaged.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        # Copies: what is read is mapped from the file, and optimisers keep what they are given.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    if metadata.get("checksum") != _checksum(metadata.get("tree", ""), tensors):
        raise ValueError("its checksum does not fit")

    def place_tensors(value: Any) -> Any:
        if isinstance(value, dict):
            if "tensor" in value:
                tensor = tensors[value["tensor"]]
                # As it was in memory: an optimiser is slower where its state lies otherwise than the weights.
                return tensor.contiguous(memory_format=torch.channels_last) if value["channels_last"] else tensor
            return {key: place_tensors(item) for key, item in value.items()}
        return [place_tensors(item) for item in value] if isinstance(value, list) else value

    return place_tensors(json.loads(metadata["tree"]))


def _checksum(tree: str, tensors: dict[str, Tensor]) -> str:
    total = zlib.crc32(tree.encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


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
        with whole_model(directory / name) as unfinished:
            network.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)


def checkpoint_files(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((output_dir / "checkpoints").glob("step-[0-9]*.safetensors"))


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
