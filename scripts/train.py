"""Train CoSA from image-level tags.

    accelerate launch scripts/train.py                                        the embedded demo
    accelerate launch scripts/train.py --recipe voc-vit-b --data_dir VOCdevkit/VOC2012
    accelerate launch scripts/train.py --recipe folder-lite0 --data_dir photos   your own: docs/own-data.md

A recipe is a YAML file, or the name of one in recipes/; every field of it is also a flag, and flags win.
"""

import argparse
import sys

from arguments import failure, recipe_of

from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.loop import train


def parse(arguments: list[str]) -> TrainingConfig:
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--recipe", default="shapes-tiny", help="a YAML file, or the name of one in recipes/")
    chosen, flags = chooser.parse_known_args(arguments)
    return recipe_of(TrainingConfig, vars(TrainingConfig.named(chosen.recipe)), flags, chooser, __doc__)


if __name__ == "__main__":
    try:
        print(train(parse(sys.argv[1:])))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(failure(error))
