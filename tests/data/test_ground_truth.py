"""Masks that no score can be had from are told from those that one can."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from cosa_hf.data.ground_truth import require_ground_truth
from cosa_hf.data.tags import tag_features


def dataset(masks, tags, classes):
    columns = {
        "image": [Image.new("RGB", (len(mask), 1)) for mask in masks],
        "labels": tags,
        "image_id": [f"image-{number}" for number in range(len(masks))],
        "mask": [Image.fromarray(np.array([mask], dtype=np.uint8)) for mask in masks],
    }
    return Dataset.from_dict(columns, features=tag_features(classes, masks=True))


@pytest.mark.parametrize(
    ("masks", "tags", "classes", "message"),
    [
        (
            [[0, 255]],
            [[0]],
            ["cat"],
            r"nothing but 0 and 255, .*If 255 is 'cat', .*--mask_values 0=background 255=cat$",
        ),
        ([[255]], [[0]], ["cat"], "If 255 is 'cat'"),
        (
            [[0, 255]],
            [[0]],
            ["cat", "dog"],
            r"nothing but 0 and 255, and 255 does not count: .*Give them the ids 1\.\.2",
        ),
        ([[0, 0], [0, 0]], [[0], []], ["cat"], r"nothing but 0: there is no object .*Give them the ids 1\.\.1 of the"),
        ([[0]], [[]], ["cat"], "nothing but 0"),
        ([[0, 1], [0, 1]], [[0, 1], [1]], ["cat", "dog"], r"'dog' is a tag of 2 images \(image-0, image-1\) and in no"),
        ([[0, 1, 77]], [[0]], ["cat"], r"holds the ids \[77\]: .* say which: --mask_values 0=background 77=CLASS"),
    ],
)
def test_nothing_to_score_is_refused(masks, tags, classes, message):
    with pytest.raises(ValueError, match=message):
        require_ground_truth(dataset(masks, tags, classes))


MISSING = r"correct the masks or the tags, or score more images"


@pytest.mark.parametrize(
    ("before", "advice", "after"),
    [
        (([[0, 255]], [[0]]), r"Give them the ids 1\.\.2 of the classes", ([[0, 1]], [[0]])),
        (([[0, 1]], [[0, 1]]), MISSING, ([[2, 1]], [[0, 1]])),
        (([[0, 1]], [[0, 1]]), MISSING, ([[0, 1]], [[0]])),
        (([[0, 1]], [[0, 1]]), MISSING, ([[0, 1], [0, 2]], [[0, 1], [1]])),
    ],
)
def test_what_an_error_advises_works(before, advice, after):
    with pytest.raises(ValueError, match=advice):
        require_ground_truth(dataset(*before, ["cat", "dog"]))
    require_ground_truth(dataset(*after, ["cat", "dog"]))


@pytest.mark.parametrize(
    ("masks", "tags", "classes"),
    [
        ([[0, 1]], [[0]], ["cat"]),
        ([[1, 255], [0, 0]], [[0], [0]], ["cat", "dog"]),  # of one set: not every mask shows the class
        ([[0, 2]], [[]], ["cat", "dog"]),
    ],
)
def test_what_can_be_scored_passes(masks, tags, classes):
    require_ground_truth(dataset(masks, tags, classes))


def test_the_models_ignored_id_counts_as_ignored():
    require_ground_truth(dataset([[0, 1, 100]], [[0]], ["cat"]), ignore_index=100)
    with pytest.raises(ValueError, match="nothing but 0 and 100, and 100 does not count"):
        require_ground_truth(dataset([[0, 100]], [[0]], ["cat"]), ignore_index=100)
