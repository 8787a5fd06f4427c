"""The dataset and the model that a command works on, and their arguments: one name, one meaning."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, load_dataset

from cosa_hf.commands.arguments import HelpFormatter, positive
from cosa_hf.data import COEXISTENCE_CLASSES, DatasetOptions, load_dataset_by_name
from cosa_hf.data.formats import Reading
from cosa_hf.data.options import PictureConfig
from cosa_hf.evaluation.crf import DenseCRF
from cosa_hf.inference import SCALES, Segmenter, check_classes
from cosa_hf.training.config import ConfigParser

Kind = TypeVar("Kind")


def dataset_parser(name: str, description: str | None, *more: Any) -> ConfigParser:
    """The parser of a command that reads a dataset: --dataset, --data_dir, the options of its readers, and `more`."""
    kinds: list[Any] = [DatasetOptions, *more]
    parser = ConfigParser(
        kinds,
        prog=f"cosa-hf {name}",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset", required=True, choices=sorted(COEXISTENCE_CLASSES), help="which dataset's layout to read"
    )
    parser.add_argument("--data_dir", help="directory of the dataset (voc: VOC2012); not for shapes and hub")
    return parser


def parse_dataset_args(parser: ConfigParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, DatasetOptions]:
    """What a `dataset_parser` finds."""
    args = parser.parse_args(arguments)
    return args, options_of(args, DatasetOptions)


def options_of(args: argparse.Namespace, kind: type[Kind]) -> Kind:
    """Those of the parsed arguments that are fields of `kind`."""
    return kind(**{spec.name: getattr(args, spec.name) for spec in dataclasses.fields(kind)})  # type: ignore[arg-type]


def dataset_of(args: argparse.Namespace, options: DatasetOptions, segmenter: Segmenter, masks: bool = False) -> Dataset:
    """The split that was asked for, with the model's classes where no option names them."""

    def load(classes: list[str] | None) -> Dataset:
        named = dataclasses.replace(options, classes=classes)
        return load_dataset_by_name(args.dataset, args.data_dir, args.split, masks=masks, options=named)

    try:
        return load(options.classes or segmenter.names[1:])
    except ValueError:
        # The reader complains of classes that were passed, and here the user passed none.
        if args.dataset == "hub" and not options.classes and _lists_classes(options, args.split):
            check_classes(load(None), segmenter.model.config)
        raise


def _lists_classes(options: DatasetOptions, split: str) -> bool:
    """Whether the type of a dataset's label column has the classes; text takes those it is given."""
    features = load_dataset(options.dataset_name, options.dataset_config, split=split).features
    feature = features.get(options.label_column)
    return isinstance(getattr(feature, "feature", feature), ClassLabel)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory of a saved model, or its name on the Hub")


def add_inference(parser: argparse.ArgumentParser) -> None:
    """How images go through the model: --scales, --no_flip, --batch_size."""
    parser.add_argument(
        "--scales", type=float, nargs="+", default=list(SCALES), help="relative input sizes whose outputs are fused"
    )
    parser.add_argument("--no_flip", action="store_true", help="do not also fuse the outputs for mirrored images")
    parser.add_argument("--batch_size", type=positive, default=8, help="images per forward pass")
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """What values and bands of image files become colours, for a model that does not know: --value_range, --bands."""
    own = "(default: the model's own, as of its training images)"
    parser.add_argument(
        "--value_range",
        nargs="+",
        metavar="LOW HIGH",
        help=f"what values of more than 8 bits are scaled from, or window: that of each DICOM file {own}",
    )
    parser.add_argument(
        "--bands", nargs="+", type=positive, help=f"one or three bands that are grey or red, green and blue {own}"
    )


def reading_of(args: argparse.Namespace) -> Reading:
    """What `add_reading` found.

    Raises:
        ValueError: neither a range nor "window"; neither one nor three bands.
    """
    asked = None if args.value_range is None else PictureConfig(value_range=args.value_range).asked_range
    if asked == "auto":
        raise ValueError("--value_range auto is for training, which finds the range; the model has it, so leave it out")
    bands = PictureConfig(bands=args.bands).bands
    return Reading(asked, None if bands is None else tuple(bands))


def segmenter_of(args: argparse.Namespace, device: Any, **options: Any) -> Segmenter:
    """The model, used as `add_inference` was told."""
    options |= {"scales": args.scales, "flip": not args.no_flip, "batch_size": args.batch_size}
    return Segmenter.from_pretrained(args.model, device=device, reading=reading_of(args), **options)


def add_crf(parser: argparse.ArgumentParser) -> None:
    """--crf."""
    parser.add_argument(
        "--crf", action="store_true", help="refine the masks with a dense CRF, at 0.32 megapixels at most"
    )


def crf_of(args: argparse.Namespace) -> DenseCRF | None:
    """What --crf asks for."""
    return DenseCRF() if args.crf else None
