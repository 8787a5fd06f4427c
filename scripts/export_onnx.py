"""Export a model to ONNX with dynamic batch and image size, checked against torch.

Example:
    python scripts/export_onnx.py runs/voc/assignment voc.onnx
"""

import argparse
from pathlib import Path

from cosa_hf.inference import load_model, require_cams
from cosa_hf.publishing.onnx import OUTPUTS, export_onnx


def main(args: argparse.Namespace) -> None:
    try:
        model, _ = load_model(args.model, "cpu")
        require_cams(model)
        difference = export_onnx(model, args.target, args.int8)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    print(
        f"{args.target}: {args.target.stat().st_size / 1e6:.1f} MB; pixel_values (B, 3, H, W), H and W multiples of "
        f"{model.backbone.stride} -> {', '.join(OUTPUTS)}; at most {difference:.1e} of the largest output from torch"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="directory of a saved model, or its name on the Hub")
    parser.add_argument("target", metavar="OUT.onnx", type=Path, help="file to write")
    parser.add_argument("--int8", action="store_true", help="weights in 8 bits: smaller, no longer equal to torch")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
