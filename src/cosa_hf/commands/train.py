"""Train CoSA from image-level tags.

    cosa-hf train                                                            drawn images, minutes on a laptop
    cosa-hf train --data_dir photos                                          your own: docs/own-data.md
    accelerate launch -m cosa_hf.cli train --recipe voc-vit-b --data_dir VOCdevkit/VOC2012        on several GPUs

A recipe is a YAML file, or the name of one that comes with the package; every field is also a flag, and flags win.
Without a name it is folder-clip where --data_dir is given, which takes frozen CLIP from the Hub, and else shapes-tiny.
"""

from collections.abc import Sequence

from cosa_hf import train
from cosa_hf.commands.arguments import parse_config, recipe_chooser
from cosa_hf.training.config import TrainingConfig


def main(arguments: Sequence[str]) -> None:
    print(train(parse(arguments)))


def parse(arguments: Sequence[str]) -> TrainingConfig:
    known = ", ".join(sorted(path.stem for path in TrainingConfig.directory.glob("*.yaml")))
    chooser = recipe_chooser("train", help=f"a YAML file, or one of {known}")
    chosen, flags = chooser.parse_known_args(arguments)
    own = any(flag.split("=")[0] == "--data_dir" for flag in flags)
    recipe = chosen.recipe or ("folder-clip" if own else "shapes-tiny")
    return parse_config(TrainingConfig, flags, chooser, __doc__, TrainingConfig.values_of(recipe))
