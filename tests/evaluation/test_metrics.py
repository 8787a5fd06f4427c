"""The mIoU metric against scikit-learn and hand-computed numbers."""

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from cosa_hf.evaluation.metrics import SegmentationMetric

NAMES = ["background", "boat", "bird", "train", "sheep"]


def random_masks(seed, shape=(3, 17, 23), ignored=0.1, present=(0, 1, 2, 4)):
    generator = np.random.default_rng(seed)
    predictions = generator.choice(present, size=shape)
    references = generator.choice(present, size=shape)
    references[generator.random(shape) < ignored] = 255
    return predictions, references


def test_counts_equal_scikit_learn():
    predictions, references = random_masks(0)
    metric = SegmentationMetric(NAMES)
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction=prediction, reference=reference)
    valid = references != 255
    expected = confusion_matrix(references[valid], predictions[valid], labels=range(5))
    assert metric.confusion_matrix.dtype == torch.int64
    np.testing.assert_array_equal(metric.confusion_matrix.numpy(), expected)


def test_iou_equals_scikit_learn_and_leaves_out_classes_that_occur_nowhere():
    predictions, references = random_masks(1)
    valid = references != 255
    expected = 100 * jaccard_score(references[valid], predictions[valid], labels=[0, 1, 2, 4], average=None)
    result = SegmentationMetric(NAMES).compute(predictions=predictions, references=references)
    assert result["per_class"]["train"] is None
    assert [result["per_class"][name] for name in NAMES if name != "train"] == pytest.approx(expected)
    assert result["miou"] == pytest.approx(expected.mean())


def test_class_that_is_only_predicted_counts_as_zero():
    result = SegmentationMetric(["background", "cat"]).compute(predictions=[[0, 1]], references=[[0, 0]])
    assert result == {"miou": 25.0, "per_class": {"background": 50.0, "cat": 0.0}}


def test_mean_is_of_dataset_ious_not_of_image_ious():
    metric = SegmentationMetric(["background", "cat"])
    metric.add(prediction=[1], reference=[1])
    metric.add(prediction=[0, 0, 0], reference=[1, 1, 0])
    # cat: 1 of 3 pixels; background: 1 of 3. Per image the cat would score 100 and 0.
    assert metric.compute()["per_class"] == pytest.approx({"background": 100 / 3, "cat": 100 / 3})


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor, lambda masks: list(torch.as_tensor(masks)), list])
def test_arrays_tensors_and_lists_count_alike(make):
    predictions, references = random_masks(2)
    expected = SegmentationMetric(NAMES).compute(predictions=predictions, references=references)
    references = references.astype(np.uint8)
    result = SegmentationMetric(NAMES).compute(predictions=make(predictions), references=make(references))
    assert result == expected


def test_images_of_different_sizes_share_one_batch():
    metric = SegmentationMetric(["background", "cat"])
    metric.add_batch(
        predictions=[np.zeros((2, 3), int), np.ones((4, 1), int)],
        references=[np.zeros((2, 3), int), np.ones((4, 1), int)],
    )
    assert metric.confusion_matrix.tolist() == [[6, 0], [0, 4]]


def test_all_pixels_ignored_gives_none():
    result = SegmentationMetric(["background", "cat"]).compute(predictions=[[0, 1]], references=[[255, 255]])
    assert result == {"miou": None, "per_class": {"background": None, "cat": None}}


def test_compute_starts_afresh():
    metric = SegmentationMetric(["background", "cat"])
    metric.compute(predictions=[[0, 1]], references=[[1, 0]])
    assert metric.compute(predictions=[[0, 1]], references=[[0, 1]])["miou"] == 100.0


def test_matrices_of_several_processes_merge():
    predictions, references = random_masks(3, shape=(4, 8, 8))
    whole = SegmentationMetric(NAMES).compute(predictions=predictions, references=references)
    parts = [SegmentationMetric(NAMES) for _ in range(2)]
    for rank, part in enumerate(parts):
        part.add_batch(predictions=predictions[rank::2], references=references[rank::2])
    parts[0].confusion_matrix = parts[0].confusion_matrix + parts[1].confusion_matrix
    assert parts[0].compute() == whole


