"""Parsers of commands: their help, and configurations from recipes and flags."""

import argparse
import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from cosa_hf.training.config import RunConfig, config_from_flags

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description, tells every default but None and False, and names an option once."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if not action.help or not action.option_strings or silent:
            return action.help
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else "%(default)s"
        return f"{action.help} (default: {default})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        return super()._format_action_invocation(shown)

    def add_argument(self, action: argparse.Action) -> None:
        # Of a field that is true by default HfArgumentParser makes --field and --no_field, with the same help.
        if list(action.option_strings[:1]) != [f"--no_{action.dest}"]:
            super().add_argument(action)


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
    """A configuration from the fields that a recipe sets and from flags, which win; `chooser` took --recipe before."""
    return config_from_flags(
        kind,
        values,
        flags,
        prog=chooser.prog,
        usage=f"{chooser.prog} [--recipe RECIPE] [--FIELD VALUE ...]",
        parents=[chooser],
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
