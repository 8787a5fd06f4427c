"""From a model and tagged images to a dataset of masks: shard by shard, by any number of processes, resumable."""

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from cosa_hf._version import __version__
from cosa_hf.data.images import Reading, UnreadableImageError, read_image, undecoded
from cosa_hf.data.negatives import NEGATIVE
from cosa_hf.data.tags import list_some
from cosa_hf.digest import weights_sha256
from cosa_hf.files import remove_unfinished, whole_file
from cosa_hf.inference import Segmenter, check_classes, has_cams
from cosa_hf.objective.affinity import affinity_settings
from cosa_hf.progress import progress as progress_bar
from cosa_hf.pseudo_labels.formats import FORMATS, Format, PseudoLabel

__all__ = ["RECORD", "SOURCES", "export_pseudo_labels"]

#: What masks can be made from, and the protocol of evaluation that scores the same masks.
SOURCES = {name: name for name in ("cam", "cam_aux", "cam_mean", "cam_spread")}
SOURCES |= {"seg": "seg_tags", "seg_spread": "seg_tags_spread"}

#: The file in an export's directory that says how it was made and whether it is complete.
RECORD = "export.json"


def export_pseudo_labels(
    segmenter: Segmenter,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    source: str,
    format: str,
    split: str,
    threshold: float | None = None,
    class_threshold: float | None = None,
    shard_size: int = 256,
    data_dir: str | Path | None = None,
    encode: Callable[[], Callable[[str], Mapping[str, Tensor]]] | None = None,
    progress: bool = True,
) -> int:
    """Label every image of a dataset and write image, tags and mask in a format for other programs.

    Masks have the size of the upright image. Nothing outside `output_dir` is written, and there only complete
    files. The processes of `accelerate.PartialState` share the shards. A call with the same settings takes up
    an export that was interrupted: finished shards stay as they are, only those in hand are computed again,
    and the result is that of an uninterrupted export, byte for byte. Masks in the dataset are never opened.

    Args:
        segmenter: the paper's masks are of `scales=SCALES, flip=True`.
        dataset: with the columns image, labels and image_id.
        output_dir: a new or empty directory, or one that an export was interrupted in.
        source: a key of `SOURCES`: CAM, auxiliary CAM, their mean (Eq. 3), that spread by the model's affinity, or
            the segmentation.
        format: a key of `FORMATS`: "png", "parquet" or "coco-json".
        split: names the files of the export.
        threshold: xi, from where on a CAM is foreground; default: the model's own `cam_threshold`.
        class_threshold: label an image that has no tag by the classes whose probability reaches this; default: such
            images are refused.
        shard_size: images that are written, and lost when the process is killed, together.
        data_dir: what the file names in COCO json are relative to; images outside of it are relative to the directory
            that they all lie in.
        encode: gives the `encoded` of `Segmenter.predict`; called in all processes once `output_dir` is known to be
            fit, and not for an export that is complete.
        progress: show a bar on stderr, for the share of the main process.

    Returns:
        How many images this call labelled, in all processes.

    Raises:
        ValueError: a setting is out of range, a CAM or an affinity is asked of a model without, the classes are not
            the model's, an image has no tag, two have one id, images cannot be read (all are named, and the shards
            without one are labelled first), or `output_dir` has an export with other settings.
        FileExistsError: `output_dir` has files that no export wrote.
        OSError: the disk is full; the same call goes on when there is room.

    Example:
        >>> from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
        >>> from cosa_hf.data import SHAPES_CLASSES, load_shapes
        >>> config = CoSAConfig(backbone="test_vit", id2label=dict(enumerate(["background", *SHAPES_CLASSES])))
        >>> model = CoSAForWeaklySupervisedSegmentation(config)
        >>> segmenter = Segmenter(model, CoSAImageProcessor(size={"height": 32, "width": 32}))
        >>> settings = {"source": "cam_mean", "format": "png", "split": "val", "progress": False}
        >>> export_pseudo_labels(segmenter, load_shapes("val", 2), "masks", **settings)
        2
        >>> sorted(path.name for path in Path("masks/SegmentationClassAug").iterdir())
        ['val-00000.png', 'val-00001.png']
    """
    output_dir, state, model = Path(output_dir), PartialState(), segmenter.model
    if not has_cams(model) and (source != "seg" or class_threshold is not None):
        raise ValueError(
            f"a {type(model).__name__} only segments: its masks come from source seg and given tags, "
            f"got source {source}" + (" and predicted tags" if class_threshold is not None else "")
        )
    if source.endswith("_spread") and affinity_settings(model.config) is None:
        raise ValueError(f"source {source} needs a model whose config names an affinity; this one spreads nothing")
    check_classes(dataset, model.config)
    columns = ["image", "labels", "image_id", *([NEGATIVE] if NEGATIVE in dataset.column_names else [])]
    dataset = undecoded(dataset.select_columns(columns))
    classes = segmenter.names[1:]
    settings: dict[str, Any] = {
        "source": source,
        "format": format,
        "threshold": None if source == "seg" else model.config.cam_threshold if threshold is None else threshold,
        "class_threshold": class_threshold,
        **segmenter.settings,
        **({} if encode is None else {"cached_features": True}),  # in float16: masks differ by rounding
        "classes": classes,
        "split": split,
        "images": len(dataset),
        "shard_size": shard_size,
    }
    _check(settings)
    settings["dataset_sha256"] = _check_images(dataset, class_threshold)
    settings["weights_sha256"] = weights_sha256(model)
    rows = [range(start, min(start + shard_size, len(dataset))) for start in range(0, len(dataset), shard_size)]
    paths = dataset.flatten()["image.path"][:]
    files = FORMATS[format](output_dir, classes, split, len(rows), paths, data_dir)

    complete = _check_directory(output_dir, settings)
    state.wait_for_everyone()  # nobody writes while another still looks
    if complete:
        if state.is_main_process:
            files.clean()  # which a killed process may not have come to
        return 0
    encoded = None if encode is None else encode()
    with _full_disk_explained(output_dir):
        if state.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            remove_unfinished(output_dir)
            if not (output_dir / RECORD).exists():
                _write_record(output_dir, settings, model, complete=False)
            files.prepare()
        state.wait_for_everyone()
        missing = [shard for shard in range(len(rows)) if not files.shard_file(shard).exists()]
        state.wait_for_everyone()
        unreadable: list[str] = []
        with state.split_between_processes(missing) as mine:
            bar = progress_bar(
                description="export" if state.num_processes == 1 else f"export, process 1 of {state.num_processes}",
                total=sum(len(rows[shard]) for shard in mine),
                unit="image",
                disable=not (progress and state.is_main_process),
            )
            with bar:
                for shard in mine:
                    images = dataset.select(rows[shard], keep_in_memory=True)
                    try:
                        _write_shard(files, shard, _pseudo_labels(segmenter, images, settings, encoded), bar)
                    except ValueError as error:
                        unreadable += _unreadable(images, segmenter.reading) or [str(error)]
        unreadable = gather_object(unreadable)
        if unreadable:
            raise ValueError(
                "\n".join(unreadable) + f"\nthe other shards of {output_dir} are done: once these files are replaced, "
                "the same command goes on from there; images taken off the list make it another export, which starts "
                "anew in another directory"
            )
        if state.is_main_process:
            files.finish()
            _write_record(output_dir, settings, model, complete=True)
            files.clean()
        state.wait_for_everyone()
    return sum(len(rows[shard]) for shard in missing)


