"""What a run builds from its configuration."""

from collections.abc import Callable

import pytest
import torch

from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.setup import build_processor, build_schedule, build_student


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


def learning_rates(config: TrainingConfig) -> Callable[[int], float]:
    """Of the backbone, by step from 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    (factor,) = build_schedule(config, optimizer).lr_lambdas
    return lambda step: config.learning_rate * factor(step)


def test_the_rate_rises_linearly_and_decays_from_there():
    config = TrainingConfig(max_steps=50, warmup_steps=0, lr_warmup_steps=10, learning_rate=0.5, lr_power=0.9)
    rise = [0.5 * step / 10 for step in range(10)]
    decay = [0.5 * (1 - step / 40) ** 0.9 for step in range(40)]
    assert [learning_rates(config)(step) for step in range(50)] == pytest.approx(rise + decay, rel=1e-12)


@pytest.mark.parametrize(
    ("recipe", "logged"),
    [
        # By the number of steps done, as the released logs print the rate of the last one.
        ("voc-release", {1_600: 5.729e-5, 6_000: 4.977e-5, 10_000: 4.283e-5, 12_000: 3.931e-5}),
        ("coco-release", {1_600: 5.856e-5, 6_000: 5.457e-5, 10_000: 5.092e-5, 11_800: 4.927e-5}),
    ],
)
def test_the_release_recipes_have_the_rates_of_its_logs(recipe, logged):
    rates = learning_rates(TrainingConfig.named(recipe))
    assert {steps: float(f"{rates(steps - 1):.3e}") for steps in logged} == logged


@pytest.mark.parametrize(
    ("normalization", "mean", "std"),
    [("backbone", (0.5,) * 3, (0.5,) * 3), ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))],
)
def test_the_processor_has_the_colours_that_the_recipe_names(normalization, mean, std):
    config = TrainingConfig(dataset="folder", backbone="test_vit", pretrained=False, normalization=normalization)
    student = build_student(config, ["cat"])
    processor = build_processor(config, student)
    assert (processor.image_mean, processor.image_std) == (mean, std)
