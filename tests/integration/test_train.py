"""`cosa-hf train` as a user runs it, alone and through Accelerate."""

import json
import re
import shlex
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from in_process import ROOT

from cosa_hf.commands.train import parse

SHARED = ROOT.parent / "shared"
TINY = shlex.split(
    "--backbone test_vit --aux_layer -2 --decoder_channels 16 --decoder_dilation 1 --crop_size 48 --input_size 48 "
    "--batch_size 2 --num_workers 0 --max_steps 4 --warmup_steps 2 --lr_warmup_steps 1 --ema_momentum 0.2 "
    "--label_scales 1.0 --log_every 1"
)


ACCELERATE = ("-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no")


@pytest.mark.slow
def test_the_embedded_demo_trains_without_any_recipe_or_data(tmp_path, subprocess_of):
    launch = (*ACCELERATE, "--num_processes", "1", "--num_machines", "1", ROOT / "scripts" / "train.py")
    watched = ("--output_dir", tmp_path / "run", "--eval_every", "4", "--eval_images", "2")
    run = subprocess_of(*TINY, *watched, launch=launch)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(tmp_path / "run" / "assignment")
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 4]
    assert "eval/seg" in entries[-1]
    assert list((tmp_path / "run").glob("cosa_hf/events.out.tfevents*"))


@pytest.mark.slow
def test_two_machines_train_what_one_process_trains(tmp_path, subprocess_of, cosa_hf):
    """The machines are two launchers on this one, which find each other over the loopback interface."""
    shared = (*TINY, "--train_split", "test", "--max_grad_norm", 1, "--output_dir")  # 200 images are soon drawn
    cosa_hf("train", *shared, tmp_path / "one", "--batch_size", 4)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = (*ACCELERATE, "--multi_gpu", "--num_processes", 2, "--num_machines", 2, "--main_process_port", port)
    launch += ("--main_process_ip", "127.0.0.1", "--machine_rank")
    front = ("-m", "cosa_hf.cli", "train", *shared, tmp_path / "machines")
    with ThreadPoolExecutor(2) as pool:
        machines = [
            pool.submit(subprocess_of, launch=(*launch, rank, *front), ACCELERATE_USE_CPU="1") for rank in (0, 1)
        ]
    for machine in machines:
        assert machine.result().returncode == 0, machine.result().stderr

    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "machines")
    )
    assert len(one) == 4
    assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.slow
def test_real_voc_with_real_weights(tmp_path, cosa_hf):
    data, weights = SHARED / "data/VOC2012", SHARED / "weights/tf_efficientnet_lite0.in1k.fp16.safetensors"
    if not data.is_dir() or not weights.is_file():
        pytest.skip("needs the VOC subset and the backbone weights beside the repository")
    printed = cosa_hf(
        *("train", "--recipe", "voc-lite0", "--data_dir", data, "--backbone_weights", weights),
        *("--output_dir", tmp_path / "run"),
        *("--max_steps", 12, "--warmup_steps", 8, "--lr_warmup_steps", 2, "--eval_every", 0, "--log_every", 4),
        *("--crop_size", 128, "--input_size", 128),
    )
    assert "1696 images, 20 classes" in printed
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    # Twelve steps are enough for pretrained features to find out that most tags are absent: ln 2 at the start.
    assert entries[-1]["cls"] < 0.5 < entries[0]["cls"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "voc-vit-x"), "known by name: .*shapes-tiny"),
        (("--recipe", "voc-lite0", "--data_dir", "nowhere"), "nowhere"),
        (("--ema_momentum", "1.0"), "ema_momentum"),
    ],
)
def test_what_cannot_be_trained_is_named(arguments, message, tmp_path, complaint):
    said = complaint("train", *arguments, "--output_dir", tmp_path / "run")
    assert re.match(f"error: .*{message}", said)
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flag", "value"), [("--max_steps", "many"), ("--learning_speed", "1"), ("--max_step", "1")])
def test_flags_that_do_not_fit_are_named(flag, value, complaint):
    assert flag in complaint("train", flag, value, usage=True).splitlines()[-1]


def test_flags_win_over_the_recipe_wherever_it_is_called_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(["--crop_size", "96", "--recipe", "folder-lite0", "--data_dir", "photos"])
    assert (config.dataset, config.backbone, config.crop_size) == ("folder", "tf_efficientnet_lite0.in1k", 96)


def test_without_a_recipe_own_photos_take_the_frozen_one():
    assert parse(["--data_dir", "photos"]) == parse(["--recipe", "folder-clip", "--data_dir=photos"])
    assert parse(["--data_dir=photos"]).frozen_blocks == "all"
    assert parse([]).dataset == "shapes"


def test_help_has_groups(complaint, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    groups = re.findall(r"^([A-Z][^:\n]+):$", shown, re.MULTILINE)
    assert len(groups) >= 8
    assert "--no_" not in shown
    assert "--max-steps" not in shown
