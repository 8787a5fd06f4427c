"""research/benchmark.py as a user runs it, and the naive baseline that it compares the package with."""

import json
import multiprocessing

import benchmark
import pytest
import torch
from benchmarks.speed import measure, naive_baseline
from benchmarks.speed.report import exponent, median_step
from benchmarks.speed.stopwatch import Stopwatch

from cosa_hf.assignment.network import AssignmentNetwork
from cosa_hf.assignment.threshold import DynamicThreshold, ThresholdConfig
from cosa_hf.objective.overall import CoSAObjective
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.setup import build_student

TINY = {"backbone": "test_vit", "aux_layer": -2, "crop_size": 64, "input_size": 64, "batch_size": 2}


@pytest.mark.slow
def test_tables_and_json(tmp_path, capsys, monkeypatch):
    # Four processes, each of which would have to import everything first.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda _: fork)
    fields = [f"{name}={value}" for name, value in (TINY | {"batch_size": 1}).items()]  # a CRF takes seconds an image
    variants = ["--variants", "fp32", "naive", "--steps", "1", "--classes", "4"]
    benchmark.main(["--set", *fields, *variants, "--evaluation", "--output_dir", str(tmp_path)])
    table, results = (tmp_path / "benchmark.md").read_text(), json.loads((tmp_path / "benchmark.json").read_text())
    assert table.strip() in capsys.readouterr().out
    for row in ("AN forward", "threshold", "CAM2Seg (two)", "ON backward", "EMA", "speed-up over the naive baseline"):
        assert f"\n| {row} |" in table
    assert len(results["fp32"]["steps"]) == len(results["naive"]["steps"]) == 1
    assert results["fp32"]["memory"] > 1e8
    without, with_crf = results["evaluation"]["seconds"]["single scale"].values()
    assert 0 < without < with_crf
    assert f"| single scale | {1 / without:.2f} | {1 / with_crf:.2f} |" in table


def test_a_change_without_a_value_is_refused(tmp_path, complaint):
    said = complaint(benchmark.main, "--set", "batch_size", "--output_dir", tmp_path)
    assert "'batch_size' is not FIELD=VALUE" in said


def test_phases_are_the_step(monkeypatch):
    """Every phase of a step is found in training, each moment is in one of them, and little is left over."""
    watches = []
    monkeypatch.setattr(measure, "Stopwatch", lambda *arguments: watches.append(Stopwatch(*arguments)) or watches[-1])
    changes = TINY | {"label_scales": [1.0, 0.5], "crop_size": 128}
    steps = measure.measure("package", "voc-lite0", changes, steps=2, classes=5, cpu_time=False)["steps"]
    assert len(steps) == 2
    for step in steps:
        assert set(measure.PHASES) == set(step)
        assert step["rest"] < 0.3 * sum(step.values())
        assert all(seconds >= 0 for seconds in step.values())


def test_a_phase_within_a_phase_is_not_counted_twice():
    watch = Stopwatch(torch.device("cpu"))
    now = iter(range(100))
    watch.clock = lambda: float(next(now))
    watch.begin()
    with watch.phase("outer"), watch.phase("inner"):
        pass
    watch.end()
    assert watch.steps == [{"rest": 2.0, "outer": 2.0, "inner": 1.0}]


def test_flops_are_those_of_the_network(monkeypatch):
    monkeypatch.setattr(measure, "matmul_rate", lambda *_: 1.0)  # test_tables_and_json measures it
    found = measure.measure("flop_bound", "voc-vit-b", {}, steps=1, classes=20, cpu_time=False)
    tokens, width = 784 + 1, 768  # of a ViT-B at 448 pixels, with its class token
    encoder = 12 * (24 * tokens * width**2 + 4 * tokens**2 * width) + 2 * 784 * 768 * width
    decoder = 2 * 784 * 9 * (768 * 512 + 512 * 512)
    assert found["flops"]["ON forward"] == pytest.approx(2 * (encoder + decoder), rel=0.01)


def test_the_naive_baseline_computes_the_same_losses():
    config = TrainingConfig.named("voc-lite0", **TINY, pretrained=False, label_scales=[1.0, 0.5, 1.5], dataset="folder")
    torch.manual_seed(0)
    online = build_student(config, [f"class {index}" for index in range(5)])
    with torch.no_grad():  # the outputs of fresh heads are all alike
        for head in (online.classifier, online.aux_classifier, online.decoder.conv8):
            head.weight.mul_(20)
    online.eval()
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    valid[0, :, 40:] = False
    labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 0]])
    weak, strong = torch.randn(2, 2, 3, 64, 64)
    batch = {"weak": weak, "strong": strong, "labels": labels, "valid": valid}

    teacher, objective = AssignmentNetwork(online, config, config), CoSAObjective(dense_energy_weight=0.05)
    targets = objective.targets(teacher.label(weak, labels, valid), valid)
    colors = strong * 255 * torch.tensor(online.backbone.data_config["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected = objective(online(strong), labels, targets, valid, colors)

        naive_baseline.materialise_attention(online)
        fixed = [naive_baseline.SklearnThreshold(threshold.value, 1.0) for threshold in teacher.thresholds]
        found = naive_baseline.step_losses(online, online, batch, fixed, config, Stopwatch(torch.device("cpu")))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4
    )
    assert all(value != 0 for value in expected.values())


def test_sklearn_finds_about_the_same_threshold():
    torch.manual_seed(0)
    values = torch.cat([0.25 + 0.08 * torch.randn(3000), 0.7 + 0.1 * torch.randn(2000)]).clamp(0.06, 1)
    own = DynamicThreshold(ThresholdConfig(threshold_decay=0.0))
    other = naive_baseline.SklearnThreshold(0.5, 0.0)
    own.update(values)
    other.update(values)
    assert own.value == pytest.approx(other.value, abs=0.005)


def test_exponent_and_median():
    assert exponent([1, 2, 4], [5, 20, 80]) == pytest.approx(2)
    # Data is made beside the step, so it does not count.
    assert median_step([{"a": 1.0, "data": 9.0}, {"a": 2.0}, {"a": 3.0}]) == {"a": 2.0}
