import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from fp16_on_cpu import HalfAccelerator
from PIL import Image
from runs_of import assert_equal, left, load_few_shapes, log_of, summary_of, weights_of
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from cosa_hf.assignment.network import AssignmentNetwork
from cosa_hf.data import VOC_CLASSES
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective.overall import CoSAObjective
from cosa_hf.training import setup
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.trainer import Trainer, recommendation, train

pytestmark = pytest.mark.usefixtures("few_shapes")

TOLD = {"step", "lr", "xi", "aux_xi", "an_on_distance", "images_per_second", "memory_gb"}
MIXTURES = {
    f"{prefix}{side}_{what}"
    for prefix in ("", "aux_")
    for side in ("background", "foreground")
    for what in ("weight", "mean", "variance")
}


def test_a_run_leaves_two_loadable_models_and_says_which_to_use(tiny, capsys):
    config = tiny()
    recommended = train(config)
    assert recommended == Path(config.output_dir) / "assignment"
    assert "recommended: assignment" in capsys.readouterr().out
    for name in ("online", "assignment"):
        model = AutoModelForSemanticSegmentation.from_pretrained(Path(config.output_dir) / name)
        assert model.config.id2label[0] == "background"
        processor = AutoImageProcessor.from_pretrained(Path(config.output_dir) / name)
        assert processor.size == {"height": 48, "width": 48}
    summary = summary_of(config)
    assert summary["recommended"] == "assignment"
    assert summary["hardware"].startswith("1 x ")
    assert summary["seconds"] >= 0
    assert TrainingConfig.from_yaml(recommended.parent / "recipe.yaml") == config


def test_warmup_is_classification_only_and_the_rest_is_everything(tiny):
    config = tiny()
    train(config)
    log = log_of(config)
    assert all(set(entry) >= TOLD for entry in log)
    assert set(log[-1]) >= MIXTURES
    terms = [set(entry) - TOLD - MIXTURES for entry in log]
    labels = {"foreground", "reliability", "agreement"}
    everything = {"loss", "cls", "aux_cls", "c2s", "aux_c2s", "s2c", "csc"} | labels
    assert terms == [{"loss", "cls", "aux_cls"}] * 3 + [everything] * 3


def test_warmup_never_runs_the_assignment_network(tiny, monkeypatch, tmp_path):
    def forbidden(*args, **kwargs):
        raise AssertionError("the assignment network ran during warm-up")

    monkeypatch.setattr(AssignmentNetwork, "label", forbidden)
    train(tiny(warmup_steps=6))
    with pytest.raises(AssertionError, match="ran during warm-up"):
        train(tiny(warmup_steps=5, output_dir=str(tmp_path / "other")))


@pytest.fixture
def precisions(monkeypatch):
    """In what the networks compute, with gradient (ON) and without (AN)."""
    seen, forward = {}, CoSAForWeaklySupervisedSegmentation.forward

    def noted(self, *arguments, **options):
        outputs = forward(self, *arguments, **options)
        seen.setdefault("ON" if torch.is_grad_enabled() else "AN", set()).add(outputs.logits.dtype)
        return outputs

    monkeypatch.setattr(CoSAForWeaklySupervisedSegmentation, "forward", noted)
    return seen


@pytest.mark.parametrize("alone", [False, True])
def test_the_assignment_network_alone_may_run_in_bf16(tiny, precisions, alone):
    config = tiny(bf16_assignment=alone)
    train(config)
    assert precisions == {"AN": {torch.bfloat16 if alone else torch.float32}, "ON": {torch.float32}}
    assert log_of(config)[-1]["s2c"] > 0


@pytest.mark.parametrize(
    ("fields", "terms"),
    [
        pytest.param(
            {
                "seg2cam_weight": 0.0, "separation_weight": 0.0, "aux_cam2seg_weight": 0.0,
                "reliability_weighting": False, "dynamic_threshold": False, "threshold": 0.4,
                "swapping_assignments": False,
            },
            {"c2s"},
            id="all switched off",
        ),
        pytest.param(
            {
                "cam_fusion": "sum", "label_scales": [1.0, 0.5], "dynamic_threshold": False, "threshold": 0.7,
                "background_threshold": 0.2, "reliability_weighting": False, "balanced": True, "relu_cams": True,
                "separation_weight": 0.0, "dense_energy_weight": 0.05, "supervision_stride": 2,
            },
            {"c2s", "aux_c2s", "s2c", "energy"},
            id="release",
        ),
    ],
)  # fmt: skip
def test_switches_remove_terms_and_the_release_adds_its_regulariser(tiny, fields, terms):
    config = tiny(**fields)
    train(config)
    last = log_of(config)[-1]
    assert {"c2s", "aux_c2s", "s2c", "csc", "energy"} & last.keys() == terms
    assert last["xi"] == last["aux_xi"] == fields["threshold"]
    assert last.get("energy", -1) < 0


