"""Arguments that several commands have: one name, one meaning."""

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, load_dataset
from transformers import HfArgumentParser

from cosa_hf.data import COEXISTENCE_CLASSES, DatasetOptions, class_names, load_dataset_by_name
from cosa_hf.evaluation.crf import DenseCRF
from cosa_hf.inference import SCALES, Segmenter, check_classes

AnyConfig = TypeVar("AnyConfig")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description, and tells every default but None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.help or not action.option_strings or action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `cosa-hf NAME`."""
    return argparse.ArgumentParser(
        prog=f"cosa-hf {name}", description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )


def recipe_chooser(name: str, **options: Any) -> argparse.ArgumentParser:
    """Takes --recipe of `cosa-hf NAME`, before `parse_config` takes the flags that win over it."""
    chooser = argparse.ArgumentParser(prog=f"cosa-hf {name}", add_help=False, allow_abbrev=False)
    chooser.add_argument("--recipe", **options)
    return chooser


def parse_config(
    kind: type[AnyConfig],
    flags: Sequence[str],
    chooser: argparse.ArgumentParser,
    description: str | None,
    values: dict[str, Any],
) -> AnyConfig:
    """A configuration from the fields that a recipe sets and from flags, which win.

    Args:
        kind: a dataclass. Its `parts`, where it has them, are the groups of `--help`.
        flags: the command line, without what `chooser` took.
        chooser: took --recipe before.
        description: what `--help` begins with.
        values: of the recipe, by field.

    Raises:
        ValueError: a value that the configuration refuses.
    """
    parser = HfArgumentParser(
        [_flags_of(part) for part in getattr(kind, "parts", ()) or (kind,)],
        prog=chooser.prog,
        parents=[chooser],
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**values)
    found = parser.parse_args(flags)
    return kind(**{spec.name: getattr(found, spec.name) for spec in dataclasses.fields(kind)})  # type: ignore[arg-type]


def _flags_of(part: type) -> type:
    """The fields of a dataclass as flags: without its checks, and without what only those read of a field."""
    hints = typing.get_type_hints(part)
    fields: list[Any] = []
    for spec in dataclasses.fields(part):
        default: Any = {"default": spec.default, "default_factory": spec.default_factory}
        plain = dataclasses.field(**default, metadata={"help": spec.metadata["help"]})
        fields.append((spec.name, hints[spec.name], plain))
    group = getattr(part, "_argument_group_name", None)
    namespace = {"_argument_group_name": group} if group else {}
    return dataclasses.make_dataclass(part.__name__, fields, namespace=namespace, kw_only=True)


def dataset_parser(name: str, description: str | None) -> HfArgumentParser:
    """The parser of a command that reads a dataset: --dataset, --data_dir and the options of its readers."""
    parser = HfArgumentParser(
        DatasetOptions,
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


def parse_dataset_args(
    parser: HfArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, DatasetOptions]:
    """What a `dataset_parser` finds."""
    options, args = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    return args, options


def dataset_of(args: argparse.Namespace, options: DatasetOptions, names: list[str], masks: bool = False) -> Dataset:
    """The split that was asked for, with a model's classes (`names`, without background) where no option names them."""

    def load(classes: list[str] | None) -> Dataset:
        named = dataclasses.replace(options, classes=classes)
        return load_dataset_by_name(args.dataset, args.data_dir, args.split, masks=masks, options=named)

    try:
        return load(options.classes or names)
    except ValueError:
        # The reader complains of classes that were passed, and here the user passed none.
        if args.dataset == "hub" and not options.classes and _lists_classes(options, args.split):
            check_classes(class_names(load(None)), names)
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


def segmenter_of(args: argparse.Namespace, device: Any, **options: Any) -> Segmenter:
    """The model, used as `add_inference` was told."""
    return Segmenter.from_pretrained(
        args.model, device=device, scales=args.scales, flip=not args.no_flip, batch_size=args.batch_size, **options
    )


def crf_of(args: argparse.Namespace) -> DenseCRF | None:
    """What --crf asks for."""
    return DenseCRF() if args.crf else None


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
