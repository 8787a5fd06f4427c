"""A thousand classes, from masks through training to masks: ids beyond 8 bits, and 65535 for what does not count."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from cosa_hf import CoSAOutput, Segmenter
from cosa_hf.app import analyze, class_images
from cosa_hf.data import load_folder, read_mask, undecoded
from cosa_hf.evaluation.figures import save_visualizations
from cosa_hf.pseudo_labels.load import check_masks, load_pseudo_labels

CLASSES = [f"class {number:03}" for number in range(1000)]
SIZE = 48
TINY = shlex.split(
    f"--backbone test_vit --pretrained false --aux_layer -2 --decoder_channels 16 --crop_size {SIZE} "
    f"--input_size {SIZE} --batch_size 2 --images_per_step 2 --num_workers 0 --max_steps 2 --warmup_steps 1 "
    "--lr_warmup_steps 1 --label_scales 1.0 --tracker none --ema_momentum 0.5"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four images with 250 classes each, all of which their masks show, beside pixels that do not count."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    lines = ["file_name,labels,mask_file_name"]
    for number in range(4):
        ids = np.resize(np.arange(250 * number + 1, 250 * number + 251), (SIZE, SIZE))
        ids[:4], ids[4:8] = 0, 65535
        Image.fromarray(ids.astype(np.uint16)).save(folder / f"{number}_mask.png")
        Image.fromarray(generator.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'; '.join(CLASSES[250 * number :][:250])},{number}_mask.png")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(photos, tmp_path_factory):
    """Trained on these masks, for two steps."""
    from cosa_hf.cli import main

    run = tmp_path_factory.mktemp("many") / "run"
    words = [*TINY, "--dataset", "folder", "--data_dir", photos, "--train_split", "train", "--supervision", "masks"]
    scored = ["--eval_split", "train", "--eval_every", 2, "--recipe", "folder-lite0", "--output_dir", run]
    assert main(["train", *map(str, [*words, *scored])]) == 0
    return run / "online"


def test_masks_are_read_and_unlabelled_pixels_do_not_count(photos):
    row = undecoded(load_folder(photos, masks=True))[3]
    ids = np.asarray(read_mask(row, (SIZE, SIZE), len(CLASSES)))
    assert (ids[0, 0], ids[4, 0], ids.max(), ids[8:].min(), ids[8:].max()) == (0, 65535, 65535, 751, 1000)


def test_a_model_says_what_it_ignores_and_is_scored(model, photos, tmp_path, cosa_hf):
    assert json.loads((model / "config.json").read_text())["semantic_loss_ignore_index"] == 65535
    words = ("evaluate", model, "--dataset", "folder", "--data_dir", photos, "--split", "train", "--scales", 1)
    cosa_hf(*words, "--report", tmp_path / "report.json", "--panels", tmp_path / "panels")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["protocol"]["ignore_index"] == 65535
    assert report["seg_tags"]["per_class"].keys() == {"background", *CLASSES}
    assert len(list((tmp_path / "panels").iterdir())) == 4


def test_predictions_have_ids_beyond_255(model, photos, tmp_path, cosa_hf):
    cosa_hf("predict", model, photos / "0.png", "--output_dir", tmp_path)
    segmenter = Segmenter.from_pretrained(model, device="cpu")
    with Image.open(tmp_path / "0.png") as mask:
        assert mask.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(mask), segmenter(photos / "0.png").mask)
        assert np.asarray(mask).max() > 255
    segments = pipeline("image-segmentation", model=str(model))(str(photos / "0.png"))
    named = {segment["label"]: np.asarray(segment["mask"]) > 0 for segment in segments}
    for index in np.unique(segmenter(photos / "0.png").mask):
        found = segmenter(photos / "0.png").mask.numpy() == index
        np.testing.assert_array_equal(named[segmenter.names[index]], found)
    logits = torch.zeros(1, 1001, 1, 2)
    logits[0, 255, 0, 0] = logits[0, 1000, 0, 1] = 1
    (ids,) = segmenter.processor.post_process_semantic_segmentation(CoSAOutput(logits=logits), [(1, 2)])
    assert ids.tolist() == [[255, 1000]]
    one = analyze(segmenter, str(photos / "3.png"))  # of the page
    assert [image.width for image in class_images(one, CLASSES[999], 0.5, segmenter.names)] == [SIZE, SIZE]
    save_visualizations(segmenter, load_folder(photos, masks=True), tmp_path / "panels")


@pytest.mark.parametrize("format", ["png", "parquet"])
def test_labels_can_be_learned_by_another_network(format, model, photos, tmp_path, cosa_hf):
    dataset = ("--dataset", "folder", "--data_dir", photos, "--split", "train", "--scales", 1)
    cosa_hf("label", model, *dataset, "--source", "cam", "--format", format, "--output_dir", tmp_path / "labels")
    labels = load_pseudo_labels(str(tmp_path / "labels")).dataset
    check_masks(labels)
    segmenter = Segmenter.from_pretrained(model, device="cpu", flip=True)
    for row, one in zip(labels, segmenter.predict(load_folder(photos)), strict=True):
        assert row["mask"].mode == "I;16"
        np.testing.assert_array_equal(np.asarray(row["mask"]), one.label("cam")[0])
    assert np.asarray(labels[3]["mask"]).max() > 750
    small = "--network largefov/test_resnet --decoder_channels 16 --pretrained false --max_steps 1 --lr_warmup_steps 0"
    sizes = f"--crop_size {SIZE} --input_size 64 --batch_size 2 --num_workers 0 --tracker none --scale_min 0.5"
    scored = ("--dataset", "folder", "--data_dir", photos, "--eval_split", "train", "--eval_every", 1)
    words = ("--pseudo_labels", tmp_path / "labels", "--output_dir", tmp_path / "run")
    cosa_hf("multistage", *words, *scored, *shlex.split(small), *shlex.split(sizes))
