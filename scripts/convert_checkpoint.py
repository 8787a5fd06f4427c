"""Convert a checkpoint of the authors' CoSA code into a directory that from_pretrained loads, or back.

The weights are a download of your own; this package ships none. The file is read without running code in it.

Examples:
    python scripts/convert_checkpoint.py voc_weights.pth runs/voc-released --dataset voc
    python scripts/convert_checkpoint.py runs/voc/assignment assignment.pth --to_official
"""

import argparse
from pathlib import Path

import torch

from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.inference import load_model, require_cams
from cosa_hf.publishing.official import DATASETS, from_official, to_official


def main(args: argparse.Namespace) -> None:
    try:
        if args.to_official:
            model, _ = load_model(args.source, "cpu")
            require_cams(model)
            args.target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(to_official(model), args.target)
            print(f"{args.target}: a checkpoint for the authors' code; its encoder.head, unused, is zero")
            return
        model, processor = from_official(args.source, args.dataset, args.backbone, args.aux_layer)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    model.save_pretrained(args.target)
    processor.save_pretrained(args.target)
    print(
        f"{args.target}: {model.num_parameters() / 1e6:.1f} M parameters, {model.config.num_classes} classes, "
        f"auxiliary layer {args.aux_layer}\n"
        "size and normalisation are the released evaluation's; scales and flips are flags of evaluate.py, which has "
        "the released ones by default:\n"
        f"  python scripts/evaluate.py {args.target} --dataset {args.dataset} --data_dir DIR --split val"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint of the authors' code; a model with --to_official")
    parser.add_argument("target", metavar="OUT", type=Path, help="directory to write; a file with --to_official")
    parser.add_argument("--dataset", choices=sorted(DATASETS), help="whose class names the model gets")
    parser.add_argument("--backbone", default=CoSAConfig.backbone, help="timm name of the ViT (%(default)s)")
    parser.add_argument("--aux_layer", type=int, default=-3, help="layer of the auxiliary head (%(default)s)")
    parser.add_argument("--to_official", action="store_true", help="from this package's layout to the authors'")
    args = parser.parse_args()
    if args.dataset is None and not args.to_official:
        parser.error("--dataset is needed: the checkpoint has no class names")
    return args


if __name__ == "__main__":
    main(parse_args())
