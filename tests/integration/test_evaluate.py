"""scripts/evaluate.py as a user runs it, on a small random model and drawn shapes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from in_process import run_script
from PIL import Image

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.data import SHAPES_CLASSES, load_shapes
from cosa_hf.evaluation.evaluate import evaluate_model, format_report

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate.py"
VOC = Path(__file__).resolve().parents[3] / "shared" / "data" / "VOC2012"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = CoSAConfig(
        backbone="test_vit",
        decoder_channels=32,
        id2label=dict(enumerate(["background", *SHAPES_CLASSES])),
        coexistence_classes=list(SHAPES_CLASSES[:2]),
    )
    CoSAForWeaklySupervisedSegmentation(config).save_pretrained(directory)
    CoSAImageProcessor(size={"height": 64, "width": 64}).save_pretrained(directory)
    return directory


def run_here(monkeypatch, *arguments):
    run_script(monkeypatch, "scripts/evaluate.py", *arguments)


def test_report_table_and_panels(model_dir, tmp_path):
    report_path = tmp_path / "new" / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, SCRIPT, model_dir, "--dataset", "shapes", "--report", report_path),
            *("--num_images", "5", "--batch_size", "2", "--scales", "1", "0.5", "--no_flip"),
            *("--panels", tmp_path / "panels", "--num_panels", "2"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(report_path.read_text())

    model = CoSAForWeaklySupervisedSegmentation.from_pretrained(model_dir)
    processor = CoSAImageProcessor.from_pretrained(model_dir)
    dataset = load_shapes("val", num_images=5, masks=True)
    expected = evaluate_model(
        model, processor, dataset, scales=(1.0, 0.5), flip=False, dataset_name="shapes", split="val"
    )
    # Another batch size may round differently, by a pixel or two.
    for protocol in ("seg", "seg_tags", "cam", "cam_aux", "cam_mean"):
        for value in ("miou", "coexistence_miou"):
            assert report[protocol][value] == pytest.approx(expected[protocol][value], abs=0.05)
    assert report["protocol"] == expected["protocol"]
    assert report["protocol"]["input_size"] == [64, 64]
    assert report["images"] == 5

    assert format_report(report) in done.stdout
    assert str(report_path) in done.stdout
    assert "panels of the first 2 images" in done.stdout
    panels = sorted((tmp_path / "panels").iterdir())
    assert [path.name for path in panels] == ["val-00000.png", "val-00001.png"]
    with Image.open(panels[0]) as picture:
        assert picture.width > 5 * 96


@pytest.mark.slow
def test_two_processes_score_what_one_scores(model_dir, tmp_path, monkeypatch):
    """Five images: one process gets three of them, the other two."""
    arguments = ("--dataset", "shapes", "--num_images", "5", "--batch_size", "1", "--scales", "1", "--no_flip")
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no")
    environment = os.environ | {"ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, *launch, *options, SCRIPT, model_dir, *arguments, "--report", tmp_path / "two.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("IoU (%), 5 images") == 1
    run_here(monkeypatch, model_dir, *arguments, "--report", tmp_path / "one.json")
    reports = [json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json")]
    assert reports[0] == reports[1]


def test_input_size_is_the_one_asked_for(model_dir, tmp_path, monkeypatch):
    report = tmp_path / "report.json"
    run_here(
        monkeypatch,
        *(model_dir, "--dataset", "shapes", "--num_images", 1, "--scales", 1, "--input_size", 96),
        *("--report", report),
    )
    assert json.loads(report.read_text())["protocol"]["input_size"] == [96, 96]
    assert sorted(tmp_path.iterdir()) == [report]


def test_crf_is_in_table_and_report(model_dir, tmp_path, monkeypatch, capsys):
    few = (model_dir, "--dataset", "shapes", "--num_images", 2, "--scales", 1)
    for name, flags in {"plain": (), "crf": ("--crf",)}.items():
        run_here(monkeypatch, *few, *flags, "--report", tmp_path / f"{name}.json")
    plain, refined = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "crf"))
    assert plain["protocol"]["crf"] is None
    assert refined["protocol"]["crf"]["iterations"] == 10
    assert refined["protocol"]["seg_tags"].startswith("tags given, CRF: ")
    assert refined["cam"] == plain["cam"]
    assert capsys.readouterr().out.count("after a CRF") == 1


def test_missing_model_is_one_clear_line(tmp_path, monkeypatch):
    missing = tmp_path / "no-such-model"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=f"error: no model at '{missing}'"):
        run_here(monkeypatch, missing, "--dataset", "shapes", "--report", tmp_path / "report.json")


def test_unknown_split_is_an_error_without_a_report(model_dir, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: unknown split 'test2'"):
        run_here(
            monkeypatch,
            *(model_dir, "--dataset", "shapes", "--split", "test2", "--report", tmp_path / "report.json"),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["--report", "file/report.json"], "cannot write file/report.json: file is a file"),
        (["--report", "."], r"cannot write \.: \. is a directory"),
        (["--report", "report.json", "--panels", "file"], "cannot write file: file is a file"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_first(outputs, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run_here(monkeypatch, "no-model-is-needed-to-see-that", "--dataset", "shapes", *outputs)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_still_cannot_be_written_is_one_clear_line(model_dir, tmp_path, monkeypatch):
    (tmp_path / "val-00000.png").mkdir()
    few = ("--dataset", "shapes", "--num_images", 1, "--scales", 1, "--report", tmp_path / "report.json")
    with pytest.raises(SystemExit, match=r"error: .*val-00000\.png"):
        run_here(monkeypatch, model_dir, *few, "--panels", tmp_path)


def test_classes_in_the_type_of_a_column_are_compared_with_the_models(model_dir, tmp_path, complaint):
    """`--classes`, which was not passed, is not what to leave out."""
    features = Features({"image": ImageFeature(), "mask": ImageFeature(), "labels": ClassLabel(names=["cat", "dog"])})
    picture = Image.new("RGB", (8, 8))
    rows = {"image": [picture], "mask": [picture.convert("L")], "labels": [0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "val.parquet")
    said = complaint(
        *("scripts/evaluate.py", model_dir, "--dataset", "hub", "--dataset_name", tmp_path / "data"),
        *("--split", "validation", "--report", tmp_path / "report.json"),
    )
    assert re.match(
        rf"error: the dataset's classes are not the model's(.|\n)*'cat', 'dog'(.|\n)*{SHAPES_CLASSES[0]}", said
    )


@pytest.mark.skipif(not VOC.is_dir(), reason="needs the VOC images beside the repository")
def test_model_of_other_classes_is_refused(model_dir, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"(?s)error: .*'aeroplane'.*" + repr(SHAPES_CLASSES[0])):
        run_here(
            monkeypatch,
            *(model_dir, "--dataset", "voc", "--data_dir", VOC, "--num_images", 1),
            *("--report", tmp_path / "report.json"),
        )


@pytest.mark.parametrize("flag", ["--num_images", "--batch_size", "--num_panels", "--input_size"])
def test_zero_is_not_a_number_of_anything(flag, model_dir, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_here(monkeypatch, model_dir, "--dataset", "shapes", flag, "0")
    assert f"{flag}: 0 is not 1 or more" in capsys.readouterr().err


@pytest.mark.skipif(not VOC.is_dir(), reason="needs the VOC images beside the repository")
def test_voc_images_of_all_sizes_are_scored(tmp_path, monkeypatch, capsys):
    from cosa_hf.data import VOC_CLASSES

    torch.manual_seed(0)
    config = CoSAConfig(
        backbone="test_vit", decoder_channels=32, id2label=dict(enumerate(["background", *VOC_CLASSES]))
    )
    CoSAForWeaklySupervisedSegmentation(config).save_pretrained(tmp_path / "model")
    CoSAImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
    run_here(
        monkeypatch,
        *(tmp_path / "model", "--dataset", "voc", "--data_dir", VOC, "--split", "val", "--num_images", 5),
        *("--batch_size", 3, "--report", tmp_path / "report.json", "--panels", tmp_path / "panels"),
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 5
    assert 0 <= report["seg"]["miou"] <= 100
    assert len(list((tmp_path / "panels").iterdir())) == 5
