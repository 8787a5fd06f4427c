import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation

from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.networks import build_network
from cosa_hf.multistage.task import MultistageTask, Weights, confidence_weights, train_multistage
from cosa_hf.pseudo_labels.load import load_pseudo_labels
from cosa_hf.training import loop
from cosa_hf.training.checkpoints import read_checkpoint


def log_of(recipe):
    return [json.loads(line) for line in (Path(recipe.output_dir) / "log.jsonl").read_text().splitlines()]


def weights_of(recipe):
    return load_file(Path(recipe.output_dir) / "model/model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_run_leaves_a_model_and_its_scores(tiny):
    recipe = tiny(eval_every=4, eval_images=2, eval_panels=1)
    assert train_multistage(recipe) == Path(recipe.output_dir) / "model"
    model = AutoModelForSemanticSegmentation.from_pretrained(Path(recipe.output_dir) / "model")
    assert model.config.id2label[0] == "background"
    *steps, evaluation = log_of(recipe)
    assert [set(entry) for entry in steps] == [{"step", "loss", "lr", "images_per_second", "memory_gb"}] * 4
    assert set(evaluation) == {"step", "eval/seg", "eval/seg_tags"}
    assert len(list((Path(recipe.output_dir) / "panels/step-0000004").iterdir())) == 1
    summary = json.loads((Path(recipe.output_dir) / "run.json").read_text())
    assert summary["recommended"] == "model"
    assert MultistageConfig.from_yaml(Path(recipe.output_dir) / "recipe.yaml") == recipe


def test_it_learns_the_masks_it_is_given(tiny):
    recipe = tiny(max_steps=30, log_every=10, scale_min=1.0, scale_max=1.0)
    train_multistage(recipe)
    first, *_, last = log_of(recipe)
    assert last["loss"] < 0.7 * first["loss"]


def test_a_set_of_masks_learns_too(tiny, mask2former):
    recipe = tiny(
        network=mask2former, pretrained=True, decoder_channels=None, max_steps=30, log_every=10, eval_every=30,
        eval_images=2,
    )  # fmt: skip
    train_multistage(recipe)
    first, *_, last, evaluation = log_of(recipe)
    assert last["loss"] < 0.9 * first["loss"]
    assert set(evaluation) == {"step", "eval/seg", "eval/seg_tags"}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_equals_the_other(tiny, tmp_path, optimizer):
    fields = {"optimizer": optimizer, "confidence_weighting": True, "checkpoint_every": 2}
    whole = tiny(output_dir=str(tmp_path / "whole"), **fields)
    train_multistage(whole)
    (tmp_path / "whole/checkpoints/step-0000004.safetensors").unlink()
    assert {"weights", "running_statistics", "optimizer"} <= set(
        read_checkpoint(tmp_path / "whole/checkpoints/step-0000002.safetensors")
    )
    expected = weights_of(whole)
    train_multistage(tiny(output_dir=str(tmp_path / "whole"), resume=True, **fields))
    assert_same_weights(expected, weights_of(whole))


@pytest.mark.parametrize("error", ["FloatingPointError", "FloatingPointError of images", "MemoryError"])
@pytest.mark.parametrize(
    ("network", "frozen"), [("smp/deeplabv3plus/test_resnet", True), ("largefov/test_resnet", False)]
)
def test_a_step_that_fails_leaves_no_trace_in_what_is_saved(tiny, tmp_path, monkeypatch, network, frozen, error):
    if network.startswith("smp/"):
        pytest.importorskip("segmentation_models_pytorch")
    fields = {"network": network, "freeze_batch_norm": frozen}
    whole = tiny(output_dir=str(tmp_path / "whole"), **fields)
    train_multistage(whole)

    outputs, calls = MultistageTask.outputs, []

    def fail(self, model, part):
        calls.append(1)
        if len(calls) == 3 and error.endswith("images"):  # as where activations overflow
            part["weak"] = part["weak"] * torch.nan
        out = outputs(self, model, part)
        if len(calls) == 3 and error == "MemoryError":
            raise MemoryError("CUDA out of memory, say")
        if len(calls) == 3:
            out.logits = out.logits * torch.nan
        return out

    cut = {"output_dir": str(tmp_path / "cut"), **fields}
    with monkeypatch.context() as patch:
        patch.setattr(MultistageTask, "outputs", fail)
        with pytest.raises((FloatingPointError, MemoryError)):
            train_multistage(tiny(**cut))
    assert [path.stem for path in (tmp_path / "cut/checkpoints").iterdir()] == ["step-0000002"]
    resumed = tiny(resume=True, **cut)
    train_multistage(resumed)
    assert_same_weights(weights_of(whole), weights_of(resumed))


@pytest.mark.parametrize("network", ["smp/deeplabv3plus/test_resnet", "upernet/test_resnet"])
def test_one_image_is_too_few_where_it_is_pooled_to_a_point(tiny, network):
    if network.startswith("smp/"):
        pytest.importorskip("segmentation_models_pytorch")
    recipe = tiny(network=network, batch_size=1, images_per_step=1)
    with pytest.raises(ValueError, match=f"batch_size must be 2 or more for network '{network}'"):
        MultistageTask(recipe, loop.Accelerator(cpu=True))


def test_one_image_is_enough_elsewhere_and_looking_draws_no_random_number(tiny):
    states = []
    for size in (1, 2):
        torch.manual_seed(0)
        task = MultistageTask(tiny(batch_size=size), loop.Accelerator(cpu=True))
        states.append((torch.get_rng_state(), task.network.state_dict()))
    assert torch.equal(states[0][0], states[1][0])
    assert_same_weights(states[0][1], states[1][1])


def test_accumulated_parts_equal_the_larger_batch(tiny, tmp_path):
    losses = {}
    for name, size, parts in (("one", 4, 1), ("two", 2, 2)):
        recipe = tiny(
            batch_size=size, gradient_accumulation_steps=parts, images_per_step=4, confidence_weighting=True,
            output_dir=str(tmp_path / name), max_steps=1, lr_warmup_steps=0, freeze_batch_norm=True,
        )  # fmt: skip
        train_multistage(recipe)
        losses[name] = weights_of(recipe)
    for name, value in losses["one"].items():
        torch.testing.assert_close(losses["two"][name], value, atol=2e-3 + 1e-5, rtol=0)


def test_batch_norm_of_the_encoder_keeps_its_statistics_through_an_evaluation(tiny, tmp_path):
    statistics = {}
    for frozen in (True, False):
        recipe = tiny(output_dir=str(tmp_path / str(frozen)), freeze_batch_norm=frozen, eval_every=2, eval_images=1)
        train_multistage(recipe)
        statistics[frozen] = {
            name: value for name, value in weights_of(recipe).items() if "encoder" in name and "running_mean" in name
        }
    assert statistics[True]
    assert all(not value.any() for value in statistics[True].values())  # as at the start
    assert all(value.any() for value in statistics[False].values())


def test_only_the_decoder_learns_faster(tiny):
    recipe = tiny(learning_rate=1e-3, head_lr_multiplier=7.0)
    task = MultistageTask(recipe, loop.Accelerator(cpu=True))
    slow, fast = task.optimizer().param_groups
    assert (slow["lr"], fast["lr"]) == (1e-3, pytest.approx(7e-3))
    assert {id(parameter) for parameter in fast["params"]} == {id(p) for p in task.network.decoder.parameters()}
    assert len(slow["params"]) + len(fast["params"]) == len(list(task.network.parameters()))


def test_confidence_needs_a_format_that_carries_it(tiny, export):
    with pytest.raises(ValueError, match=r"confidence_weighting: .*png does not carry confidence"):
        train_multistage(tiny(pseudo_labels=str(export("png")), confidence_weighting=True))


def test_a_cam_is_trusted_away_from_its_threshold_on_both_sides():
    mask = torch.tensor([[[0, 0, 1, 1, 255]]])
    confidence = torch.tensor([[[0.0, 0.45, 0.55, 1.0, 1.0]]])
    weights = confidence_weights(confidence, mask, 0.5, lambda value: value)[0, 0]
    assert weights[4] == 0
    assert weights[:4].mean().item() == pytest.approx(1, abs=1e-6)
    assert weights[0] == weights[3] > 5 * weights[1]
    torch.testing.assert_close(weights[1], weights[2])


def test_self_training_learns_what_the_first_network_says(tiny, tmp_path):
    first = tiny(output_dir=str(tmp_path / "first"))
    train_multistage(first)
    second = tiny(
        output_dir=str(tmp_path / "second"), self_training=str(tmp_path / "first/model"), confidence_weighting=True
    )
    train_multistage(second)
    relabelled = load_pseudo_labels(str(tmp_path / "second/pseudo_labels"))
    given = load_pseudo_labels(str(second.pseudo_labels))
    assert relabelled.threshold is None
    assert relabelled.dataset["image_id"][:] == given.dataset["image_id"][:]
    for row in relabelled.dataset:
        assert {id for _, id in row["mask"].convert("L").getcolors()} <= {0, *(tag + 1 for tag in row["labels"])}
    train_multistage(
        tiny(output_dir=str(tmp_path / "again"), self_training=str(tmp_path / "second/model"))
    )  # the labels of the second, with the tags of the first


def test_a_first_network_that_cannot_label_the_images_is_refused(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at 'nowhere'"):
        train_multistage(tiny(self_training="nowhere"))
    model, processor = build_network(tiny(), ["background", "cat"])
    model.save_pretrained(tmp_path / "cats")
    processor.save_pretrained(tmp_path / "cats")
    with pytest.raises(ValueError, match=r"classes are not the model's, in order:(.|\n)*model: +\['cat'\]"):
        train_multistage(tiny(self_training=str(tmp_path / "cats")))


def test_a_run_records_what_its_labels_were_made_by(tiny, export):
    recipe = tiny(max_steps=2, confidence_weighting=True)
    train_multistage(recipe)
    recorded = json.loads((Path(recipe.output_dir) / "run.json").read_text())["pseudo_labels"]
    assert recorded == json.loads((export("parquet") / "export.json").read_text())


def test_a_network_of_transformers_trains_too(tiny, tmp_path):
    recipe = tiny(network="upernet/test_resnet")
    train_multistage(recipe)
    assert len(log_of(recipe)) == 4


@pytest.mark.parametrize("path", sorted(MultistageConfig.directory.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_valid(path):
    recipe = MultistageConfig.named(path.stem, pseudo_labels="x")
    assert recipe.images_per_step == recipe.batch_size * recipe.gradient_accumulation_steps


def test_weights_of_another_network_are_refused():
    state = Weights(torch.nn.Linear(1, 1)).state_dict()
    with pytest.raises(ValueError, match=r"of another network: it has weight, bias"):
        Weights(torch.nn.Identity()).load_state_dict(state)
