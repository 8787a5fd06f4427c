"""Score several models that have one frozen encoder on one dataset: the encoder sees each image once.

    python research/frozen.py runs/c-seed0/assignment runs/c-seed1/assignment --dataset voc --data_dir VOC2012

Writes for each model the report of `cosa-hf evaluate`, and prints their mIoUs.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from arguments import dataset_parser, one_line_errors
from torch import Tensor, nn

from cosa_hf.commands.inputs import add_inference, dataset_of, parse_dataset_args
from cosa_hf.data import DatasetOptions
from cosa_hf.digest import weights_sha256
from cosa_hf.evaluation.evaluate import PROTOCOLS, evaluate
from cosa_hf.files import check_output, whole_file
from cosa_hf.inference import Segmenter
from cosa_hf.training.precision import computes_bf16


class SharedEncoder(nn.Module):
    """A backbone that remembers what it made of which images, in float16 on disk.

    Args:
        backbone: the frozen encoder, in the precision that `voc-clip` trains on it, or in float32.
        bf16: whether that is bf16.
        directory: of its memory; one for each encoder and precision.
    """

    def __init__(self, backbone: nn.Module, bf16: bool, directory: Path) -> None:
        super().__init__()
        self.backbone, self.bf16, self.directory, self.stride = backbone, bf16, directory, backbone.stride

    def forward(self, pixel_values: Tensor, affinity: bool = False) -> tuple[Tensor, ...]:
        key = hashlib.sha256(pixel_values.numpy().tobytes() + bytes([affinity])).hexdigest()
        path = self.directory / f"{key}.pt"
        if not path.exists():
            with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=self.bf16):
                maps = [each.half() for each in self.backbone(pixel_values, affinity)]
            with whole_file(path) as unfinished:
                torch.save(maps, unfinished)
        return tuple(each.float() for each in torch.load(path, mmap=True))


@one_line_errors()
def main(arguments: list[str] | None = None) -> None:
    args, options = parse(arguments)
    segmenters = [
        Segmenter.from_pretrained(name, device="cpu", scales=args.scales, flip=not args.no_flip, batch_size=1)
        for name in args.models
    ]
    encoders = {weights_sha256(each.model.backbone) for each in segmenters}
    if len(encoders) > 1:
        raise ValueError(f"the models have {len(encoders)} encoders: give those that share a frozen one")
    (encoder,) = encoders
    bf16 = computes_bf16() and not args.float32
    directory = args.features / f"{encoder[:16]}-{'bf16' if bf16 else 'float32'}"
    directory.mkdir(parents=True, exist_ok=True)
    dataset, shared = None, SharedEncoder(segmenters[0].model.backbone, bf16, directory)
    for name, segmenter in zip(args.models, segmenters, strict=True):
        dataset = dataset or dataset_of(args, options, segmenter, masks=True)
        weights = weights_sha256(segmenter.model)
        segmenter.model.backbone = shared
        report = evaluate(segmenter, dataset, dataset_name=args.dataset, split=args.split)
        path = args.reports / f"{'-'.join(Path(name).parts[-2:])}.json"
        check_output(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report | {"weights_sha256": weights}, indent=2) + "\n", encoding="utf-8")
        scores = {column: round(report[column]["miou"], 1) for column in PROTOCOLS if column in report}
        print(f"{path}: {scores}, cls_map {report['cls_map']:.1f}", flush=True)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser(__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="directories of saved models")
    parser.add_argument("--split", default="val", help="split of the dataset to score")
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="directory to write to")
    parser.add_argument("--features", type=Path, default=Path("features"), help="directory of the encoder's memory")
    parser.add_argument("--float32", action="store_true", help="the encoder runs in float32, even where bf16 is native")
    add_inference(parser)
    return parse_dataset_args(parser, arguments or sys.argv[1:])


if __name__ == "__main__":
    main()
