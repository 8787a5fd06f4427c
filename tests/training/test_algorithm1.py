"""The trainer against a plain Algorithm 1: same losses, same xi, same weights of both networks."""

import copy
from types import SimpleNamespace

import pytest
import torch
from algorithm1 import algorithm_1
from runs_of import weights_of
from torch.utils.data import DataLoader

from cosa_hf.training import trainer

BATCH, SIZE, CLASSES, STEPS, WARMUP = 3, 64, 8, 4, 1


def draw_items() -> list[dict]:
    """Views of images with two tags, one of them cut by the edge of its image; as many as the run takes."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for position in range(BATCH * STEPS):
        weak = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
        weak = torch.nn.functional.interpolate(weak[None], size=SIZE, mode="bilinear")[0]
        labels = torch.zeros(CLASSES, dtype=torch.float64)
        labels[[position % CLASSES, (2 * position + 1) % CLASSES]] = 1
        valid = torch.ones(SIZE, SIZE, dtype=torch.bool)
        if position % 3 == 2:
            valid[:, -20:] = False
        strong = 1.5 * weak + 0.2 * torch.randn(weak.shape, generator=generator, dtype=torch.float64)
        items.append(
            {
                "weak": weak * valid,
                "strong": strong * valid,
                "labels": labels,
                "valid": valid,
                "image_id": str(position),
                "unreadable": "",
            }
        )
    return items


# A rate that rises from 0 leaves the first step without effect, and so hides what happens in it.
@pytest.fixture(params=[2, 0], ids=["rising rate", "full rate at once"])
def run(tiny, few_shapes, monkeypatch, request):
    """`train` on those items in float64; what its steps saw, the weights it left, and the model it began with."""
    config = tiny(
        batch_size=BATCH, crop_size=SIZE, max_steps=STEPS, warmup_steps=WARMUP, learning_rate=1e-3,
        lr_warmup_steps=request.param, ema_momentum=0.7, label_scales=[1.0, 0.5, 1.5],
        threshold_decay=0.6, threshold_queue=2,
    )  # fmt: skip
    start, steps = [], []
    build, training_step, losses = trainer.build_student, trainer.Trainer.training_step, trainer.Trainer.losses

    def build_in_float64(config, names):
        model = build(config, names).double()
        with torch.no_grad():  # fresh heads say next to nothing
            for head in (model.classifier, model.aux_classifier, model.decoder.conv8):
                head.weight.mul_(20)
        start.append(copy.deepcopy(model))
        return model

    def recorded_losses(self, *arguments):
        terms = losses(self, *arguments)
        steps.append(SimpleNamespace(losses={name: value.item() for name, value in terms.items()}))
        return terms

    def recorded_step(self, batch):
        training_step(self, batch)
        steps[-1].thresholds = tuple(threshold.value for threshold in self.teacher.thresholds)

    monkeypatch.setattr(trainer, "build_student", build_in_float64)
    monkeypatch.setattr(trainer, "training_loader", lambda *_: DataLoader(draw_items(), batch_size=BATCH))
    monkeypatch.setattr(trainer.Trainer, "losses", recorded_losses)
    monkeypatch.setattr(trainer.Trainer, "training_step", recorded_step)
    trainer.train(config)
    return SimpleNamespace(config=config, start=start[0], steps=steps, weights=weights_of(config))


def test_one_warm_up_and_three_complete_steps(run):
    online, config = run.start, run.config
    batches = [
        [torch.stack([item[name] for item in items]) for name in ("weak", "strong", "labels", "valid")]
        for items in (draw_items()[BATCH * step : BATCH * (step + 1)] for step in range(STEPS))
    ]
    before = copy.deepcopy(online.state_dict())
    assignment, expected = algorithm_1(
        online, batches, STEPS, WARMUP, config.learning_rate, config.lr_warmup_steps, config.ema_momentum,
        config.label_scales, config.threshold_decay, config.threshold_queue,
    )  # fmt: skip
    assert len(run.steps) == STEPS
    for actual, step in zip(run.steps, expected, strict=True):
        assert actual.losses == pytest.approx(step.losses, rel=1e-9)
        assert actual.thresholds == pytest.approx(step.thresholds, rel=1e-9)
    for name, network in (("online", online), ("assignment", assignment)):
        for key, tensor in network.state_dict().items():
            torch.testing.assert_close(run.weights[name][key], tensor, rtol=1e-7, atol=1e-9, msg=f"{name}: {key}")

    # None of it is trivially equal: everything moved, and the two networks apart.
    assert len({xi for step in expected for xi in step.thresholds} - {0.5}) == 2 * (STEPS - WARMUP)
    assert all(value > 0 for step in expected for value in step.losses.values())
    for name, weights in run.weights.items():
        assert not torch.allclose(weights["classifier.weight"], before["classifier.weight"], atol=1e-4), name
    distance = run.weights["online"]["classifier.weight"] - run.weights["assignment"]["classifier.weight"]
    assert distance.abs().max() > 1e-4
