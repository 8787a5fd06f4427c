"""Open a page to try a model on (extra `app`).

cosa-hf app runs/demo/model
"""

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    from cosa_hf.app import main as serve

    serve(list(arguments))
