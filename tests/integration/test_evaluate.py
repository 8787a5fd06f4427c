"""`cosa-hf evaluate` as a user runs it, on a small random model and drawn shapes."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from in_process import run_command
from PIL import Image
from tiny import save_cosa

from cosa_hf import Segmenter, evaluate
from cosa_hf.data import SHAPES_CLASSES, VOC_CLASSES, load_shapes
from cosa_hf.evaluation.evaluate import format_report

VOC = Path(__file__).resolve().parents[3] / "shared" / "data" / "VOC2012"


def test_report_table_and_visualizations(model_dir, tmp_path, cosa_hf):
    report_path = tmp_path / "new" / "report.json"
    printed = cosa_hf(
        *("evaluate", model_dir, "--dataset", "shapes", "--report", report_path),
        *("--num_images", 5, "--batch_size", 2, "--scales", 1, 0.5, "--no_flip"),
        *("--panels", tmp_path / "panels", "--num_panels", 2),
    )
    report = json.loads(report_path.read_text())

    segmenter = Segmenter.from_pretrained(model_dir, device="cpu", scales=(1.0, 0.5))
    dataset = load_shapes("val", num_images=5, masks=True)
    expected = evaluate(segmenter, dataset, dataset_name="shapes", split="val", progress=False)
    # Another batch size may round differently, by a pixel or two.
    for protocol in ("seg", "seg_tags", "cam", "cam_aux", "cam_mean"):
        for value in ("miou", "coexistence_miou"):
            assert report[protocol][value] == pytest.approx(expected[protocol][value], abs=0.05)
    for name in ("protocol", "images", "weights_sha256"):
        assert report[name] == expected[name]
    assert report["cls_map"] == pytest.approx(expected["cls_map"], abs=0.05)
    assert report["protocol"]["input_size"] == [96, 96]

    for said in (format_report(report), str(report_path), "visualizations of the first 2 images"):
        assert said in printed
    drawn = sorted((tmp_path / "panels").iterdir())
    assert [path.name for path in drawn] == ["val-00000.png", "val-00001.png"]
    with Image.open(drawn[0]) as image:
        assert image.width > 5 * 96


def test_a_report_or_visualizations_are_not_replaced(model_dir, tmp_path, cosa_hf, complaint):
    words = ("evaluate", model_dir, "--dataset", "shapes", "--num_images", 4, "--scales", 1, "--num_panels", 1)
    outputs = ("--report", tmp_path / "report.json", "--panels", tmp_path / "panels")
    cosa_hf(*words, *outputs)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "report.json is there already: choose another --report, or remove" in complaint(*words, *outputs)
    other = ("--report", tmp_path / "other.json")
    said = complaint(*words, *other, *outputs[2:])
    assert "val-00000.png is there already: choose another --panels, or remove" in said
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    cosa_hf(*words, *other, "--panels", tmp_path / "others")
    shutil.rmtree(tmp_path / "panels")
    (tmp_path / "report.json").unlink()
    cosa_hf(*words, *outputs)


@pytest.fixture
def binary(tmp_path):
    """A model of one class, and two photos of it with masks of 0 and 255."""
    save_cosa(tmp_path / "model", 48, ["fat cat"])
    photos = tmp_path / "photos"
    photos.mkdir()
    lines = ["file_name,labels,mask_file_name,split"]
    for number, row in enumerate(load_shapes("val", num_images=2, masks=True)):
        row["image"].save(photos / f"{number}.png")
        Image.fromarray(np.uint8(255 * (np.asarray(row["mask"]) > 0))).save(photos / f"{number}_mask.png")
        lines.append(f"{number}.png,fat cat,{number}_mask.png,val")
    (photos / "metadata.csv").write_text("\n".join(lines))
    return tmp_path


def test_binary_masks_are_not_scored_as_nothing_and_the_advice_scores_them(binary, cosa_hf, complaint):
    report = binary / "report.json"
    words = ("--dataset", "folder", "--data_dir", binary / "photos", "--split", "val")
    scored = ("evaluate", binary / "model", *words, "--scales", 1, "--report", report)
    said = complaint(*scored)
    assert not report.exists()
    assert said.startswith("error: the masks hold nothing but 0 and 255, and 255 does not count: there is no object")
    assert said.count("\n") == 1
    flags = re.search(r"--mask_values 0=background 255=(.*)\n", said)
    assert flags[1] == "'fat cat'"  # to be typed as it stands
    cosa_hf(*scored, *shlex.split(flags[0]))
    per_class = json.loads(report.read_text())["cam"]["per_class"]
    assert 0 < per_class["fat cat"] < 100
    assert run_command("check", *words, "--num_workers", 0) == 1
    assert run_command("check", *words, "--num_workers", 0, *shlex.split(flags[0])) == 0


@pytest.mark.slow
def test_two_processes_score_what_one_scores(model_dir, tmp_path, subprocess_of, cosa_hf):
    """Five images: one process gets three of them, the other two."""
    arguments = ("--dataset", "shapes", "--num_images", 5, "--batch_size", 1, "--scales", 1, "--no_flip")
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "cosa_hf.cli")
    words = ("evaluate", model_dir, *arguments, "--report")
    done = subprocess_of(*words, tmp_path / "two.json", launch=(*launch, *options), ACCELERATE_USE_CPU="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("IoU (%), 5 images") == 1
    cosa_hf(*words, tmp_path / "one.json")
    reports = [json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json")]
    assert reports[0] == reports[1]


def test_input_size_is_the_one_asked_for(model_dir, tmp_path, cosa_hf):
    report = tmp_path / "report.json"
    few = ("--dataset", "shapes", "--num_images", 1, "--scales", 1)
    cosa_hf("evaluate", model_dir, *few, "--input_size", 64, "--report", report)
    assert json.loads(report.read_text())["protocol"]["input_size"] == [64, 64]
    assert sorted(tmp_path.iterdir()) == [report]


def test_crf_is_in_table_and_report(model_dir, tmp_path, cosa_hf):
    few = ("evaluate", model_dir, "--dataset", "shapes", "--num_images", 2, "--scales", 1)
    tables = [
        cosa_hf(*few, *flags, "--report", tmp_path / f"{name}.json")
        for name, flags in {"plain": (), "crf": ("--crf",)}.items()
    ]
    plain, refined = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "crf"))
    assert plain["protocol"]["crf"] is None
    assert refined["protocol"]["crf"]["iterations"] == 10
    assert refined["protocol"]["seg_tags"].startswith("tags given, CRF: ")
    assert refined["protocol"]["cam_mean"].startswith("tags given, CRF: ")
    assert ["after a CRF" in table for table in tables] == [False, True]


def test_missing_model_is_one_clear_line(tmp_path, complaint):
    missing = tmp_path / "no-such-model"
    said = complaint("evaluate", missing, "--dataset", "shapes", "--report", tmp_path / "report.json")
    assert said.startswith(f"error: no model at '{missing}'")


def test_unknown_split_is_an_error_without_a_report(model_dir, tmp_path, complaint):
    report = tmp_path / "report.json"
    said = complaint("evaluate", model_dir, "--dataset", "shapes", "--split", "test2", "--report", report)
    assert said.startswith("error: unknown split 'test2'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["--report", "file/report.json"], "cannot write file/report.json: file is a file"),
        (["--report", "."], r"cannot write \.: \. is a directory"),
        (["--report", "report.json", "--panels", "file"], "cannot write file: file is a file"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_first(outputs, message, tmp_path, monkeypatch, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    said = complaint("evaluate", "no-model-is-needed-to-see-that", "--dataset", "shapes", *outputs)
    assert re.match(f"error: {message}", said)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_still_cannot_be_written_is_one_clear_line(model_dir, tmp_path, complaint):
    (tmp_path / "val-00000.png").mkdir()
    few = ("--dataset", "shapes", "--num_images", 1, "--scales", 1, "--report", tmp_path / "report.json")
    last = complaint("evaluate", model_dir, *few, "--panels", tmp_path).splitlines()[-1]
    assert re.match(r"error: .*val-00000\.png", last)


def test_classes_in_the_type_of_a_column_are_compared_with_the_models(model_dir, tmp_path, complaint):
    """`--classes`, which was not passed, is not what to leave out."""
    features = Features({"image": ImageFeature(), "mask": ImageFeature(), "labels": ClassLabel(names=["cat", "dog"])})
    image = Image.new("RGB", (8, 8))
    rows = {"image": [image], "mask": [image.convert("L")], "labels": [0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "val.parquet")
    said = complaint(
        *("evaluate", model_dir, "--dataset", "hub", "--dataset_name", tmp_path / "data"),
        *("--split", "validation", "--report", tmp_path / "report.json"),
    )
    pattern = rf"error: the dataset's classes are not the model's.*'cat', 'dog'.*{SHAPES_CLASSES[0]}"
    assert re.match(pattern, said.splitlines()[-1])


@pytest.mark.skipif(not VOC.is_dir(), reason="needs the VOC images beside the repository")
def test_model_of_other_classes_is_refused(model_dir, tmp_path, complaint):
    few = ("--dataset", "voc", "--data_dir", VOC, "--num_images", 1, "--report", tmp_path / "report.json")
    assert re.match(rf"error: .*'aeroplane'.*{SHAPES_CLASSES[0]!r}", complaint("evaluate", model_dir, *few))


@pytest.mark.parametrize("flag", ["--num_images", "--batch_size", "--num_panels", "--input_size"])
def test_zero_is_not_a_number_of_anything(flag, model_dir, complaint):
    said = complaint("evaluate", model_dir, "--dataset", "shapes", flag, "0", usage=True)
    assert re.search(rf"{flag}\S*: 0 is not 1 or more", said)


@pytest.mark.skipif(not VOC.is_dir(), reason="needs the VOC images beside the repository")
def test_voc_images_of_all_sizes_are_scored(tmp_path, cosa_hf):
    save_cosa(tmp_path / "model", 64, VOC_CLASSES)
    cosa_hf(
        *("evaluate", tmp_path / "model", "--dataset", "voc", "--data_dir", VOC, "--split", "val", "--num_images", 5),
        *("--batch_size", 3, "--report", tmp_path / "report.json", "--panels", tmp_path / "panels"),
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 5
    assert 0 <= report["seg"]["miou"] <= 100
    assert len(list((tmp_path / "panels").iterdir())) == 5
