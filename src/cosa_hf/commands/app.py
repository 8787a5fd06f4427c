"""Open a page to try a model on: upload a photo, tick what is in it or nothing, see the mask and the CAM of a class.

Needs gradio: pip install 'cosa-hf[app]'. The environment variable COSA_MODEL names a model too.

    cosa-hf app runs/demo/model
"""

import argparse
from collections.abc import Sequence

from cosa_hf.app import main as serve
from cosa_hf.commands.arguments import command_parser


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    serve(args.model, args.port)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("app", __doc__)
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="directory of a saved model, or its name on the Hub (default: the small one that comes with the package)",
    )
    parser.add_argument("--port", type=int, help="port of the page (default: the first free one from 7860)")
    return parser.parse_args(arguments)
