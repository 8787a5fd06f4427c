"""A smaller model that answers like the large one: fewer decoder channels, weights stored in half precision."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation

__all__ = ["narrow_decoder", "save_half"]


@torch.no_grad()
def narrow_decoder(
    model: CoSAForWeaklySupervisedSegmentation, batches: Iterable[Tensor], channels: int
) -> CoSAForWeaklySupervisedSegmentation:
    """A copy of `model` whose decoder has fewer channels, chosen and fitted so that its logits change least.

    Of each hidden layer the channels stay that explain the others best (pivoted Cholesky of their second moments); what
    goes is replaced by its least-squares fit from what stays, folded into the next layer's weights. No label is used
    and nothing is trained. CAMs and image-level logits do not pass the decoder and stay exactly as they are.

    Args:
        model: in eval mode; it is left as it was.
        batches: normalised images (B, 3, H, W), such as it was trained on; a few hundred do.
        channels: of the new decoder, at most the model's own.

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
        raise ValueError(f"a {type(model).__name__} has no decoder of CoSA's to narrow")
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


def save_half(model: CoSAForWeaklySupervisedSegmentation, folder: str | Path) -> None:
    """Save `model` with float16 weights that `from_pretrained` reads back as float32.

    Half the size of the file, and the speed and range of float32 in use: CPUs are slow in half precision. The weights
    are rounded to 11 significant bits; a value outside the range of float16 is refused.

    Raises:
        ValueError: a weight is above 65,504 or not finite.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> model = CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit"))
        >>> with TemporaryDirectory() as folder:
        ...     save_half(model, folder)
        ...     CoSAForWeaklySupervisedSegmentation.from_pretrained(folder).dtype
        torch.float32
    """
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    unfit = [name for name, value in state.items() if not value.isfinite().all()]
    if unfit:
        raise ValueError(f"{', '.join(unfit)}: values that float16 cannot hold")
    model.save_pretrained(folder, state_dict=state)
    # The type to compute in: without it, loading would follow that of the file.
    config = Path(folder) / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
