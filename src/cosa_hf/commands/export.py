"""Write a model for other programs or in less room: ONNX with dynamic batch and image size, checked against torch; a
model directory of half the size, its weights stored as float16; or a checkpoint that the authors' code loads.

    cosa-hf export runs/voc/assignment voc.onnx
    cosa-hf export runs/voc/assignment small --format half
    cosa-hf export runs/voc/assignment assignment.pth --format official
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from cosa_hf.commands.arguments import command_parser
from cosa_hf.commands.inputs import add_model
from cosa_hf.files import check_output, whole_file
from cosa_hf.inference import load_model, require_cams, stride_of
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.publishing.half import save_half
from cosa_hf.publishing.official import to_official
from cosa_hf.publishing.onnx import export_onnx, onnx_outputs


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    check_output(args.target, directory=args.format == "half")
    model: Any
    model, processor = load_model(args.model, "cpu")
    if args.format == "onnx":
        write_onnx(model, args.target, args.int8)
    elif args.format == "half":
        write_half(model, processor, args.target)
    else:
        write_official(model, args.target)


def write_onnx(model: Any, target: Path, int8: bool) -> None:
    try:
        difference = export_onnx(model, target, int8)
    except RuntimeError as error:  # a network that cannot be exported, or is not the same afterwards
        raise ValueError(f"{target} cannot be written: {error}") from error
    print(
        f"{target}: {target.stat().st_size / 1e6:.1f} MB; pixel_values (B, 3, H, W), H and W multiples of "
        f"{stride_of(model)} -> {', '.join(onnx_outputs(model))}; at most {difference:.1e} of the largest output "
        "from torch"
    )


def write_half(model: Any, processor: Any, target: Path) -> None:
    save_half(model, processor, target)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    print(f"{target}: {size / 1e6:.1f} MB of float16 weights, which are computed with as float32")


def write_official(model: Any, target: Path) -> None:
    require_cams(model)
    checkpoint = to_official(cast(CoSAForWeaklySupervisedSegmentation, model))
    target.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # torch itself does not say that a disk is full
    torch.save(checkpoint, content)
    with whole_file(target) as unfinished:
        unfinished.write_bytes(content.getbuffer())
    print(f"{target}: a checkpoint for the authors' code; its encoder.head, unused, is zero")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("export", __doc__)
    add_model(parser)
    parser.add_argument("target", metavar="OUT", type=Path, help="file to write; half: directory")
    parser.add_argument(
        "--format",
        choices=("onnx", "half", "official"),
        default="onnx",
        help="half: a model with float16 weights; official: the authors' layout",
    )
    parser.add_argument("--int8", action="store_true", help="onnx: weights in 8 bits, smaller, not equal to torch")
    args = parser.parse_args(arguments)
    if args.int8 and args.format != "onnx":
        parser.error("--int8 is for --format onnx")
    return args
