"""Arguments that several scripts have: one name, one meaning."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, load_dataset
from transformers import HfArgumentParser

from cosa_hf.data import COEXISTENCE_CLASSES, DatasetOptions, load_dataset_by_name
from cosa_hf.evaluation.maps import SCALES, check_classes, label_names
from cosa_hf.training.config import RunConfig

AnyRecipe = TypeVar("AnyRecipe", bound=RunConfig)


def recipe_of(
    kind: type[AnyRecipe],
    values: dict[str, Any],
    flags: list[str],
    chooser: argparse.ArgumentParser,
    description: str | None,
) -> AnyRecipe:
    """A recipe from the fields that a file sets and from flags, which win; `chooser` took --recipe before."""
    parser = HfArgumentParser(kind, parents=[chooser], description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(**values)
    recipe, *_ = parser.parse_args_into_dataclasses(flags)
    return recipe


def failure(error: Exception) -> str:
    """What a run that ended says last: the error, and what was noted on its way (images, checkpoint to go on from)."""
    return "\n".join([f"error: {error}", *getattr(error, "__notes__", [])])


def dataset_parser(description: str | None) -> HfArgumentParser:
    """Takes --dataset, --data_dir and, as a dataclass of their own, the options of its readers."""
    parser = HfArgumentParser(
        DatasetOptions,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset", required=True, choices=sorted(COEXISTENCE_CLASSES), help="which dataset's layout to read"
    )
    parser.add_argument("--data_dir", help="directory of the dataset (voc: VOC2012); not for shapes and hub")
    return parser


def dataset_of(args: argparse.Namespace, options: DatasetOptions, config: Any, masks: bool = False) -> Dataset:
    """The split that was asked for, with the classes of a model's config where the options name none."""

    def load(classes: list[str] | None) -> Dataset:
        named = dataclasses.replace(options, classes=classes)
        return load_dataset_by_name(args.dataset, args.data_dir, args.split, masks=masks, options=named)

    try:
        return load(options.classes or label_names(config)[1:])
    except ValueError:
        # The reader complains of classes that were passed, and here the user passed none.
        if args.dataset == "hub" and not options.classes and lists_classes(options, args.split):
            check_classes(load(None), config)
        raise


def lists_classes(options: DatasetOptions, split: str) -> bool:
    """Whether the type of a dataset's label column has the classes; text takes those it is given."""
    features = load_dataset(options.dataset_name, options.dataset_config, split=split).features
    feature = features.get(options.label_column)
    return isinstance(getattr(feature, "feature", feature), ClassLabel)


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


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory of a saved model, or its name on the Hub")


def add_inference(parser: argparse.ArgumentParser) -> None:
    add_fusion(parser)
    parser.add_argument("--batch_size", type=positive, default=8, help="images per forward pass (default: %(default)s)")


def add_fusion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=list(SCALES),
        help="relative input sizes whose outputs are fused (default: %(default)s)",
    )
    parser.add_argument("--no_flip", action="store_true", help="do not also fuse the outputs for mirrored images")


def named_directories(models: list[str]) -> dict[str, Path]:
    """Directories of runs or models by name: that of NAME=DIRECTORY, else the directory's own."""
    paths: dict[str, Path] = {}
    for model in models:
        name, _, directory = model.rpartition("=")
        path = Path(model if Path(model).is_dir() else directory)
        if not path.is_dir():
            raise FileNotFoundError(f"no directory {path}; MODEL is that of a run or of a saved model")
        name = name if path != Path(model) else path.name
        if name in paths:
            raise ValueError(f"both {paths[name]} and {path} are called {name!r}; call one of them NAME={path}")
        paths[name] = path
    return paths


def inference_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_inference` took, as `predict_maps` wants it."""
    return {"scales": args.scales, "flip": not args.no_flip, "batch_size": args.batch_size}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
