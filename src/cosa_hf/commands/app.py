"""Open a page to try a model on: upload a photo, tick what is in it or nothing, see the mask and the CAM of a class.

Needs gradio: pip install 'cosa-hf[app]'. Without a model it is the small one that comes with the package.

    cosa-hf app runs/demo/model
"""

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    from cosa_hf.app import main as serve

    serve(list(arguments))