@pytest.fixture
def objective_calls(monkeypatch):
    """What the trainer handed to the objective after warm-up, and the losses it got back."""
    calls, objective = [], CoSAObjective.__call__

    def record(self, outputs, labels, targets, valid, images, classifier, bias):
        losses = objective(self, outputs, labels, targets, valid, images, classifier, bias)
        if "s2c" in losses:
            reached = torch.autograd.grad(losses["s2c"], (outputs.cam_logits,), allow_unused=True, retain_graph=True)
            calls.append({"direct": reached[0], "spl": targets.spl, "images": images})
            if outputs.hidden_states is not None:
                sources = (outputs.hidden_states[-1], classifier)
                reached = torch.autograd.grad(losses["s2c"], sources, allow_unused=True, retain_graph=True)
                calls[-1] |= dict(zip(("features", "classifier"), reached, strict=True))
        return losses

    monkeypatch.setattr(CoSAObjective, "__call__", record)
    return calls


@pytest.mark.parametrize(("detach", "reached"), [("features", "classifier"), ("classifier", "features")])
def test_a_detached_guidance_reaches_one_of_its_two_sources(tiny, objective_calls, detach, reached):
    train(tiny(detach=detach))
    assert len(objective_calls) == 3
    for call in objective_calls:
        assert call["direct"] is None
        assert call[detach] is None
        assert call[reached].abs().sum() > 0


def test_the_oracle_reads_masks_and_says_so(tiny, few_shapes, objective_calls, capsys):
    train(tiny(guidance="gt", scale_min=1.0, scale_max=1.0))
    assert few_shapes == [("train_aug", True)]
    assert "ORACLE: guidance gt reads the ground-truth masks" in capsys.readouterr().out
    # Shares of tokens of 16 x 16 pixels, where the pseudo-labels of an untrained network would be anything.
    for call in objective_calls:
        pixels = call["spl"] * 256
        torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("guidance", ["spl", "noise", "none"])
def test_no_other_guidance_reads_masks(tiny, few_shapes, objective_calls, guidance, capsys):
    config = tiny(guidance=guidance)
    train(config)
    assert few_shapes == [("train_aug", False)]
    assert "ORACLE" not in capsys.readouterr().out
    assert ("s2c" in log_of(config)[-1]) == (guidance != "none") == bool(objective_calls)


def test_the_dense_energy_sees_the_strong_view_in_steps_of_0_to_255(tiny, objective_calls):
    train(tiny(dense_energy_weight=0.05, scale_min=1.0, scale_max=1.0))  # without padding
    assert objective_calls
    for call in objective_calls:
        steps = call["images"] - call["images"].amin(dim=(2, 3), keepdim=True)
        assert 20 < steps.amax() < 256
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny, tmp_path):
    runs = [tiny(seed=seed, output_dir=str(tmp_path / name)) for seed, name in ((1, "a"), (1, "b"), (2, "c"))]
    for config in runs:
        train(config)
    first, same, other = map(weights_of, runs)
    assert_equal(first, same)
    with pytest.raises(AssertionError):
        assert_equal(first, other)


def test_images_without_a_tag_are_left_out_and_named(tiny, monkeypatch, capsys):
    def with_two_untagged(*arguments, **options):
        dataset = load_few_shapes(None, None, "train")
        return dataset.map(
            lambda row, index: {"labels": [] if index in (1, 4) else row["labels"]},
            with_indices=True,
            features=dataset.features,
        )

    monkeypatch.setattr(setup, "load_dataset_by_name", with_two_untagged)
    config = tiny(max_steps=2, warmup_steps=2)
    train(config)
    assert "left out 2 images without a tag: train-00001, train-00004" in capsys.readouterr().out
    summary = summary_of(config)
    assert (summary["untagged_dropped"], summary["images"]) == (["train-00001", "train-00004"], 4)


