"""What a run builds from its configuration."""

import torch

from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.setup import build_student


def test_the_students_config_has_every_choice_of_the_recipe():
    chosen = {
        "backbone": "test_vit", "feature_layer": -3, "attention": "standard", "aux_layer": -1,
        "aux_attention": "value-value", "pooling": "lse", "pooling_sharpness": 1.0, "classifier_bias": True,
        "standardize_features": True, "decoder": "mlp", "decoder_inputs": "concat", "decoder_channels": 8,
        "decoder_dropout": 0.1, "affinity": "attention", "affinity_layer": -2, "affinity_blocks": [-3, -2],
        "affinity_temperature": 0.2, "affinity_power": 1.5, "affinity_steps": 2,
    }  # fmt: skip
    student = build_student(TrainingConfig(**chosen, dataset="folder", pretrained=False), ["cat", "dog"])
    assert {name: getattr(student.config, name) for name in chosen} == chosen
    assert student.config.id2label == {0: "background", 1: "cat", 2: "dog"}
    assert student.decoder.hidden.weight.shape == (8, 128, 1, 1)
    patches = student.backbone.model.patch_embed.proj.weight
    assert patches.is_contiguous(memory_format=torch.channels_last)  # convolutions are faster
