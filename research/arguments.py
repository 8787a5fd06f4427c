"""Arguments that several research commands share: dataset, inference, models by name, places to write to."""

import argparse
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import HfArgumentParser

from cosa_hf import data
from cosa_hf.inference import SCALES, Segmenter, label_names
from cosa_hf.training.config import TrainingConfig


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Also a decorator: what a user can mend ends the command with its message, and without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit("\n".join([f"error: {error}", *getattr(error, "__notes__", [])])) from error


def recipe_of(name: str, flags: list[str]) -> TrainingConfig:
    """The recipe of that name, changed by flags as `cosa-hf train` takes them."""
    parser = HfArgumentParser(TrainingConfig, allow_abbrev=False)
    parser.set_defaults(**vars(TrainingConfig.named(name)))
    (recipe,) = parser.parse_args_into_dataclasses(flags)
    return recipe


def dataset_parser(description: str | None, required: bool = True) -> HfArgumentParser:
    """Takes --dataset, --data_dir and, as a dataclass of their own, the options of the dataset readers."""
    parser = HfArgumentParser(
        data.DatasetOptions,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset", required=required, choices=sorted(data.COEXISTENCE_CLASSES), help="layout of the dataset"
    )
    parser.add_argument("--data_dir", help="directory of the dataset (voc: VOC2012); not for shapes and hub")
    return parser


def dataset_of(args: argparse.Namespace, options: data.DatasetOptions, config: Any, masks: bool = False) -> Dataset:
    """The split that was asked for, with the classes of a model's config unless the options name others."""
    options = dataclasses.replace(options, classes=options.classes or label_names(config)[1:])
    return data.load_dataset_by_name(args.dataset, args.data_dir, args.split, masks=masks, options=options)


def add_fusion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=list(SCALES),
        help="relative input sizes whose outputs are fused (default: %(default)s)",
    )
    parser.add_argument("--no_flip", action="store_true", help="do not also fuse the outputs for mirrored images")


def add_inference(parser: argparse.ArgumentParser) -> None:
    add_fusion(parser)
    parser.add_argument("--batch_size", type=positive, default=8, help="images per forward pass (default: %(default)s)")


def segmenter_of(args: argparse.Namespace, model: Any) -> Segmenter:
    """The model with the settings that `add_inference` took."""
    return Segmenter.from_pretrained(str(model), scales=args.scales, flip=not args.no_flip, batch_size=args.batch_size)


def named_paths(models: list[str]) -> dict[str, Path]:
    """Runs, models or files by name: that of NAME=PATH, otherwise the last part of the path.

    Raises:
        FileNotFoundError: there is nothing at a path.
        ValueError: two have the same name.
    """
    paths: dict[str, Path] = {}
    for model in models:
        name, _, place = model.rpartition("=")
        path = Path(model if Path(model).exists() else place)
        if not path.exists():
            raise FileNotFoundError(f"no directory {path}; MODEL is that of a run or of a saved model")
        name = name if path != Path(model) else path.name
        if name in paths:
            raise ValueError(f"both {paths[name]} and {path} are called {name!r}; call one of them NAME={path}")
        paths[name] = path
    return paths


def check_output(path: Path, directory: bool = False) -> None:
    """Refuse a file, or a directory, that could not be written after the work. Makes nothing.

    Raises:
        OSError: something else is in its place, or it may not be written.
    """
    there = next(place for place in (path, *path.parents) if place.exists())
    if there.is_dir() != (directory or there != path):
        kind = "directory" if there.is_dir() else "file"
        raise FileExistsError(f"cannot write {path}: {there} is a {kind}; choose another name")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission to write {there}; choose another place")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
