"""Features of a frozen encoder, computed once an image and kept on disk.

A `FeatureStore` is a directory of append-only parts. A record is found by the content of its image, so a changed photo
is another record and never served stale; what made the records (encoder, layers, size, views) names the directory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor

from cosa_hf._version import __version__
from cosa_hf.files import whole_file

FORMAT = 1
ABOUT = "about.json"
DISK_RESERVE = 0.05  # of a disk, which a cache leaves free


def default_directory() -> Path:
    """Where caches lie that no `cache_features` names: beside those of the Hub."""
    return Path(HF_HOME) / "cosa_hf" / "features"


class FeatureStore:
    """Named float16 maps of images, on disk and memory-mapped.

    Every writer appends to a part of its own, first the record, then the line that says so; a killed writer leaves at
    most one record that nothing points to. Any number of processes read and write at the same time.

    Args:
        root: directory of all caches.
        made_by: what the records depend on beside the image, JSON-serialisable: encoder's digest, layers, size, views.
        shapes: of the maps of one image, by name.

    Raises:
        ValueError: the directory holds a cache of another version, or one that is damaged.

    Example:
        >>> store = FeatureStore(Path("cache"), {"encoder": "abc", "size": 64}, {"tokens": (2, 3)})
        >>> store.write("photo", {"tokens": torch.ones(2, 3)})
        >>> store.missing(["photo", "other"]), store.read("photo")["tokens"].sum().item()
        (['other'], 6.0)
    """

    def __init__(self, root: Path, made_by: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        about = {"made_by": dict(made_by), "shapes": {name: list(shape) for name, shape in self.shapes.items()}}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.directory = root / digest[:16]
        self.sizes = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        self.values = sum(self.sizes.values())  # of a record
        self._part: str | None = None
        self._places: dict[str, tuple[str, int]] = {}
        self._read_lines: dict[str, int] = {}
        self._claim(about)

    @property
    def bytes_per_image(self) -> int:
        """On disk."""
        return 2 * self.values

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that no record is there for yet, each once, in their order."""
        self._refresh()
        return [key for key in dict.fromkeys(keys) if key not in self._places]

    def require_room(self, images: int) -> None:
        """Refuse what would not fit.

        Raises:
            OSError: the disk has less room than `images` more records take.
        """
        usage = shutil.disk_usage(self.directory)
        needed, free = images * self.bytes_per_image, usage.free - DISK_RESERVE * usage.total
        if needed > free:
            raise OSError(
                f"the features of {images} images take {needed / 1e9:.1f} GB, and {self.directory} has "
                f"{max(0.0, free) / 1e9:.1f} GB to spare: name another disk with cache_features DIR, remove old caches "
                "(cosa-hf cache --clear), or encode anew in every step with cache_features never"
            )

    def write(self, key: str, maps: Mapping[str, Tensor]) -> None:
        """Append the record of one image.

        Raises:
            ValueError: maps of other names, shapes or with values that float16 cannot hold.
            OSError: it cannot be written; what was written before stays.
        """
        shapes = {name: tuple(values.shape) for name, values in maps.items()}
        if shapes != self.shapes:
            raise ValueError(f"the cache is of maps {self.shapes}, got {shapes}")
        record = np.concatenate([maps[name].detach().half().cpu().numpy().ravel() for name in self.shapes])
        if not np.isfinite(record).all():
            raise ValueError(f"the features of {key!r} are not finite in float16")
        self._part = self._part or uuid4().hex
        data, lines = self._files(self._part)
        row = data.stat().st_size // self.bytes_per_image if data.exists() else 0
        with data.open("r+b" if data.exists() else "wb") as file:
            file.seek(row * self.bytes_per_image)  # over what an interrupted write left
            file.write(record.tobytes())
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, row]) + "\n")
        self._places[key] = (self._part, row)

    def read(self, key: str) -> dict[str, Tensor]:
        """The maps of one image, float16.

        Raises:
            KeyError: there is no record of it.
        """
        if key not in self._places:
            self._refresh()
        part, row = self._places[key]
        # Mapped for this one record: pages that stay mapped would add up to the whole cache in memory.
        place = {"dtype": np.float16, "mode": "r", "offset": row * self.bytes_per_image, "shape": (self.values,)}
        record = torch.from_numpy(np.array(np.memmap(self._files(part)[0], **place)))  # type: ignore[call-overload]
        pieces = record.split(list(self.sizes.values()))
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def _files(self, part: str) -> tuple[Path, Path]:
        return self.directory / f"{part}.f16", self.directory / f"{part}.jsonl"

    def _claim(self, about: dict[str, Any]) -> None:
        path = self.directory / ABOUT
        about = {"format": FORMAT} | about
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as unfinished:
                unfinished.write_text(json.dumps(about | {"cosa_hf": __version__}, indent=2) + "\n", encoding="utf-8")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            made, version = {name: found[name] for name in about}, found["cosa_hf"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): remove {self.directory}, it is made again") from error
        if made != about:
            raise ValueError(
                f"{self.directory} was written by cosa_hf {version}, in another format: remove it, it is made again"
            )

    def _refresh(self) -> None:
        """Take in what this and other processes have written since."""
        for lines in sorted(self.directory.glob("*.jsonl")):
            part = lines.stem
            text = lines.read_bytes()
            complete = text[: text.rfind(b"\n") + 1].splitlines()  # the last line may be under way
            records = os.stat(self._files(part)[0]).st_size // self.bytes_per_image
            for line in complete[self._read_lines.get(part, 0) :]:
                key, row = json.loads(line)
                if row < records:
                    self._places[key] = (part, row)
            self._read_lines[part] = len(complete)


def clear(root: Path) -> int:
    """Remove all caches below `root`; returns how many bytes that freed.

    Nothing is removed that is not a cache.
    """
    freed = 0
    for about in sorted(root.glob(f"*/{ABOUT}")):
        freed += sum(path.stat().st_size for path in about.parent.iterdir())
        shutil.rmtree(about.parent)
    return freed


__all__ = ["FeatureStore", "clear", "default_directory"]
