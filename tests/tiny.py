"""Untrained networks of a test's size, the same in every test."""

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.data import SHAPES_CLASSES


def tiny_cosa(names=SHAPES_CLASSES, seed=0, **fields):
    torch.manual_seed(seed)
    settings = {"backbone": "test_vit", "decoder_channels": 16, "id2label": dict(enumerate(["background", *names]))}
    return CoSAForWeaklySupervisedSegmentation(CoSAConfig(**settings | fields)).eval()


def tiny_segformer(**fields):
    small = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    return SegformerForSemanticSegmentation(SegformerConfig(**small | fields))


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
