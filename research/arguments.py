"""Arguments that several research commands share; those of a dataset and of inference are those of `cosa-hf`."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosa_hf.commands.arguments import HelpFormatter
from cosa_hf.commands.inputs import reading_of
from cosa_hf.data import COEXISTENCE_CLASSES, DatasetOptions
from cosa_hf.inference import Segmenter
from cosa_hf.training.config import ConfigParser


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Also a decorator: an error that a user can correct ends the command with its message, and without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit("\n".join([f"error: {error}", *getattr(error, "__notes__", [])])) from error


def dataset_parser(description: str | None, required: bool = True) -> ConfigParser:
    """Takes --dataset, --data_dir and, as a dataclass of their own, the options of the dataset readers."""
    parser = ConfigParser(DatasetOptions, description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--dataset", required=required, choices=sorted(COEXISTENCE_CLASSES), help="its layout")
    parser.add_argument("--data_dir", help="directory of the dataset (voc: VOC2012); not for shapes and hub")
    return parser


def segmenter_of(args: argparse.Namespace, model: str | Path) -> Segmenter:
    """The model with the settings that `add_inference` took."""
    settings = {"scales": args.scales, "flip": not args.no_flip, "batch_size": args.batch_size}
    settings["reading"] = reading_of(args)
    return Segmenter.from_pretrained(model, **settings)


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
