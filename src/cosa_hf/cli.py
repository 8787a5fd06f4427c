"""The console command `cosa-hf`: a module of `commands/` for each of its commands, and one error handler.

Started by Accelerate it is `accelerate launch -m cosa_hf.cli train ...`.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from cosa_hf._version import __version__

COMMANDS = {
    "demo": "train on drawn images from tags, score the model, segment a new image: minutes, no download",
    "import": "turn the export of another tool into a table of tags",
    "check": "read a dataset once and say what would spoil training",
    "train": "train CoSA from image-level tags",
    "evaluate": "score a model on a dataset with masks",
    "predict": "segment photos",
    "label": "label a dataset by a model: masks for other networks and tools",
    "multistage": "train another network on those labels (CoSA-MS)",
    "push": "publish a model on the Hub",
    "export": "write a model as ONNX, or as a checkpoint of the authors' code",
    "convert": "read the authors' released weights; write the masks of COCO",
    "app": "open a page to try a model on",
    "cache": "show or remove the cached features of frozen encoders",
}

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
"""What says that something given to the command is at fault. Other exceptions are ours, and keep their traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its name and arguments; those of the process when None.

    Returns:
        The exit status: 0; 1 after an error, which is one line on stderr, and below it what was noted on its way; 130
        after an interruption from the keyboard.

    Raises:
        SystemExit: 2 for arguments that do not fit; what a stopped training ends with, such as 143 after SIGTERM.

    Example:
        >>> main(["predict", "nowhere", "cat.jpg", "--output_dir", "cat.jpg"])  # doctest: +SKIP
        1
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = _parser().parse_args(words[:1]).command
    try:
        import_module("cosa_hf.registration")
        # Bars for loading and saving a model, which takes no time, would hide ours.
        import_module("transformers.utils.logging").disable_progress_bar()
        return import_module(f"cosa_hf.commands.{name}").main(words[1:]) or 0
    except KeyboardInterrupt as interruption:
        _print("interrupted", interruption)
        return 130
    except USER_ERRORS as error:
        # A missing extra is named with the command that installs it.
        if isinstance(error, ImportError) and "pip install" not in str(error):
            raise
        _print(f"error: {' '.join(str(error).split()) or type(error).__name__}", error)
        return 1


def _print(line: str, error: BaseException) -> None:
    print(line, *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="cosa-hf",
        usage="%(prog)s COMMAND ...",
        description="Semantic segmentation from image-level tags: CoSA (ECCV 2024).",
        epilog="\n".join(
            [
                "commands:",
                *(f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()),
                "",
                "`cosa-hf COMMAND --help` shows an example and all options. To begin with: cosa-hf demo",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
