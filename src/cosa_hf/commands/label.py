"""Label the images of a dataset by a model and write them for other programs: PNGs, parquet or COCO json.

Run again after an interruption, with the same arguments, it goes on where it was.

    cosa-hf label runs/voc/assignment --dataset voc --data_dir VOC2012 --split train_aug --source cam_mean \\
        --format png --output_dir VOC2012-pseudo
    accelerate launch -m cosa_hf.cli label runs/voc/assignment ...           the images shared among all GPUs
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from cosa_hf.commands.arguments import positive
from cosa_hf.commands.inputs import (
    add_crf,
    add_inference,
    add_model,
    crf_of,
    dataset_of,
    dataset_parser,
    parse_dataset_args,
    segmenter_of,
)
from cosa_hf.data import DatasetOptions
from cosa_hf.inference import Segmenter, require_cams
from cosa_hf.pseudo_labels.export import SOURCES, export_pseudo_labels
from cosa_hf.pseudo_labels.formats import FORMATS
from cosa_hf.training.features import EncodedImages
from cosa_hf.training.precision import native_precision


def main(arguments: Sequence[str]) -> None:
    args, options = parse(arguments)
    # Left to itself, the state takes processes without an accelerator for strangers: each would label everything.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # A process that is done waits for the others, for as long as they take.
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))
    datasets.disable_progress_bars()  # its bar for every parquet file would hide ours
    segmenter = segmenter_of(args, state.device, crf=crf_of(args))
    dataset = dataset_of(args, options, segmenter)
    start = time.perf_counter()
    labelled = export_pseudo_labels(
        segmenter,
        dataset,
        args.output_dir,
        source=args.source,
        format=args.format,
        split=args.split,
        threshold=args.threshold,
        class_threshold=args.class_threshold if args.tags == "predicted" else None,
        shard_size=args.shard_size,
        data_dir=args.data_dir,
        encode=None if args.cache_features is None else partial(cached_features, args, segmenter, dataset),
    )
    seconds = time.perf_counter() - start
    if labelled < len(dataset):
        state.print(f"{len(dataset) - labelled} images were labelled before")
    if labelled:
        state.print(f"{labelled} images labelled, {labelled / seconds:.2f} images/s")
    state.print(f"export: {args.output_dir}")
    state.destroy_process_group()


def cached_features(
    args: argparse.Namespace, segmenter: Segmenter, dataset: datasets.Dataset
) -> Callable[[str], Mapping[str, torch.Tensor]]:
    """Reads what the model's encoder made of the images from the cache of its run, where what is missing is made first.

    Raises:
        ValueError: a model without CAMs, or scales that no cache has.
        OSError: no room on the disk for what is missing.
    """
    require_cams(segmenter.model)
    if 1 not in args.scales:
        raise ValueError(
            f"--cache_features has the images at scale 1, and --scales {' '.join(map(str, args.scales))} asks for "
            "others: add 1, or leave --cache_features out"
        )
    segmenter.model.backbone.freeze()
    accelerator = Accelerator(mixed_precision=native_precision())
    return EncodedImages.filled(segmenter.model, segmenter.processor, dataset, args.cache_features, accelerator).read


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser("label", __doc__)
    add_model(parser)
    parser.add_argument("--split", required=True, help="split of the dataset to label")
    parser.add_argument(
        "--source",
        required=True,
        choices=SOURCES,
        help="CAM, auxiliary CAM, their mean, that spread by the model's affinity, or the segmentation",
    )
    parser.add_argument(
        "--format", required=True, choices=FORMATS, help="VOC layout, a `datasets` dataset, or COCO json"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="a new directory, or the interrupted export's")
    parser.add_argument("--threshold", type=float, help="foreground from this CAM value on (default: the model's own)")
    parser.add_argument(
        "--tags",
        choices=("given", "predicted"),
        default="given",
        help="predicted: images without a tag get the classes that the model recognises; given: they are refused",
    )
    parser.add_argument(
        "--class_threshold",
        type=float,
        default=0.5,
        help="probability from which on a class is recognised, with --tags predicted",
    )
    add_inference(parser)
    add_crf(parser)
    parser.add_argument(
        "--cache_features",
        metavar="DIR",
        help="take scale 1 from what the model's run keeps of these images, if all of the encoder was frozen; what is "
        "missing is encoded and kept first (auto: below the Hub's cache, as in training)",
    )
    parser.add_argument(
        "--shard_size",
        type=positive,
        default=256,
        help="images written together: a parquet file's, and what an interruption costs at most",
    )
    return parse_dataset_args(parser, arguments)
