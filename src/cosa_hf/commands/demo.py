"""The embedded demo, start to end: train from tags, score on unseen images, segment an unseen image.

    cosa-hf demo --output_dir runs/demo

Leaves model/, report.json (with classification_only: the CAMs of such a run of the same length), panels/*.png, all of
these visualizations in one image as panels.png, and unseen.png with its mask.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cosa_hf.commands.arguments import command_parser
from cosa_hf.demo.run import run


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    run(args.output_dir, args.recipe)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("demo", __doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="a new or empty directory")
    parser.add_argument("--recipe", default="shapes-tiny", help="a YAML file, or the name of one of the package")
    return parser.parse_args(arguments)
