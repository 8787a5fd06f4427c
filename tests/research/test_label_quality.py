"""All thresholds in one pass are what evaluation finds one by one."""

import json

import numpy as np
import pytest
from datasets import Dataset
from label_quality import CAM_SOURCES, THRESHOLDS, format_quality, pseudo_label_quality
from pets import CLASSES
from PIL import Image

from cosa_hf.data.images import read_image, undecoded
from cosa_hf.data.tags import tag_features
from cosa_hf.evaluation.evaluate import evaluate_model, predict_dataset

ONE_SCALE = {"scales": (1.0,), "flip": False, "batch_size": 2}


@pytest.fixture
def with_masks(dataset, columns):
    """Masks in which a third of the pixels is some tag of the image, and some are ignored; one image has no tag."""
    rng = np.random.default_rng(1)
    masks = []
    for row, tags in zip(undecoded(dataset), columns["labels"], strict=True):
        width, height = read_image(row).size
        ids = rng.choice([0, 0, 255, *(tag + 1 for tag in tags)], size=(height, width))
        masks.append(Image.fromarray(ids.astype(np.uint8)))
    columns["labels"][4] = []
    return Dataset.from_dict(columns | {"mask": masks}, features=tag_features(CLASSES, masks=True))


def test_every_threshold_as_evaluation_scores_it(model, processor, with_masks):
    thresholds = (0.2, 0.35, 0.5)
    report = pseudo_label_quality(model, processor, with_masks, thresholds, **ONE_SCALE, progress=False)
    for position, threshold in enumerate(thresholds):
        settings = ONE_SCALE | {"cam_threshold": threshold}
        scores = evaluate_model(model, processor, with_masks, **settings, progress=False)
        predictions = list(predict_dataset(model, processor, with_masks, **settings))
        for source in CAM_SOURCES:
            row = report[source][position]
            assert row["threshold"] == threshold
            assert row["miou"] == pytest.approx(scores[source]["miou"])
            assert row["per_class"] == pytest.approx(scores[source]["per_class"])
            truth = np.concatenate([one.truth.numpy().ravel() for one in predictions])
            mask = np.concatenate([one.masks[source].numpy().ravel() for one in predictions])[truth != 255]
            truth = truth[truth != 255]
            right = ((mask == truth) & (truth > 0)).sum()
            assert row["precision"] == pytest.approx(100 * right / (mask > 0).sum())
            assert row["recall"] == pytest.approx(100 * right / (truth > 0).sum())
    assert len({row["miou"] for source in CAM_SOURCES for row in report[source]}) == 9, "nothing to tell apart"
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_every_threshold_of_the_sweep_has_a_row_and_the_best_a_star(model, processor, with_masks):
    report = pseudo_label_quality(model, processor, with_masks, **ONE_SCALE, progress=False)
    lines = format_quality(report).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [f"{threshold:.2f}" for threshold in THRESHOLDS]
    rows = {threshold: line.split() for threshold, line in zip(THRESHOLDS, lines[2:], strict=True)}
    best = max(report["cam"], key=lambda row: row["miou"])
    assert rows[best["threshold"]][1:3] == [f"{best['miou']:.1f}", "*"]
    assert sum(line.count("*") for line in lines) >= 3


@pytest.mark.parametrize("thresholds", [(), (0.0, 0.5), (0.5, 1.0), (0.5, 0.4), (0.5, 0.5)])
def test_thresholds_must_rise(thresholds, model, processor, with_masks):
    with pytest.raises(ValueError, match="thresholds must rise"):
        pseudo_label_quality(model, processor, with_masks, thresholds)


def test_masks_are_needed(model, processor, dataset):
    with pytest.raises(ValueError, match=r"images with masks; .*5 images"):
        pseudo_label_quality(model, processor, dataset)
