"""Analyses against tables worked out by hand, on images of a few pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from analyses import (
    ANALYSES,
    PERPLEXITY_EDGES,
    Labelling,
    accuracy_in_bins,
    coexistence,
    cpl_accuracy,
    filtered_miou,
    pseudo_label_miou,
    reliability_per_image,
)
from PIL import Image

from cosa_hf.inference import Segmentation

NAMES = ["background", "cat", "dog"]
CAT = [[0.97, 0.76, 0.52], [0.40, 0.10, 0.0]]
GROUND_TRUTH = [[1, 1, 0], [1, 0, 255]]


def prediction(cat=CAT, ground_truth=GROUND_TRUTH, dog=None, aux_cat=None, spl=None, name="image"):
    """An image with both tags and maps at its own size; the segmentation is the ground truth unless `spl` is given."""

    def maps(first, second=None):
        first = torch.tensor(first)
        return torch.stack([first, torch.zeros_like(first) if second is None else torch.tensor(second)])

    ground_truth = torch.tensor(ground_truth)
    ids = ground_truth.clamp(max=2) if spl is None else torch.tensor(spl)
    cam = maps(cat, dog)
    return Segmentation(
        image_id=name,
        image=Image.new("RGB", ground_truth.shape[::-1]),
        labels=torch.ones(2),
        seg_logits=9.0 * F.one_hot(ids, 3).permute(2, 0, 1),
        cam=cam,
        aux_cam=maps(aux_cat) if aux_cat else cam,
        ground_truth=ground_truth,
    )


def test_bins_hold_their_lower_edge_and_the_last_one_both():
    edges = torch.tensor([0.0, 0.5, 1.0])
    values = torch.tensor([0.0, 0.49, 0.5, 1.0])
    right = torch.zeros(4, dtype=torch.long)
    assert accuracy_in_bins(values, right, right, edges).tolist() == [[2, 2], [2, 2]]


def test_accuracy_by_confidence_and_by_perplexity():
    # xi = 0.5 gives cat, cat, cat / background x 3; ground truth: cat, cat, background / cat, background, ignored.
    rows = cpl_accuracy([prediction(), prediction()], Labelling(NAMES))
    confidence = {row["low"]: row for row in rows if row["against"] == "confidence" and row["pixels"]}
    assert {low: (row["pixels"], row["accuracy"]) for low, row in confidence.items()} == {
        0.1: (2, 100.0),
        0.4: (2, 0.0),
        0.5: (2, 0.0),
        0.75: (2, 100.0),
        0.95: (2, 100.0),
    }
    # -log(0.8 d) with d = 0.94, 0.52, 0.04 / 0.2, 0.8: 0.29, 0.88, 3.44 / 1.83, 0.45
    uncertainty = {row["low"]: row for row in rows if row["against"] == "perplexity" and row["pixels"]}
    assert {low: (row["pixels"], row["accuracy"]) for low, row in uncertainty.items()} == {
        0.25: (4, 100.0),
        0.75: (2, 100.0),
        1.75: (2, 0.0),
        3.25: (2, 0.0),
    }
    assert all(row["accuracy"] is None for row in rows if not row["pixels"])
    assert {row["threshold"] for row in rows} == {0.5}


def test_bins_cover_every_confidence_and_every_perplexity():
    hard = prediction([[0.0, 0.5, 1.0]], [[0, 1, 1]])
    rows = cpl_accuracy([hard], Labelling(NAMES))
    for against in ("confidence", "perplexity"):
        assert sum(row["pixels"] for row in rows if row["against"] == against) == 3
    # At the threshold the perplexity is the greatest there is, and falls into the open bin.
    assert [row["pixels"] for row in rows if row["high"] == math.inf] == [1]
    assert PERPLEXITY_EDGES[-1] == math.inf


def test_the_filter_drops_what_is_near_its_own_maps_threshold():
    # M: the two errors (0.52 and 0.40) have perplexity 3.44 and 1.83, the rest at most 0.88.
    # M† at xi 0.3: cat where it is at least 0.3; one error (0.9 on background), and it is certain.
    aux = [[0.9, 0.9, 0.9], [0.9, 0.05, 0.0]]
    rows = filtered_miou([prediction(aux_cat=aux)], Labelling(NAMES, aux_threshold=0.3))
    found = {(row["map"], row["pixels"]): (row["share"], row["miou"]) for row in rows}
    # M, all: cat 2 of 4, background 1 of 3; certain: cat 2 of 2, background 1 of 1, out of 3 of 5 pixels.
    assert found["M", "all"] == (100.0, pytest.approx(100 * (2 / 4 + 1 / 3) / 2))
    assert found["M", "certain"] == (60.0, 100.0)
    # M†: cat 3 of 4, background 1 of 2, all of it certain.
    assert found["M†", "all"] == found["M†", "certain"] == (100.0, pytest.approx(100 * (3 / 4 + 1 / 2) / 2))


def test_epsilon_and_the_constants_of_perplexity_are_the_runs_own():
    def share(**constants):
        rows = filtered_miou([prediction()], Labelling(NAMES, **constants))
        return next(row["share"] for row in rows if (row["map"], row["pixels"]) == ("M", "certain"))

    assert share(epsilon=0.3) == 20.0  # 0.29 only
    assert share(epsilon=2.0) == 80.0  # all but 3.44
    assert share(epsilon=0.1) == 0.0
    assert share(epsilon=0.1, beta=2.0) == 20.0  # 0.29 squared is 0.08
    assert share(alpha=0.3) == 0.0  # -log(0.3) is above 1 already


def test_spl_is_the_segmentation_and_cpl_the_cam_at_its_own_threshold():
    spl = [[1, 1, 0], [0, 0, 0]]  # cat 2 of 3, background 2 of 3
    rows = pseudo_label_miou([prediction(spl=spl)], Labelling(NAMES, threshold=0.3))
    # At 0.3 the CPL is cat x 4, background x 1: cat 3 of 4, background 1 of 2.
    assert rows == [{"labels": "SPL", "miou": pytest.approx(200 / 3)}, {"labels": "CPL", "miou": pytest.approx(62.5)}]


def test_reliability_is_each_images_own():
    sure = prediction([[1.0, 0.0]], [[1, 0]], name="sure")
    nothing = prediction([[1.0, 0.0]], [[255, 255]], name="unlabelled")
    first, second, third = reliability_per_image([prediction(), sure, nothing], Labelling(NAMES))
    assert first["image_id"] == "image"
    # The sixth pixel, ignored in the ground truth, has confidence 0 and so the least perplexity.
    distances = [0.94, 0.52, 0.04, 0.2, 0.8, 1.0]
    expected = sum(-math.log(0.8 * distance) for distance in distances) / 6
    assert first["perplexity"] == pytest.approx(expected, abs=1e-4)
    assert first["miou"] == pytest.approx(100 * (2 / 4 + 1 / 3) / 2)
    assert first["mae"] == pytest.approx((1 - first["miou"] / 100 + expected) / 2, abs=1e-4)
    assert (second["miou"], second["perplexity"]) == (100.0, pytest.approx(-math.log(0.8)))
    assert (third["miou"], third["mae"]) == (None, None)


def test_coexistence_is_the_mean_over_the_named_classes():
    # The CAM at the model's own threshold, whatever the run's xi, labels the pixels 1, 1, 2 / 2, 0, 0.
    cat, dog = [[0.9, 0.6, 0.0], [0.0, 0.4, 0.0]], [[0.0, 0.0, 0.9], [0.5, 0.0, 0.3]]
    image = prediction(cat, ground_truth=[[1, 1, 1], [2, 0, 0]], dog=dog)
    # cat 2 of 3, dog 1 of 2, background all
    (row,) = coexistence([image], Labelling(NAMES, threshold=0.2, coexistence_classes=["cat"]))
    assert row == {"c_miou": pytest.approx(200 / 3), "miou": pytest.approx(100 * (2 / 3 + 1 / 2 + 1) / 3)}
    assert coexistence([image], Labelling(NAMES))[0]["c_miou"] is None


def test_labels_are_the_strongest_class():
    dog = prediction([[0.6, 0.2]], [[2, 0]], dog=[[0.9, 0.3]])
    rows = pseudo_label_miou([dog], Labelling(NAMES))
    assert rows[1]["miou"] == 100.0


@pytest.mark.parametrize("name", ANALYSES)
def test_tables_have_the_same_columns_in_every_row(name):
    rows = ANALYSES[name]([prediction()], Labelling(NAMES))
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