def test_masks_are_loaded_for_the_bound_and_for_evaluation_only(tiny, few_shapes, tmp_path):
    train(tiny(output_dir=str(tmp_path / "tags")))
    assert few_shapes == [("train_aug", False)]
    few_shapes.clear()
    evaluated = tiny(output_dir=str(tmp_path / "evaluated"), eval_every=3, eval_images=2)
    train(evaluated)
    assert few_shapes == [("train_aug", False), ("val", True)]
    assert {"eval/seg", "eval/seg_tags", "eval/cam", "eval/cam_aux"} <= set(log_of(evaluated)[-1])
    for step in (3, 6):
        panels = Path(evaluated.output_dir) / f"panels/step-000000{step}"
        assert sorted(path.name for path in panels.iterdir()) == ["val-00000.png", "val-00001.png"]
    few_shapes.clear()
    bound = tiny(output_dir=str(tmp_path / "bound"), supervision="masks")
    train(bound)
    assert few_shapes == [("train_aug", True)]
    assert {"loss", "cls", "aux_cls", "c2s"} == log_of(bound)[-1].keys() - TOLD


def test_training_never_opens_a_mask(tiny, monkeypatch, tmp_path):
    """The masks are garbage under their official names: whoever opens one fails."""
    monkeypatch.undo()
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClassAug", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    ids = ["2007_000001", "2007_000002", "2007_000003"]
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(ids))
    (root / "image_labels.json").write_text(json.dumps({image_id: [VOC_CLASSES[3]] for image_id in ids}))
    for image_id in ids:
        Image.effect_noise((60, 50), 64).convert("RGB").save(root / f"JPEGImages/{image_id}.jpg")
        for folder in ("SegmentationClassAug", "SegmentationClass"):
            (root / folder / f"{image_id}.png").write_bytes(b"not a mask")
    config = tiny(dataset="voc", data_dir=str(root))
    train(config)
    assert len(log_of(config)) == 6
    with pytest.raises(ValueError, match="2007_00000"):
        train(tiny(dataset="voc", data_dir=str(root), supervision="masks", output_dir=str(tmp_path / "bound")))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method is being renamed; the least version has the old name
def test_gradient_checkpointing_changes_nothing_but_memory(tiny, tmp_path):
    plain = tiny(output_dir=str(tmp_path / "plain"))
    checkpointed = tiny(output_dir=str(tmp_path / "checkpointed"), gradient_checkpointing=True)
    for config in (plain, checkpointed):
        train(config)
    for name, weights in weights_of(plain).items():
        torch.testing.assert_close(weights_of(checkpointed)[name], weights, atol=1e-5, rtol=1e-4)


def test_bf16_trains(tiny, any_precision):
    config = tiny(mixed_precision="bf16")
    train(config)
    assert all(math.isfinite(value) for entry in log_of(config) for value in entry.values())
    assert {weight.dtype for weight in weights_of(config)["online"].values()} == {torch.float32}


@pytest.mark.parametrize(("steps", "name"), [(20_000, "assignment"), (2_000, "online")])
def test_the_recommendation_follows_from_the_schedule(steps, name):
    recommended, reason = recommendation(TrainingConfig(max_steps=steps, warmup_steps=0, ema_momentum=0.9994))
    assert recommended == name
    assert "1667" in reason


def test_another_number_of_images_than_the_schedule_is_made_for_is_announced(tiny, tmp_path, capsys):
    train(tiny(max_steps=2, warmup_steps=2))
    assert "the schedule is made for" not in capsys.readouterr().out
    train(tiny(max_steps=2, warmup_steps=2, images_per_step=4, output_dir=str(tmp_path / "other")))
    assert "made for 4 images a step, this run takes 2: 2 (batch_size) x 1 (grad" in capsys.readouterr().out


