import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation
from transformers.trainer_jit_checkpoint import CheckpointManager

from cosa_hf import CoSAImageProcessor
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.labels import labels_to_learn
from cosa_hf.multistage.networks import build_network
from cosa_hf.multistage.train import MultistageTrainer, _arguments, train_multistage
from cosa_hf.pseudo_labels.load import load_pseudo_labels
from cosa_hf.training import setup, telemetry


def trainer_of(config):
    return MultistageTrainer(config, _arguments(config), labels_to_learn(config, torch.device("cpu")))


def history_of(config, name):
    state = json.loads((Path(config.output_dir) / "trainer_state.json").read_text())
    return {entry["step"]: entry[name] for entry in state["log_history"] if name in entry}


def weights_of(config):
    return load_file(Path(config.output_dir) / "model/model.safetensors")


def assert_same_weights(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=tolerance, rtol=0, msg=lambda text, name=name: name + text)


def test_a_run_leaves_a_model_its_scores_and_what_its_labels_were_made_by(tiny, export):
    config = tiny(eval_every=4, eval_images=2, eval_panels=1)
    directory = Path(config.output_dir)
    assert train_multistage(config) == directory / "model"
    model = AutoModelForSemanticSegmentation.from_pretrained(directory / "model")
    assert model.config.id2label[0] == "background"
    files = {"config.json", "model.safetensors", "preprocessor_config.json", *model.config.code_files}
    assert {path.name for path in (directory / "model").iterdir()} == files
    assert list(history_of(config, "loss")) == [1, 2, 3, 4]
    assert list(history_of(config, "eval_seg")) == list(history_of(config, "eval_seg_tags")) == [4]
    assert len(list((directory / "panels/step-0000004").iterdir())) == 1
    assert MultistageConfig.from_yaml(directory / "recipe.yaml") == config
    run = json.loads((directory / "run.json").read_text())
    assert (run["recommended"], run["images"], run["unreadable_replaced"]) == ("model", 6, [])
    assert run["pseudo_labels"] == json.loads((export("parquet") / "export.json").read_text())


def test_half_a_model_is_none(tiny, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CoSAImageProcessor, "save_pretrained", full_disk)  # the weights are written before
    with pytest.raises(OSError, match="No space left"):
        train_multistage(tiny(max_steps=1, lr_warmup_steps=0))
    assert list((Path(tiny().output_dir) / "model").iterdir()) == []


@pytest.mark.parametrize("network", ["largefov/test_resnet", "upernet/test_resnet", "mask2former"])
def test_it_learns_the_masks_it_is_given(tiny, network, request):
    fields = {}
    if network == "mask2former":
        network = request.getfixturevalue(network)
        fields = {"pretrained": True, "decoder_channels": None}
    config = tiny(network=network, max_steps=30, log_every=10, scale_min=1.0, scale_max=1.0, eval_every=30, **fields)
    train_multistage(config)
    losses = history_of(config, "loss")
    assert losses[30] < 0.9 * losses[10]
    assert list(history_of(config, "eval_seg")) == [30]


@pytest.mark.parametrize("fields", [{"optimizer": "adamw"}, {"optimizer": "sgd", "freeze_batch_norm": True}])
def test_a_resumed_run_equals_the_other(tiny, fields):
    fields |= {"confidence_weighting": True, "checkpoint_every": 2, "eval_every": 1, "eval_images": 1}
    uninterrupted = tiny(**fields)
    train_multistage(uninterrupted)
    expected, losses = weights_of(uninterrupted), history_of(uninterrupted, "loss")
    directory = Path(uninterrupted.output_dir)
    shutil.rmtree(directory / "checkpoint-4")
    assert AutoModelForSemanticSegmentation.from_pretrained(directory / "checkpoint-2").config.num_labels == 9
    (directory / "checkpoint-3").mkdir()  # as a full disk leaves it
    train_multistage(tiny(resume=True, **fields))
    assert_same_weights(expected, weights_of(uninterrupted))
    assert history_of(uninterrupted, "loss") == losses
    seconds = list(history_of(uninterrupted, "seconds").values())
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("error", [FloatingPointError, OSError])
def test_a_run_that_fails_goes_on_from_its_last_checkpoint(tiny, tmp_path, monkeypatch, error):
    fields = {"checkpoint_every": 1, "output_dir": str(tmp_path / "cut")}
    uninterrupted = tiny(output_dir=str(tmp_path / "uninterrupted"))
    train_multistage(uninterrupted)
    if error is OSError:
        place, name, broken = MultistageTrainer, "_save_optimizer_and_scheduler", None
    else:
        place, name, broken = MultistageTrainer, "get_batch_samples", MultistageTrainer.get_batch_samples

    def fail(self, *arguments):
        if error is OSError:
            if self.state.global_step == 3:
                raise OSError(28, "No space left on device")
            return save(self, *arguments)
        batches, total = broken(self, *arguments)
        if self.state.global_step == 2:
            batches[0]["pixel_values"] *= torch.nan  # as where activations overflow
        return batches, total

    save = MultistageTrainer._save_optimizer_and_scheduler
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        with pytest.raises(error) as caught:
            train_multistage(tiny(**fields))
    assert "checkpoint-2 with --resume" in caught.value.__notes__[0]
    if error is FloatingPointError:
        assert "not finite at step 3: nan of images ['train-" in str(caught.value)
    train_multistage(tiny(resume=True, **fields))
    assert_same_weights(weights_of(uninterrupted), weights_of(tiny(**fields)))


