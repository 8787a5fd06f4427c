"""A smaller copy of a model: fewer decoder channels, weights stored as float16 and computed with as float32.

    python research/compress.py runs/voc/assignment small --decoder_channels 384 --dataset voc --data_dir VOC2012

Channels are chosen and fitted on a few hundred images, without labels and without training. CAMs change by rounding
alone; score the segmentation again with `cosa-hf evaluate`.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from arguments import dataset_parser, one_line_errors
from torch import Tensor, nn

from cosa_hf.commands.arguments import positive
from cosa_hf.commands.inputs import add_model, dataset_of, parse_dataset_args
from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.data import DatasetOptions, read_image, undecoded
from cosa_hf.files import check_output
from cosa_hf.inference import Segmenter
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.publishing.half import save_half

__all__ = ["narrow_decoder"]


@one_line_errors()
def main(arguments: list[str] | None = None) -> None:
    args, options = parse(arguments)
    check_output(args.target, directory=True, instead="name a new directory for the copy")  # perhaps it is MODEL itself
    segmenter = Segmenter.from_pretrained(args.model, device="cpu")
    processor = segmenter.processor
    dataset = undecoded(dataset_of(args, options, segmenter))
    chosen = dataset.shuffle(seed=0).select(range(min(args.num_images, len(dataset))))

    def images() -> Iterator[Tensor]:
        for row in chosen:
            yield processor(read_image(row), return_tensors="pt").pixel_values

    small = narrow_decoder(segmenter.model, images(), args.decoder_channels)
    save_half(small, processor, args.target)
    size = (args.target / "model.safetensors").stat().st_size
    print(f"{args.target}: {size / 1e6:.1f} MB, {small.num_parameters() / 1e6:.2f} M parameters")


@torch.no_grad()
def narrow_decoder(
    model: CoSAForWeaklySupervisedSegmentation, batches: Iterable[Tensor], channels: int
) -> CoSAForWeaklySupervisedSegmentation:
    """A copy of `model` whose decoder has fewer channels, chosen and fitted so that its logits change least.

    In each hidden layer those channels are kept that explain the others best (pivoted Cholesky of second moments). The
    others are replaced by their least-squares fit from the kept ones, folded into the next layer's weights. No label is
    used and nothing is trained. CAMs and image-level logits do not pass the decoder and stay exactly as they are.

    Args:
        model: in eval mode; it is left as it was.
        batches: normalised images (B, 3, H, W), such as it was trained on; a few hundred suffice.
        channels: width of the new decoder, at most that of the model's.

    Raises:
        ValueError: `channels` is not between 1 and the model's own, or the model is of another kind.

    Example:
        >>> config = CoSAConfig(backbone="test_vit", decoder_channels=64)
        >>> model = CoSAForWeaklySupervisedSegmentation(config).eval()
        >>> narrow_decoder(model, [torch.rand(4, 3, 64, 64)], 16).decoder.conv7.weight.shape
        torch.Size([16, 16, 3, 3])

    Source: the interpolative decomposition (Cheng et al., 2005) as a pruning rule (Chee et al., 2022).
    """
    if not isinstance(model, CoSAForWeaklySupervisedSegmentation):
        raise ValueError(f"a {type(model).__name__} does not have CoSA's decoder to narrow")
    if not 1 <= channels <= model.config.decoder_channels:
        raise ValueError(f"channels={channels} must be between 1 and the decoder's {model.config.decoder_channels}")
    decoder = model.decoder
    layers = (decoder.conv6, decoder.conv7)
    moments = [torch.zeros(len(layer.weight), len(layer.weight), dtype=torch.float64) for layer in layers]
    for pixel_values in batches:
        maps = model.backbone(pixel_values.to(model.device))[0]
        for layer, moment in zip(layers, moments, strict=True):
            maps = layer(maps).relu()  # (B, D, h, w)
            tokens = maps.transpose(0, 1).flatten(1).double().cpu()
            moment += tokens @ tokens.T

    (kept6, fit6), (kept7, fit7) = (_interpolate(moment, channels) for moment in moments)
    narrow = CoSAForWeaklySupervisedSegmentation(
        CoSAConfig.from_dict({**model.config.to_dict(), "decoder_channels": channels})
    ).eval()
    weights = model.state_dict()
    weights["decoder.conv6.weight"] = decoder.conv6.weight[kept6]
    weights["decoder.conv7.weight"] = _fold(decoder.conv7, fit6)[kept7]
    weights["decoder.conv8.weight"] = _fold(decoder.conv8, fit7)
    narrow.load_state_dict(weights)
    return narrow


def _interpolate(moment: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Which channels to keep, and (kept, all) coefficients that give all channels from the kept ones.

    `moment` is (D, D): the sum over tokens of the products of channels.
    """
    residual, kept = moment.clone(), []
    for _ in range(channels):
        pivot = int(residual.diagonal().argmax())
        if residual[pivot, pivot] <= 1e-12 * moment.diagonal().max():
            pivot = next(index for index in range(len(moment)) if index not in kept)  # the rest is explained already
        else:
            residual -= torch.outer(residual[:, pivot], residual[:, pivot]) / residual[pivot, pivot]
            residual[pivot], residual[:, pivot] = 0, 0
        kept.append(pivot)
    index = torch.tensor(sorted(kept))
    return index, torch.linalg.lstsq(moment[index][:, index], moment[index], driver="gelsd").solution


def _fold(layer: nn.Conv2d, fit: Tensor) -> Tensor:
    """Weights of `layer` for the kept input channels only: (out, kept, ...)."""
    return torch.einsum("oi...,ki->ok...", layer.weight.double().cpu(), fit).to(layer.weight)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser(__doc__)
    add_model(parser)
    parser.add_argument("target", metavar="OUT", type=Path, help="directory to write, new or empty")
    parser.add_argument("--decoder_channels", type=positive, required=True, help="width of the copy's decoder")
    parser.add_argument("--split", default="train_aug", help="split of the dataset to fit to")
    parser.add_argument("--num_images", type=positive, default=128, help="drawn from the split")
    return parse_dataset_args(parser, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
