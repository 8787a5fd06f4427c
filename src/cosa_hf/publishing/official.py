"""Checkpoints of the authors' code into this package's layout, and back."""

import argparse
import pathlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.data.coco import COCO_CLASSES
from cosa_hf.data.tags import list_some
from cosa_hf.data.voc import VOC_CLASSES, VOC_COEXISTENCE
from cosa_hf.image_processing_cosa import CoSAImageProcessor
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation

#: Classes and, among them, those of C-mIoU, by the name of the data set.
DATASETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "voc": (VOC_CLASSES, VOC_COEXISTENCE),
    "coco": (COCO_CLASSES, ()),
}

#: The ImageNet classifier that the authors' encoder carries along and never uses.
_UNUSED = {"encoder.head.weight", "encoder.head.bias"}


def from_official(
    checkpoint: str | Path,
    dataset: str,
    backbone: str = "vit_base_patch16_224.orig_in21k_ft_in1k",
    aux_layer: int = -3,
) -> tuple[CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor]:
    """A model and its processor from a checkpoint of the authors' code.

    Every tensor is taken over bit for bit, but for the encoder's 1000-class `head`, which nothing uses. The processor
    prepares images as the released evaluation does: bilinear resize to 448 x 448, ImageNet mean and std (the authors
    do not use the backbone's own). Scales and flips are not part of a model: `cosa-hf evaluate` has the released ones
    by default.

    Args:
        checkpoint: file with a dictionary whose entry `model` is the state dict. It is loaded without running code.
        dataset: "voc" or "coco", for the class names.
        backbone: timm name of the ViT it was trained with.
        aux_layer: layer of the auxiliary head; nothing in the file tells it. The released weights used -3.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown data set; the file is cut short, holds more than tensors and plain settings, or no entry
            `model` of tensors; or a tensor is missing, not expected or of another shape, by its name in the file.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(DATASETS)}")
    state_dict = _read(Path(checkpoint))
    classes, coexistence = DATASETS[dataset]
    names = ["background", *classes]
    config = CoSAConfig(
        backbone=backbone,
        aux_layer=aux_layer,
        decoder_channels=_width(state_dict),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        coexistence_classes=list(coexistence),
    )
    model = CoSAForWeaklySupervisedSegmentation(config)
    own = {_official_name(name): name for name in model.state_dict()}
    _check(state_dict, {official: model.state_dict()[name] for official, name in own.items()}, str(checkpoint))
    model.load_state_dict({name: state_dict[official] for official, name in own.items()})
    processor = CoSAImageProcessor(
        size={"height": 448, "width": 448}, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
    )
    return model.eval(), processor


def to_official(model: CoSAForWeaklySupervisedSegmentation) -> dict[str, dict[str, Tensor]]:
    """The checkpoint of a ViT model as the authors' code loads it, for `torch.save`.

    The unused `head`, which their encoder insists on, is filled with zeros.

    Raises:
        ValueError: the backbone is not a ViT with a class token; their code has no other.

    Example:
        >>> config = CoSAConfig(backbone="test_vit", num_labels=21)
        >>> checkpoint = to_official(CoSAForWeaklySupervisedSegmentation(config))
        >>> checkpoint["model"]["classifier.weight"].shape, checkpoint["model"]["encoder.head.weight"].shape
        (torch.Size([20, 64, 1, 1]), torch.Size([1000, 64]))
    """
    state_dict = {_official_name(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if "encoder.cls_token" not in state_dict:
        raise ValueError(f"backbone {model.config.backbone!r} is not a ViT with a class token: the layout has no other")
    width = model.backbone.num_features
    state_dict |= {"encoder.head.weight": torch.zeros(1000, width), "encoder.head.bias": torch.zeros(1000)}
    return {"model": state_dict}


def _official_name(name: str) -> str:
    return name.replace("backbone.model.", "encoder.", 1)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    # The authors' trainer saves its arguments and score along; these types are plain records of values.
    scalar: Any = np.float64(0).__reduce__()[0]
    plain: list[Any] = [
        argparse.Namespace,
        pathlib.PosixPath,
        np.dtype,
        type(np.dtype(np.float64)),
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]
    try:
        with torch.serialization.safe_globals(plain):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error.__context__ or error).splitlines()[0]
        raise ValueError(
            f"{path} is refused: it holds more than tensors and settings ({reason}): code that loading would run. "
            'Where you trust its source, save {"model": torch.load(..., weights_only=False)["model"]} and convert that.'
        ) from error
    except (RuntimeError, EOFError, IndexError, struct.error) as error:  # torch has as many words for one thing
        reason = str(error).partition("\n")[0] or "nothing to read"
        raise ValueError(f"{path} is empty or cut short ({reason}): download or copy it again") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        found = sorted(map(str, checkpoint))[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} has no entry 'model' with a state dict, as the authors' files do; found {found}")
    others = [str(name) for name, value in checkpoint["model"].items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{path} has more than tensors in its entry 'model': {list_some(others)}; take these out of it"
        )
    return checkpoint["model"]


def _width(state_dict: dict[str, Tensor]) -> int:
    """Channels of the decoder; the paper's where the file lacks it, so that the check names what is missing."""
    weight = state_dict.get("decoder.conv6.weight")
    return 512 if weight is None else weight.shape[0]


def _check(given: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
    problems = {
        "missing": sorted(expected.keys() - given.keys()),
        "not expected": sorted(given.keys() - expected.keys() - _UNUSED),
        "of another shape": sorted(
            f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in given.keys() & expected.keys()
            if given[name].shape != expected[name].shape
        ),
    }
    found = [f"{kind}: {', '.join(names[:8])}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{source} does not fit data set and backbone; " + "; ".join(found))
