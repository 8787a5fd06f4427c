"""`cosa-hf label` as a user runs, kills and repeats it."""

import json
import multiprocessing
import re
import shlex
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from drawn import write_voc
from in_process import run_command
from runs_of import train_on
from tiny import save_cosa

from cosa_hf.backbone_cosa import CoSABackbone
from cosa_hf.data import SHAPES_CLASSES, load_voc
from cosa_hf.evaluation.crf import DenseCRF
from cosa_hf.inference import Segmenter

SETTINGS = shlex.split("--dataset shapes --split val --source cam_mean --scales 1 --shard_size 20 --batch_size 4")


@pytest.fixture(scope="module")
def voc_dir(tmp_path_factory):
    """Six drawn images and their masks in VOC layout; the split is called "val"."""
    root = tmp_path_factory.mktemp("VOC2012")
    write_voc(root, ["val"])
    (root / "classes.txt").write_text("\n".join(SHAPES_CLASSES))
    return root


def words(model_dir, output_dir, *arguments):
    return ("label", model_dir, *SETTINGS, *arguments, "--output_dir", output_dir)


def label(arguments):
    assert run_command(*arguments) == 0


def files(directory):
    return {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}


def contents(directory):
    return {name: path.read_bytes() for name, path in files(directory).items()}


# What an export of 200 images in ten shards is about to have written when it is killed.
KILLED_AT = {
    "png": ("SegmentationClassAug/*.png", 23),
    "parquet": ("data/*.parquet", 2),
    "coco-json": (".parts/*.json", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("format", KILLED_AT)
def test_killed_in_the_middle_and_run_again(format, model_dir, tmp_path, cosa_hf):
    output_dir = tmp_path / "killed"
    pattern, number = KILLED_AT[format]
    command = words(model_dir, output_dir, "--format", format)
    process = multiprocessing.get_context("fork").Process(target=label, args=(command,))  # spares it the start
    process.start()
    while len(list(output_dir.glob(pattern))) < number:
        assert process.is_alive(), "the export ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert json.loads((output_dir / "export.json").read_text())["complete"] is False
    # All but the parts that are gone when the export is complete, and the file that was being written.
    kept = {name for name in files(output_dir) if not name.startswith(".") and not Path(name).name.startswith(".")}
    kept -= {"export.json"}
    before = {name: (output_dir / name).stat() for name in kept}
    content = {name: (output_dir / name).read_bytes() for name in kept}
    parts = [*output_dir.glob(".parts/*.json"), *output_dir.glob("data/*.parquet")]

    printed = cosa_hf(*words(model_dir, output_dir, "--format", format))
    assert f"{20 * len(parts)} images were labelled before" in printed
    cosa_hf(*words(model_dir, tmp_path / "uninterrupted", "--format", format))
    uninterrupted = contents(tmp_path / "uninterrupted")
    assert contents(output_dir) == uninterrupted
    for name in kept:
        assert content[name] == uninterrupted[name], f"{name} was half-written"
        after = (output_dir / name).stat()
        assert (after.st_mtime_ns, after.st_ino) == (before[name].st_mtime_ns, before[name].st_ino), (
            f"{name} was written twice"
        )


@pytest.mark.slow
@pytest.mark.parametrize("format", KILLED_AT)
def test_two_processes_write_what_one_writes(format, model_dir, tmp_path, subprocess_of, cosa_hf):
    arguments = words(model_dir, tmp_path / "two", "--format", format)
    if format == "png":
        # Not `accelerate launch --cpu`: without MPI that starts one process, whatever --num_processes says.
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "cosa_hf.cli")
        done = subprocess_of(*arguments, launch=launch, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("200 images labelled") == 1
        assert "export, process 1 of 2" in done.stderr
    else:  # spares them the start
        train_on(2, arguments, label)
    cosa_hf(*words(model_dir, tmp_path / "one", "--format", format))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_png_of_other_classes_reads_back(model_dir, voc_dir, tmp_path, cosa_hf, complaint):
    settings = ("--dataset", "voc", "--data_dir", voc_dir, "--format", "png", "--no_flip")
    output = cosa_hf(*words(model_dir, tmp_path / "out", *settings))
    assert "6 images labelled, " in output
    assert output.splitlines()[-1] == f"export: {tmp_path / 'out'}"
    there, here = (load_voc(directory, "val", masks=True) for directory in (voc_dir, tmp_path / "out"))
    assert here.features == there.features
    for column in ("image", "labels", "image_id"):
        assert here[column][:] == there[column][:]
    assert all(row["mask"].size == (96, 96) for row in here)
    said = complaint(*words(model_dir, tmp_path / "out", *settings, "--threshold", "0.25"))
    assert re.match(r"error: .*other settings.* threshold: 0.5 there, 0.25 now", said)


def test_untagged_images_need_tags_that_are_predicted(model_dir, voc_dir, tmp_path, cosa_hf, complaint):
    for name in ("JPEGImages", "ImageSets", "classes.txt"):
        (tmp_path / name).symlink_to(voc_dir / name)
    tags = json.loads((voc_dir / "image_labels.json").read_text())
    (tmp_path / "image_labels.json").write_text(json.dumps(tags | {"val-00002": []}))
    settings = ("--dataset", "voc", "--data_dir", tmp_path, "--format", "png")
    said = complaint(*words(model_dir, tmp_path / "out", *settings))
    assert re.match(r"error: 1 of 6 images have no tag: val-00002; .*--tags predicted", said)
    # A random model gives no class a probability of nearly nothing.
    predicted = ("--tags", "predicted", "--class_threshold", "0.001")
    cosa_hf(*words(model_dir, tmp_path / "out", *settings, *predicted))
    found = json.loads((tmp_path / "out" / "image_labels.json").read_text())
    assert found == tags | {"val-00002": list(SHAPES_CLASSES)}


def test_cached_features_spare_the_encoder(tmp_path, voc_dir, cosa_hf, complaint, monkeypatch):
    """The first export encodes and keeps, the second does neither; both write what one without a cache writes."""
    model_dir = save_cosa(tmp_path / "model", 96, affinity="features")
    cached = ("--cache_features", tmp_path / "cache")
    settings = ("--dataset", "voc", "--data_dir", voc_dir, "--format", "png", "--source", "cam_spread")
    said = cosa_hf(*words(model_dir, tmp_path / "first", *settings, *cached))
    assert "encoding 6 images once" in said
    monkeypatch.setattr(CoSABackbone, "forward", None)
    assert "encoding" not in cosa_hf(*words(model_dir, tmp_path / "second", *settings, *cached))
    monkeypatch.undo()
    cosa_hf(*words(model_dir, tmp_path / "without", *settings))
    first, second, without = (load_voc(tmp_path / name, "val", masks=True) for name in ("first", "second", "without"))
    for row in range(6):
        masks = [np.asarray(each[row]["mask"]) for each in (first, second, without)]
        assert np.array_equal(masks[0], masks[1])
        assert (masks[0] != masks[2]).mean() < 0.01  # the cache is in float16
        assert len(np.unique(masks[2])) > 1
    recorded = [json.loads((tmp_path / name / "export.json").read_text()) for name in ("first", "without")]
    assert [each["settings"].get("cached_features") for each in recorded] == [True, None]
    said = complaint(*words(model_dir, tmp_path / "half", *settings, *cached, "--scales", "0.5", "1.5"))
    assert "--cache_features has the images at scale 1, and --scales 0.5 1.5 asks for others: add 1" in said
    said = complaint(*words(model_dir, tmp_path / "first", *settings, *cached[:1], tmp_path / "unused", "--no_flip"))
    assert "has an export with other settings" in said
    cosa_hf(*words(model_dir, tmp_path / "first", *settings, *cached[:1], tmp_path / "unused"))  # is complete
    assert not (tmp_path / "unused").exists()


def test_a_crf_refines_what_is_written(tmp_path, voc_dir, cosa_hf):
    model_dir = save_cosa(tmp_path / "model", 96, affinity="features")
    settings = ("--dataset", "voc", "--data_dir", voc_dir, "--format", "png", "--source", "seg_spread", "--no_flip")
    for name, flags in {"plain": (), "crf": ("--crf",)}.items():
        cosa_hf(*words(model_dir, tmp_path / name, *settings, *flags))
    plain, refined = (load_voc(tmp_path / name, "val", masks=True) for name in ("plain", "crf"))
    segmenter = Segmenter.from_pretrained(model_dir, device="cpu", crf=DenseCRF())
    for row, before, one in zip(refined, plain, segmenter.predict(plain), strict=True):
        assert np.array_equal(np.asarray(row["mask"]), one.label("seg_tags_spread")[0])
        assert not np.array_equal(np.asarray(row["mask"]), np.asarray(before["mask"]))
    record = json.loads((tmp_path / "crf" / "export.json").read_text())
    assert record["settings"]["crf"]["bilateral_sigma_xy"] == 67


def test_missing_model_is_one_clear_line(tmp_path, complaint):
    assert complaint(*words(tmp_path / "nowhere", tmp_path / "out", "--format", "png")).startswith(
        "error: no model at "
    )
    assert not (tmp_path / "out").exists()
