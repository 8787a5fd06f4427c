"""Train a network of CoSA-MS (Tab. 2) on the pseudo-labels that `cosa-hf label` wrote.

    cosa-hf multistage --network upernet-swin-b --pseudo_labels VOC2012-pseudo
    ... --network smp/unet/resnet34            any network of segmentation_models_pytorch, on any timm encoder
    ... --network nvidia/mit-b0                any segmentation network of transformers, on disk or on the Hub

A recipe is a YAML file, or the name of one that comes with the package; without --recipe it is the one named like the
network, where there is one. Every field is also a flag, and flags win.
"""

import argparse
from collections.abc import Sequence

from cosa_hf.commands.arguments import parse_config, recipe_chooser
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.train import train_multistage


def main(arguments: Sequence[str]) -> None:
    print(train_multistage(parse(arguments)))


def parse(arguments: Sequence[str]) -> MultistageConfig:
    known = sorted(path.stem for path in MultistageConfig.directory.glob("*.yaml"))
    chooser = recipe_chooser("multistage", help=f"a YAML file, or one of {', '.join(known)}")
    network = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    network.add_argument("--network")
    chosen, flags = chooser.parse_known_args(arguments)
    wanted = network.parse_known_args(flags)[0].network
    name = chosen.recipe or (wanted if wanted in known else None)
    values = MultistageConfig.values_of(name) if name else {}
    return parse_config(MultistageConfig, flags, chooser, __doc__, values)
