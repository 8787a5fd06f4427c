"""What the frozen part of an encoder makes of each image, computed once and kept on disk.

A `FeatureStore` is a directory of append-only parts. A record is found by the identity of its image file, so a changed
photo is another record and never served stale; what made the records (encoder, layers, size) names the directory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from torch.utils.data import DataLoader

from cosa_hf._version import __version__
from cosa_hf.data.encoded import VIEWS, image_keys
from cosa_hf.data.images import Reading, UnreadableImageError, from_all_over, read_image, undecoded
from cosa_hf.digest import weights_sha256
from cosa_hf.files import whole_file
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.inference import eval_mode
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.progress import progress

FORMAT = 1
ABOUT = "about.json"
DISK_RESERVE = 0.05  # of a disk, which a cache leaves free
ENCODED_AT_ONCE = 4  # images, twice: plain and mirrored


MADE_BY = (
    "backbone", "feature_layer", "attention", "aux_layer", "aux_attention", "output_stride", "affinity",
    "affinity_layer", "affinity_blocks",
)  # fmt: skip
"""Fields of a model's config that its encoder's maps depend on. Which blocks are frozen is in the weights' digest."""


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
        shapes_read_back = {name: list(shape) for name, shape in self.shapes.items()}
        about = json.loads(json.dumps({"made_by": dict(made_by), "shapes": shapes_read_back}))
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
                f"(cosa-hf cache --clear --cache_dir {self.directory.parent}), or encode anew in every step with "
                "cache_features never"
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


def caches(root: Path) -> list[tuple[Path, int, str]]:
    """The caches below `root`: directory, bytes, and the encoder's name as far as its file says it."""
    found = []
    for about in sorted(root.glob("[0-9a-f]" * 16 + f"/{ABOUT}")):
        try:
            encoder = json.loads(about.read_text(encoding="utf-8"))["made_by"]["maps"]["backbone"]
        except (ValueError, KeyError, TypeError):
            encoder = "damaged"
        found.append((about.parent, sum(path.stat().st_size for path in about.parent.iterdir()), encoder))
    return found


def clear(root: Path) -> int:
    """Remove all caches below `root`, and nothing else; returns how many bytes that freed."""
    found = caches(root)
    for directory, _, _ in found:
        shutil.rmtree(directory)
    return sum(size for _, size, _ in found)


class EncodedImages:
    """The images of a dataset as the frozen part of an encoder sees them, from a store that is filled first.

    Args:
        model: whose encoder, as `CoSABackbone.encode` has it.
        processor: resizes and normalises.
        dataset: columns `image` and `image_id`.
        root: directory of all caches.
        accelerator: its processes share the work.

    Raises:
        OSError: the disk has no room for what is missing.
        ValueError: the cache is damaged or of another version.
    """

    def __init__(
        self,
        model: CoSAForWeaklySupervisedSegmentation,
        processor: CoSAImageProcessor,
        dataset: Dataset,
        root: Path,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.processor, self.accelerator = model, processor, accelerator
        self.dataset = undecoded(dataset.select_columns(["image", "image_id"]))
        self.keys = image_keys(dataset)
        self.reading = Reading.of(processor)
        self.unreadable: dict[str, str] = {}
        size = (processor.size["height"], processor.size["width"])
        one = self._views(torch.zeros(1, 3, *size, device=accelerator.device))
        trained = {name for name, weight in model.backbone.named_parameters() if weight.requires_grad}
        made_by = {
            "encoder": weights_sha256(model.backbone, without=trained),
            "maps": {name: getattr(model.config, name) for name in MADE_BY},
            "size": size,
            "normalization": [list(processor.image_mean), list(processor.image_std)],
            "precision": accelerator.mixed_precision,
        } | self.reading.settings
        self.store = FeatureStore(root, made_by, {name: tuple(maps.shape[1:]) for name, maps in one.items()})

    @classmethod
    def filled(
        cls,
        model: CoSAForWeaklySupervisedSegmentation,
        processor: CoSAImageProcessor,
        dataset: Dataset,
        chosen: str,
        accelerator: Accelerator,
        num_workers: int = 0,
    ) -> "EncodedImages":
        """The images from the caches that `cache_features` chose, a directory or `auto`; what is missing is encoded."""
        root = default_directory() if chosen == "auto" else Path(chosen)
        encoded = cls(model, processor, dataset, root, accelerator)
        encoded.fill(num_workers)
        return encoded

    def fill(self, num_workers: int) -> None:
        """Encode what is not there yet; a run that was killed goes on here."""
        # The main process decides: another would already miss what the first has written, and share out other rows.
        (missing,) = broadcast_object_list([self.store.missing(self.keys)])
        missing = set(missing)
        rows = [index for index, key in enumerate(self.keys) if key in missing]
        if not rows:
            return
        self.store.require_room(len(rows))
        self.accelerator.print(
            f"encoding {len(rows)} images once, {len(rows) * self.store.bytes_per_image / 1e9:.1f} GB in "
            f"{self.store.directory}"
        )
        share = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        loader = DataLoader(
            self.dataset.select(share), batch_size=ENCODED_AT_ONCE, num_workers=num_workers, collate_fn=self._collate
        )
        bar = progress(
            description="encode", total=len(share), unit="image", disable=not self.accelerator.is_main_process
        )
        keys = iter([self.keys[index] for index in share])
        for pixel_values, problems in loader:
            if pixel_values is not None:
                maps = self._views(pixel_values.to(self.accelerator.device))
            encoded = 0
            for problem in problems:
                key = next(keys)
                if problem:
                    self.unreadable[key] = problem
                    continue
                self.store.write(key, {name: each[encoded] for name, each in maps.items()})
                encoded += 1
            bar.update(len(problems))
        bar.close()
        self.accelerator.wait_for_everyone()
        self.store.missing(self.keys)  # takes in what other processes wrote

    def read(self, key: str) -> dict[str, Tensor]:
        """The maps of one image, each (VIEWS, ...).

        Raises:
            UnreadableImageError: its file could not be read.
        """
        try:
            return self.store.read(key)
        except KeyError:
            raise UnreadableImageError(self.unreadable.get(key, f"image with key {key} was not encoded")) from None

    def sample(self, count: int) -> Iterator[dict[str, Tensor]]:
        """The maps of `count` images from all over the dataset, without those that cannot be read."""
        for place in from_all_over(len(self.keys), count):
            with suppress(UnreadableImageError):
                yield self.read(self.keys[place])

    def _collate(self, rows: list[dict[str, Any]]) -> tuple[Tensor | None, list[str]]:
        """Pixel values of the readable images, and for each row what is wrong with it."""
        images, problems = [], []
        for row in rows:
            try:
                images.append(read_image(row, self.reading))
                problems.append("")
            except UnreadableImageError as error:
                problems.append(str(error))
        return self.processor(images, return_tensors="pt")["pixel_values"] if images else None, problems

    @torch.no_grad()
    def _views(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of the images and of their mirror images, (B, VIEWS, ...)."""
        spreads = self.model.config.affinity != "none"
        with eval_mode(self.model), self.accelerator.autocast():
            views = [self.model.backbone.encode(view, spreads) for view in (images, images.flip(-1))]
        assert len(views) == VIEWS
        return {name: torch.stack([view[name] for view in views], dim=1) for name in views[0]}


__all__ = ["EncodedImages", "FeatureStore", "caches", "clear", "default_directory"]