def test_a_matrix_of_other_classes_does_not_merge():
    metric = SegmentationMetric(NAMES)
    with pytest.raises(ValueError, match=r"of 5 classes has shape \(5, 5\), got \(2, 2\)"):
        metric.confusion_matrix = torch.zeros(2, 2)


def test_coexistence_is_the_mean_over_the_named_classes():
    metric = SegmentationMetric(NAMES)
    metric.add_batch(predictions=[[0, 1, 2, 2]], references=[[0, 1, 2, 1]])
    assert metric.coexistence(["boat", "bird"]) == pytest.approx(50.0)
    assert metric.coexistence(["boat", "train"]) == pytest.approx(50.0)  # train occurs nowhere
    assert metric.coexistence(["train"]) is None
    assert metric.coexistence([]) is None
    with pytest.raises(ValueError, match="ship"):
        metric.coexistence(["ship"])


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ([[0, 5]], [[0, 0]], r"prediction holds the ids \[5\]"),
        ([[0, -1]], [[0, 0]], r"prediction holds the ids \[-1\]"),
        ([[0, 255]], [[0, 255]], r"prediction holds the ids \[255\]"),
        ([[0, 0]], [[0, 7]], r"reference holds the ids \[7\]"),
        ([[0, 0, 0]], [[0, 0]], "shape"),
        (np.zeros((4, 6), int), np.zeros((6, 4), int), "shape"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "argmax"),
    ],
)
def test_masks_that_do_not_fit_are_refused(prediction, reference, message):
    metric = SegmentationMetric(NAMES)
    with pytest.raises(ValueError, match=message):
        metric.add(prediction=prediction, reference=reference)
    assert metric.confusion_matrix.sum() == 0


@pytest.mark.parametrize(
    ("prediction", "advice", "followed"),
    [
        (np.ones((2, 3), int), "resize the prediction to the reference", lambda mask: mask.repeat(2, 0).repeat(2, 1)),
        (np.eye(4)[np.ones((4, 6), int)], "take the argmax of logits first", lambda logits: logits.argmax(-1)),
    ],
)
def test_what_an_error_advises_works(prediction, advice, followed):
    metric, reference = SegmentationMetric(NAMES), np.ones((4, 6), int)
    with pytest.raises(ValueError, match=advice):
        metric.add(prediction=prediction, reference=reference)
    metric.add(prediction=followed(prediction), reference=reference)
    assert metric.confusion_matrix[1, 1] == 24


def test_an_id_to_ignore_that_is_a_class_is_chosen_otherwise():
    with pytest.raises(ValueError, match=r"ignore_index=1 is also the id of 'cat'; choose one outside 0\.\.1"):
        SegmentationMetric(["background", "cat"], ignore_index=1)
    SegmentationMetric(["background", "cat"], ignore_index=2)


def test_batches_that_do_not_fit_are_refused():
    metric = SegmentationMetric(NAMES)
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        metric.add_batch(predictions=[[0], [0]], references=[[0]])
    with pytest.raises(ValueError, match="both"):
        metric.add_batch(predictions=[[0]])
    with pytest.raises(ValueError, match="weights"):
        metric.add_batch(predictions=[[0]], references=[[0]], weights=[1])


@pytest.mark.parametrize(
    ("names", "ignore_index"), [(["background"], 255), (["cat", "cat"], 255), (["background", "cat"], 1)]
)
def test_settings_that_cannot_work_are_refused(names, ignore_index):
    with pytest.raises(ValueError, match=r"label_names|ignore_index"):
        SegmentationMetric(names, ignore_index=ignore_index)


def test_combines_with_other_metrics():
    metric = evaluate.combine([SegmentationMetric(["background", "cat"])])
    metric.add_batch(predictions=[[0, 1]], references=[[0, 1]])
    assert metric.compute()["miou"] == 100.0


def test_nothing_is_written(tmp_path):
    """The base class would make a cache folder, and an arrow file with a lock in it."""
    metric = SegmentationMetric(["background", "cat"], cache_dir=str(tmp_path / "cache"))
    metric.add_batch(predictions=np.zeros((2, 3, 3), int), references=np.zeros((2, 3, 3), int))
    assert metric.compute()["miou"] == 100.0
    assert list(tmp_path.iterdir()) == []
