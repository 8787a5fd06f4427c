"""All thresholds in one pass are what evaluation finds one by one."""

import json

import label_quality
import numpy as np
import pytest
from datasets import Dataset
from label_quality import CAM_SOURCES, THRESHOLDS, format_quality, pseudo_label_quality
from pets import CLASSES
from PIL import Image
from tiny import square, tiny_cosa

from cosa_hf.data import load_shapes
from cosa_hf.data.tags import tag_features
from cosa_hf.evaluation.evaluate import evaluate
from cosa_hf.inference import Segmenter


@pytest.fixture(scope="module")
def segmenter():
    return Segmenter(tiny_cosa(CLASSES), square(64), batch_size=2)


@pytest.fixture(scope="module")
def with_masks():
    """Five images; a third of their pixels is one of the tags, some are ignored; one image has no tag."""
    rng = np.random.default_rng(0)
    labels = [[0], [1, 2], [0, 1, 2], [2], []]
    images, masks = [], []
    for tags, size in zip(labels, [(40, 30), (31, 44), (24, 24), (50, 20), (33, 33)], strict=True):
        colors = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        images.append(colors.resize(size, Image.Resampling.BICUBIC))
        ids = rng.choice([0, 0, 255, *(tag + 1 for tag in tags)], size=size[::-1])
        masks.append(Image.fromarray(ids.astype(np.uint8)))
    columns = {"image": images, "labels": labels, "image_id": list("abcde"), "mask": masks}
    return Dataset.from_dict(columns, features=tag_features(CLASSES, masks=True))


def test_every_threshold_as_evaluation_scores_it(segmenter, with_masks):
    thresholds = (0.2, 0.35, 0.5)
    report = pseudo_label_quality(segmenter, with_masks, thresholds, show_progress=False)
    for position, threshold in enumerate(thresholds):
        scores = evaluate(segmenter, with_masks, cam_threshold=threshold, progress=False)
        images = list(segmenter.predict(with_masks))
        for source in CAM_SOURCES:
            row = report[source][position]
            assert row["threshold"] == threshold
            assert row["miou"] == pytest.approx(scores[source]["miou"])
            assert row["per_class"] == pytest.approx(scores[source]["per_class"])
            ground_truth = np.concatenate([image.ground_truth.numpy().ravel() for image in images])
            mask = np.concatenate([image.label(source, threshold)[0].numpy().ravel() for image in images])[
                ground_truth != 255
            ]
            ground_truth = ground_truth[ground_truth != 255]
            right = ((mask == ground_truth) & (ground_truth > 0)).sum()
            assert row["precision"] == pytest.approx(100 * right / (mask > 0).sum())
            assert row["recall"] == pytest.approx(100 * right / (ground_truth > 0).sum())
    assert len({row["miou"] for source in CAM_SOURCES for row in report[source]}) == 9, "nothing to tell apart"
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_every_threshold_of_the_sweep_has_a_row_and_the_best_a_star(segmenter, with_masks):
    report = pseudo_label_quality(segmenter, with_masks, show_progress=False)
    lines = format_quality(report).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [f"{threshold:.2f}" for threshold in THRESHOLDS]
    rows = {threshold: line.split() for threshold, line in zip(THRESHOLDS, lines[2:], strict=True)}
    best = max(report["cam"], key=lambda row: row["miou"])
    assert rows[best["threshold"]][1:3] == [f"{best['miou']:.1f}", "*"]
    assert sum(line.count("*") for line in lines) >= 3


@pytest.mark.parametrize("thresholds", [(), (0.0, 0.5), (0.5, 1.0), (0.5, 0.4), (0.5, 0.5)])
def test_thresholds_must_rise(thresholds, segmenter, with_masks):
    with pytest.raises(ValueError, match="thresholds must rise"):
        pseudo_label_quality(segmenter, with_masks, thresholds)


def test_masks_are_needed(segmenter, with_masks):
    with pytest.raises(ValueError, match=r"images with masks; .*5 images"):
        pseudo_label_quality(segmenter, with_masks.remove_columns("mask"))


def test_command_prints_a_table_and_writes_it_down(model_dir, tmp_path, monkeypatch, capsys):
    few = load_shapes("val", num_images=4, masks=True)
    monkeypatch.setattr("cosa_hf.commands.inputs.load_dataset_by_name", lambda *_, **__: few)
    path = tmp_path / "new/quality.json"
    command = ("--dataset", "shapes", "--split", "val", "--scales", "1", "--no_flip", "--thresholds", "0.3", "0.6")
    label_quality.main([str(model_dir), *command, "--report", str(path)])
    report = json.loads(path.read_text())
    assert [row["threshold"] for row in report["cam_mean"]] == [0.3, 0.6]
    assert (report["images"], report["protocol"]["scales"]) == (4, [1.0])
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:4]] == ["0.30", "0.60"]
    assert f"{report['cam'][0]['miou']:.1f}" in table[2]


def test_quality_is_not_measured_where_it_cannot_be_written(tmp_path, complaint):
    report = tmp_path / "file/quality.json"
    report.parent.touch()
    command = ("no-model-is-needed-to-see-that", "--dataset", "shapes", "--split", "val", "--report", report)
    assert complaint(label_quality.main, *command).startswith(f"error: cannot write {report}: ")
