"""Untrained networks of a test's size, the same in every test."""

import numpy as np
import torch
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.data import SHAPES_CLASSES

# name, aux_layer, token stride, channels of F and of F†
BACKBONES = [
    ("test_vit", -3, 16, 64, 64),
    ("test_efficientnet", -2, 16, 64, 48),
    ("test_convnext", -2, 16, 64, 48),
    ("test_resnet", -2, 16, 96, 192),
    ("test_mambaout", -2, 32, 64, 48),  # channels last, and stages on different grids
]
FAMILIES = [backbone[:2] for backbone in BACKBONES]


def tiny_cosa(names=SHAPES_CLASSES, seed=0, **fields):
    torch.manual_seed(seed)
    settings = {"backbone": "test_vit", "decoder_channels": 16, "id2label": dict(enumerate(["background", *names]))}
    return CoSAForWeaklySupervisedSegmentation(CoSAConfig(**settings | fields)).eval()


def tiny_segformer(**fields):
    small = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    return SegformerForSemanticSegmentation(SegformerConfig(**small | fields))


def tiny_config(backbone="test_vit", aux_layer=-3, **settings) -> CoSAConfig:
    settings = {"num_labels": 4, "decoder_channels": 16, "decoder_dilation": 2} | settings
    return CoSAConfig(backbone=backbone, aux_layer=aux_layer, **settings)


def tiny_model(backbone="test_vit", aux_layer=-3, **settings) -> CoSAForWeaklySupervisedSegmentation:
    torch.manual_seed(0)
    return CoSAForWeaklySupervisedSegmentation(tiny_config(backbone, aux_layer, **settings))


def photos(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def array(tensor: torch.Tensor) -> np.ndarray:
    """As the references take it, in float64."""
    return tensor.detach().double().numpy()


def scramble_batch_norm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(1, 2)


def square(side):
    """A processor of CoSA, whose input is `side` x `side` pixels."""
    return CoSAImageProcessor(size={"height": side, "width": side})


def save_cosa(directory, side, *names, **fields):
    """The directory, with a model and its processor in it."""
    tiny_cosa(*names, **fields).save_pretrained(directory)
    square(side).save_pretrained(directory)
    return directory


def save_segformer(directory, **fields):
    tiny_segformer(**fields).save_pretrained(directory)
    SegformerImageProcessor().save_pretrained(directory)
    return directory
