"""From tags to a network of CoSA-MS and its masks, with the commands as a user runs them (docs/multistage.md)."""

import json
import re
import shlex

import pytest
from PIL import Image
from transformers import pipeline

from cosa_hf.commands.multistage import parse

TINY = shlex.split(
    "--network largefov/test_resnet --pretrained false --decoder_channels 16 --dataset shapes --crop_size 48 "
    "--input_size 64 --batch_size 2 --images_per_step 2 --num_workers 0 --lr_warmup_steps 1 --log_every 1"
)
COSA = shlex.split(
    "--backbone test_vit --pretrained false --aux_layer -2 --decoder_channels 16 --decoder_dilation 1 --crop_size 48 "
    "--input_size 48 --batch_size 2 --num_workers 0 --max_steps 2 --warmup_steps 1 --lr_warmup_steps 1 "
    "--ema_momentum 0.2 --label_scales 1.0"
)
ONE_PASS = ("--scales", "1.0", "--no_flip")


@pytest.mark.slow
def test_tags_to_cosa_to_pseudo_labels_to_network_to_mask(tmp_path, cosa_hf):
    cosa_hf("train", *COSA, "--output_dir", tmp_path / "cosa")
    cosa_hf(
        *("label", tmp_path / "cosa/assignment", "--dataset", "shapes", "--split", "val"),
        *("--source", "cam_mean", "--format", "parquet", *ONE_PASS, "--output_dir", tmp_path / "labels"),
    )
    multistage = ("multistage", *TINY, "--pseudo_labels", tmp_path / "labels", "--checkpoint_every", 2)
    network = ("--output_dir", tmp_path / "network")
    printed = cosa_hf(*multistage, "--max_steps", 2, *network)
    assert printed.splitlines()[-1] == str(tmp_path / "network/model")
    cosa_hf(*multistage, "--max_steps", 4, *network, "--resume")
    state = json.loads((tmp_path / "network/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]

    again = ("--self_training", tmp_path / "network/model", "--label_scales", "1.0", "--confidence_weighting", "true")
    cosa_hf(*multistage, *again, "--max_steps", 2, "--output_dir", tmp_path / "second")
    table = cosa_hf(
        *("evaluate", tmp_path / "second/model", "--dataset", "shapes", "--num_images", 3, *ONE_PASS),
        *("--report", tmp_path / "report.json", "--panels", tmp_path / "panels"),
    )
    assert "tags unknown: seg; tags given: all others" in table
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"seg", "seg_tags"} == set(report) & {"seg", "seg_tags", "cam", "cam_aux", "cam_mean"}
    assert len(list((tmp_path / "panels").iterdir())) == 3

    Image.effect_noise((60, 50), 64).convert("RGB").save(tmp_path / "noise.jpg")
    cosa_hf("predict", tmp_path / "second/model", tmp_path / "noise.jpg", "--output_dir", tmp_path / "masks")
    assert Image.open(tmp_path / "masks/noise.png").size == (60, 50)
    segments = pipeline("image-segmentation", model=str(tmp_path / "second/model"))(str(tmp_path / "noise.jpg"))
    assert segments[0]["mask"].size == (60, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "pseudo_labels must name an export"),
        (("--pseudo_labels", "nowhere", "--train_split", "train"), "no pseudo-labels 'nowhere' on disk or on the Hub"),
        (
            ("--pseudo_labels", "nowhere"),
            "no directory nowhere; of a dataset on the Hub, name the split with train_split",
        ),
        (("--recipe", "nothing"), "known by name: deeplabv3plus-r101, largefov-wr38, student-lite0, upernet-swin-b"),
    ],
)
def test_what_cannot_be_trained_is_named(arguments, message, tmp_path, complaint):
    said = complaint("multistage", *arguments, "--tracker", "none", "--output_dir", tmp_path / "run")
    assert re.match(f"error: .*{message}", said.splitlines()[-1])
    assert not (tmp_path / "run").exists()


def test_the_network_chooses_its_recipe_and_flags_win():
    recipe = parse(["--network", "largefov-wr38", "--pseudo_labels", "x", "--crop_size", "96"])
    assert (recipe.network, recipe.output_stride, recipe.crop_size) == ("largefov-wr38", 8, 96)
    recipe = parse(["--recipe", "voc-1696-lite0", "--network", "upernet/test_resnet", "--pseudo_labels", "x"])
    assert (recipe.network, recipe.crop_size) == ("upernet/test_resnet", 224)


def test_a_field_that_a_recipe_file_misspells_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("network: upernet/test_resnet\nmax_step: 40\n")
    with pytest.raises(ValueError, match="unknown recipe fields \\['max_step'\\]"):
        parse(["--recipe", str(tmp_path / "mine.yaml"), "--pseudo_labels", "x"])