def test_sigterm_ends_a_run_with_a_checkpoint(tiny, monkeypatch, capsys):
    monkeypatch.setattr(CheckpointManager.__init__, "__defaults__", (0,))  # seconds before it believes the signal
    batches, before = MultistageTrainer.get_batch_samples, signal.getsignal(signal.SIGTERM)

    def terminated(self, *arguments):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return batches(self, *arguments)

    config = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(MultistageTrainer, "get_batch_samples", terminated)
        with pytest.raises(SystemExit) as stopped:
            train_multistage(config)
    assert stopped.value.code == 143
    assert "SIGTERM: the run ended after 2 complete steps; go on from" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in Path(config.output_dir).glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (Path(config.output_dir) / "run.json").exists()
    train_multistage(tiny(resume=True))
    assert list(history_of(config, "loss")) == [1, 2, 3, 4]


def test_a_finished_run_without_checkpoints_is_not_replaced(tiny, tmp_path):
    train_multistage(tiny(max_steps=2))
    weights = tmp_path / "run/model/model.safetensors"
    before = weights.stat().st_mtime_ns
    with pytest.raises(FileExistsError, match=r"run\.json is there already: no checkpoint of that run was kept"):
        train_multistage(tiny(max_steps=2))
    assert weights.stat().st_mtime_ns == before


