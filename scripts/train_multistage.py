"""Train a network of CoSA-MS (Tab. 2) on the pseudo-labels that export_pseudo_labels.py wrote.

    accelerate launch scripts/train_multistage.py --network upernet-swin-b --pseudo_labels VOC2012-pseudo
    ... --network smp/unet/resnet34            any network of segmentation_models_pytorch, on any timm encoder
    ... --network nvidia/mit-b0                any segmentation network of transformers, on disk or on the Hub

A recipe is a YAML file, or the name of one in recipes/multistage/; without --recipe it is the one named like the
network, where there is one. Every field is also a flag, and flags win.
"""

import argparse
import sys

from arguments import failure, recipe_of

from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.task import train_multistage


def parse(arguments: list[str]) -> MultistageConfig:
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--recipe", help="a YAML file, or the name of one in recipes/multistage/")
    network = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    network.add_argument("--network", default="")
    chosen, flags = chooser.parse_known_args(arguments)
    wanted = network.parse_known_args(flags)[0].network
    named = MultistageConfig.directory / f"{wanted}.yaml"
    values = MultistageConfig.values_of(chosen.recipe or wanted) if chosen.recipe or named.is_file() else {}
    return recipe_of(MultistageConfig, values, flags, chooser, __doc__)


if __name__ == "__main__":
    try:
        print(train_multistage(parse(sys.argv[1:])))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(failure(error))