def _pseudo_labels(
    segmenter: Segmenter, images: Dataset, settings: dict[str, Any], encoded: Any
) -> Iterator[PseudoLabel]:
    protocol, threshold = SOURCES[settings["source"]], settings["threshold"]
    for one, row in zip(segmenter.predict(images, settings["class_threshold"], encoded), images, strict=True):
        mask, confidence = one.label(protocol, threshold)
        yield PseudoLabel(
            one.image_id,
            row["image"],
            one.labels.nonzero().flatten().tolist(),
            mask.cpu().numpy().astype(np.uint16),
            (255 * confidence).round().cpu().numpy().astype(np.uint8),
        )


def _unreadable(images: Dataset, reading: Reading) -> list[str]:
    """What is wrong with every image that cannot be read: the model stopped at the first."""
    found = []
    for row in images:
        try:
            read_image(row, reading)
        except UnreadableImageError as error:
            found.append(str(error))
    return found


def _write_shard(files: Format, shard: int, labels: Iterator[PseudoLabel], bar: Any) -> None:
    entries = []
    for label in labels:
        entries.append(files.encode(label))
        bar.update()
    files.write(shard, entries)


def _check(settings: dict[str, Any]) -> None:
    for name, known in (("source", SOURCES), ("format", FORMATS)):
        if settings[name] not in known:
            raise ValueError(f"unknown {name} {settings[name]!r}; known: {', '.join(known)}")
    for name in ("threshold", "class_threshold"):
        if settings[name] is not None and not 0 < settings[name] < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {settings[name]}")
    if settings["shard_size"] < 1:
        raise ValueError(f"shard_size must be 1 or more, got {settings['shard_size']}")
    if not settings["images"]:
        raise ValueError("the dataset is empty: nothing to label")