def test_processes_that_do_not_know_of_each_other_are_refused(tiny, monkeypatch):
    """As `accelerate launch --multi_gpu --num_processes 2` starts them on a machine without GPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = tiny()
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU=1"):
        train(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_a_network_split_among_processes_is_refused(tiny, monkeypatch, any_precision, kind):
    """And it trains in plain processes, in the way that the error names."""
    config = tiny(max_steps=2, warmup_steps=1)
    advice = "use plain processes, with gradient_checkpointing and bf16 to save memory"
    with monkeypatch.context() as patch:
        patch.setattr(setup.Accelerator, "distributed_type", kind)
        with pytest.raises(ValueError, match=f"{kind.value} splits the network .* {advice}"):
            train(config)
    assert not Path(config.output_dir).exists()
    AcceleratorState._reset_state(True)
    train(dataclasses.replace(config, gradient_checkpointing=True, mixed_precision="bf16"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is for accelerators, and here is one")
def test_fp16_without_an_accelerator_is_refused(tiny, any_precision):
    config = tiny(mixed_precision="fp16", max_steps=2, warmup_steps=1)
    with pytest.raises(ValueError, match="fp16 needs an accelerator, this is cpu: take bf16 or no"):
        train(config)
    assert not Path(config.output_dir).exists()
    for precision in ("bf16", "no"):
        AcceleratorState._reset_state(True)
        train(dataclasses.replace(config, mixed_precision=precision, output_dir=f"{config.output_dir}-{precision}"))


@pytest.fixture
def fp16(any_precision, monkeypatch):
    """Let training be in real fp16 on this machine; takes arguments of the scaler."""

    def train_in_fp16(**scaling):
        accelerator = type("Scaled", (HalfAccelerator,), {"scaling": scaling})
        monkeypatch.setattr(setup, "Accelerator", accelerator)
        return {"mixed_precision": "fp16"}

    return train_in_fp16


# Grows after three steps to where gradients overflow, and falls back.
OVERFLOWING = {"init_scale": 2.0**10, "growth_factor": 2.0**30, "backoff_factor": 2.0**-30, "growth_interval": 3}


def test_fp16_learns_what_fp32_learns(tiny, fp16, precisions, tmp_path):
    """Real autocast and a real scaler, with all that asks for gradients at their true size."""
    settings = {
        "max_steps": 24, "warmup_steps": 12, "ema_momentum": 0.8, "learning_rate": 3e-4,
        "batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0,
    }  # fmt: skip
    full = tiny(output_dir=str(tmp_path / "fp32"), **settings)
    train(full)
    assert precisions == {"AN": {torch.float32}, "ON": {torch.float32}}
    precisions.clear()
    AcceleratorState._reset_state()
    half = tiny(output_dir=str(tmp_path / "fp16"), **settings, **fp16(init_scale=2.0**4))
    train(half)
    assert precisions == {"AN": {torch.float16}, "ON": {torch.float16}}
    assert {weight.dtype for weight in weights_of(half)["online"].values()} == {torch.float32}

    exact, rounded = log_of(full), log_of(half)
    assert all(math.isfinite(value) for entry in rounded for value in entry.values())
    assert [entry["lr"] for entry in rounded] == [entry["lr"] for entry in exact]  # no step was skipped
    for name in ("cls", "aux_cls", "c2s", "aux_c2s", "s2c", "csc"):
        losses, expected = ([entry[name] for entry in log if name in entry] for log in (rounded, exact))
        assert losses == pytest.approx(expected, rel=0.01, abs=1e-3), name
        assert losses != expected or not any(expected), name
    assert sum(entry["cls"] for entry in rounded[-8:]) < 0.9 * sum(entry["cls"] for entry in rounded[:8])


def test_fp16_skips_a_step_whose_gradients_overflow(tiny, fp16, monkeypatch):
    """Weights, moving average and schedule are left as they were; the steps after it go on."""
    states, statistics = [], Trainer.label_statistics

    def after_step(self, *arguments):
        states.append(
            [parameter.detach().clone() for parameter in (*self.student.parameters(), *self.teacher.parameters())]
        )
        return statistics(self, *arguments)

    monkeypatch.setattr(Trainer, "label_statistics", after_step)
    config = tiny(max_steps=10, **fp16(**OVERFLOWING))
    train(config)
    log = log_of(config)
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    stood_still = [
        all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        for before, after in itertools.pairwise(states)
    ]
    kept_rate = [before["lr"] == after["lr"] for before, after in itertools.pairwise(log)]
    assert stood_still == kept_rate == [number in (4, 8) for number in range(2, 11)]


def test_fp16_resumes_with_its_scaler(tiny, fp16, tmp_path):
    # In the middle of what the scaler counts: one that began anew would overflow at another step.
    scaled = {"max_steps": 9, "checkpoint_every": 6, **fp16(**OVERFLOWING)}
    uninterrupted, cut = (tiny(output_dir=str(tmp_path / name), **scaled) for name in ("uninterrupted", "cut"))
    for config in (uninterrupted, cut):
        train(config)
    train(dataclasses.replace(cut, resume=True))
    assert_equal(left(uninterrupted), left(cut))


def test_a_momentum_too_large_for_the_run_is_announced(tiny, capsys):
    train(tiny(ema_momentum=0.9994))
    assert "the assignment network will hardly leave its start" in capsys.readouterr().out