def test_what_cannot_be_resumed_is_named_and_what_is_advised_can_be(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint-N in .*run to resume from"):
        train_multistage(tiny(resume=True))
    train_multistage(tiny(checkpoint_every=4))
    with pytest.raises(FileExistsError, match="checkpoint-4 is there already: --resume that run"):
        train_multistage(tiny())
    with pytest.raises(ValueError, match="checkpoint-4 is beyond max_steps = 3: ask for more steps"):
        train_multistage(tiny(resume=True, max_steps=3))
    with pytest.raises(ValueError, match=r"optimizer of a resumed run stays adamw, .* got sgd: keep it, or start anew"):
        train_multistage(tiny(resume=True, optimizer="sgd"))
    train_multistage(tiny(resume=True, max_steps=5))
    train_multistage(tiny(optimizer="sgd", max_steps=2, output_dir=str(tmp_path / "anew")))


@pytest.mark.parametrize("weighted", [True, False])
def test_a_step_is_the_same_however_its_images_are_shared_out(tiny, tmp_path, weighted):
    splits = {"one batch": (4, 1, 1), "accumulated": (2, 2, 1), "two processes": (1, 2, 2)}
    results = {}
    for name, (size, micro, processes) in splits.items():
        config = tiny(
            batch_size=size, gradient_accumulation_steps=micro, images_per_step=4, confidence_weighting=weighted,
            output_dir=str(tmp_path / name), max_steps=3, freeze_batch_norm=True, scale_min=0.4, optimizer="sgd",
            learning_rate=0.05,
        )  # fmt: skip
        AcceleratorState._reset_state(True)
        if processes > 1:
            debug_launcher(train_multistage, args=(config,), num_processes=processes)
        else:
            train_multistage(config)
        AcceleratorState._reset_state(True)
        results[name] = weights_of(config), torch.tensor(list(history_of(config, "loss").values()))
    weights, losses = results.pop("one batch")
    for name, (shared, values) in results.items():
        assert_same_weights(weights, shared, tolerance=1e-5)
        torch.testing.assert_close(values, losses, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("network", ["smp/deeplabv3plus/test_resnet", "upernet/test_resnet"])
def test_one_image_is_too_few_where_it_is_pooled_to_a_point(tiny, network):
    with pytest.raises(ValueError, match=f"batch_size must be 2 or more for network '{network}'"):
        train_multistage(tiny(network=network, batch_size=1, images_per_step=1))
    train_multistage(tiny(network=network, batch_size=2, max_steps=2))


def test_batch_norm_of_the_encoder_keeps_its_statistics_through_an_evaluation(tiny, tmp_path):
    statistics = {}
    for frozen in (True, False):
        config = tiny(output_dir=str(tmp_path / str(frozen)), freeze_batch_norm=frozen, eval_every=2, eval_images=1)
        train_multistage(config)
        statistics[frozen] = {
            name: value for name, value in weights_of(config).items() if "encoder" in name and "running_mean" in name
        }
    assert statistics[True]
    assert all(not value.any() for value in statistics[True].values())  # as at the start
    assert all(value.any() for value in statistics[False].values())


def test_only_the_decoder_learns_faster_by_the_schedule_of_the_recipe(tiny):
    config = tiny(learning_rate=1e-3, head_lr_multiplier=7.0, weight_decay=0.3, lr_power=2.0, max_steps=5)
    trainer = trainer_of(config)
    trainer.create_optimizer_and_scheduler(5)
    slow, fast = trainer.optimizer.param_groups
    decoder = trainer.model.decoder
    assert {id(parameter) for parameter in fast["params"]} == {id(parameter) for parameter in decoder.parameters()}
    assert len(slow["params"]) + len(fast["params"]) == len(list(trainer.model.parameters()))
    assert (slow["weight_decay"], fast["weight_decay"]) == (0.3, 0.3)
    rates = []
    for _ in range(6):
        rates.append((slow["lr"], fast["lr"]))
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    expected = [0.0, *((left / 4) ** 2 for left in (4, 3, 2, 1, 0))]  # one step of warm-up, and the rest a square
    torch.testing.assert_close(
        torch.tensor(rates), torch.tensor([(1e-3 * factor, 7e-3 * factor) for factor in expected])
    )


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixed_precision": "fp16"}, "fp16 needs an accelerator, this is a CPU: take bf16 or no"),
        ({"tracker": "nothing"}, "nothing is not supported"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(tiny, fields, message):
    with pytest.raises(ValueError, match=message):
        train_multistage(tiny(**fields))


def test_rare_classes_come_more_often_and_the_run_says_how_many_images_an_epoch_has(tiny, tmp_path, capsys):
    train_multistage(tiny(max_steps=2))
    assert "2 steps of 2 images, 6 an epoch" in capsys.readouterr().out
    train_multistage(tiny(max_steps=2, repeat_threshold=1.0, output_dir=str(tmp_path / "repeated")))
    assert int(re.search(r"2 steps of 2 images, (\d+) an epoch", capsys.readouterr().out)[1]) > 6


def test_bf16_is_taken_in_the_place_of_fp16(tiny, any_precision, monkeypatch, capsys):
    monkeypatch.setattr(setup, "computes_bf16", lambda: False)
    train_multistage(tiny(max_steps=2, mixed_precision="bf16"))
    assert "bf16 is emulated on this device" in capsys.readouterr().out


def test_a_tracker_that_is_not_installed_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(telemetry, "get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match=r'pip install "cosa-hf\[trackio\]"'):
        train_multistage(tiny(tracker="trackio"))


@pytest.mark.parametrize("fields", [{"snapshot_every": 2}, {"allow_changed_data": True}])
def test_a_field_without_effect_is_refused(tiny, fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=.* has no effect on networks of CoSA-MS"):
        tiny(**fields)


@pytest.mark.parametrize("path", sorted(MultistageConfig.directory.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_package_are_valid(path):
    config = MultistageConfig.named(path.stem, pseudo_labels="x")
    assert config.images_per_step == config.batch_size * config.gradient_accumulation_steps