def _check_images(dataset: Dataset, class_threshold: float | None) -> str:
    """The digest of ids and tags, once they are fit for an export."""
    image_ids, labels = dataset["image_id"][:], dataset["labels"][:]
    twice = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
    if twice:
        raise ValueError(f"{list_some(twice)} more than once in the dataset: masks could not be told apart")
    negative = dataset[NEGATIVE][:] if NEGATIVE in dataset.column_names else [False] * len(dataset)
    untagged = [
        image_id for image_id, tags, none in zip(image_ids, labels, negative, strict=True) if not (tags or none)
    ]
    if untagged and class_threshold is None:
        raise ValueError(
            f"{len(untagged)} of {len(image_ids)} images have no tag: {list_some(untagged)}; tag them, take them off "
            "the split, or label them by what the model recognises (--tags predicted)"
        )
    return hashlib.sha256(json.dumps([image_ids, labels]).encode()).hexdigest()


def _check_directory(output_dir: Path, settings: dict[str, Any]) -> bool:
    """Whether the export in this directory is complete already."""
    path = output_dir / RECORD
    if not path.exists():
        # A process killed while it wrote its first file leaves that unfinished.
        if output_dir.exists() and any(not entry.name.startswith(".") for entry in output_dir.iterdir()):
            raise FileExistsError(f"{output_dir} is not empty and has no {RECORD}: choose another directory")
        return False
    record = read_record(output_dir)
    before = record["settings"]
    other = [
        f"  {name}: {before.get(name)} there, {settings.get(name)} now"
        for name in before.keys() | settings
        if before.get(name) != settings.get(name)
    ]
    if other:
        raise ValueError(
            f"{output_dir} has an export with other settings; repeat them or choose another directory\n"
            + "\n".join(sorted(other))
        )
    return record["complete"]


def read_record(directory: Path) -> dict[str, Any]:
    """What the export in a directory says about itself: `settings`, `complete`, and what made it.

    Raises:
        ValueError: its file is damaged or of something else.
    """
    path = directory / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["complete"], bool) or not isinstance(record["settings"]["format"], str):
            raise TypeError("a value of another type")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not as an export writes it ({error!r}): take another directory") from error
    return record


def _write_record(output_dir: Path, settings: dict[str, Any], model: Any, complete: bool) -> None:
    made_by = {"model": model.config.name_or_path or None, "cosa_hf": __version__}
    record = {"complete": complete, "settings": settings, **made_by}
    with whole_file(output_dir / RECORD) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _full_disk_explained(output_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: what is finished in {output_dir} is complete; make room and run the same "
            "command again, it goes on from there",
        ) from error
