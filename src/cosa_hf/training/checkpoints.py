"""The checkpoints of a run: written completely or not at all, checked when read, and nothing in them could run code."""

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosa_hf._version import __version__
from cosa_hf.files import remove_unfinished, whole_file

FORMAT = "2"
"""Of the files written here. Files of the first format do not say so, nor by which version they were written."""
FIRST_VERSION = "0.1.0"


class Stateful(Protocol):
    """What a checkpoint is made of: networks, optimiser, schedule, thresholds, telemetry."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


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


def checkpoint_files(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((output_dir / "checkpoints").glob("step-[0-9]*.safetensors"))
