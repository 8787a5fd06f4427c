"""A checkpoint's data against those of the run that goes on from it."""

import pytest

from cosa_hf.training.states import TrainingData

ROWS = [("a", [0]), ("b", [1, 0]), ("c", [1])]


@pytest.mark.parametrize(
    ("rows", "difference"),
    [
        (ROWS[:2], "images 3 -> 2, dog 2 -> 1"),
        ([*ROWS, ("d", [])], "images 3 -> 4"),
        ([("a", [1]), *ROWS[1:]], "cat 2 -> 1, dog 2 -> 3"),
        ([("x", [0]), *ROWS[1:]], "as many of each class, but other ids or tags"),
        ([("a", [1]), ROWS[1], ("c", [0])], "as many of each class, but other ids or tags"),
        (ROWS[::-1], "as many of each class, but other ids or tags"),  # the order of images is drawn from positions
        (None, "images 3 -> 0, cat 2 -> 0, dog 2 -> 0"),
    ],
    ids=["image less", "image more", "other tag", "other id", "tags changed places", "other order", "stream"],
)
def test_other_images_and_tags_are_refused_unless_they_are_meant(rows, difference):
    before = TrainingData(["cat", "dog"], ROWS).state_dict()
    with pytest.raises(ValueError, match=rf"not those of the checkpoint's run \({difference}\): .*allow_changed_data"):
        TrainingData(["cat", "dog"], rows).load_state_dict(before)
    TrainingData(["cat", "dog"], rows, allow_changed=True).load_state_dict(before)


def test_the_same_data_go_on_whatever_the_order_of_tags():
    reordered = [(image_id, tags[::-1]) for image_id, tags in ROWS]
    TrainingData(["cat", "dog"], reordered).load_state_dict(TrainingData(["cat", "dog"], ROWS).state_dict())
    TrainingData(["cat", "dog"], None).load_state_dict(TrainingData(["cat", "dog"], None).state_dict())


@pytest.mark.parametrize("allow_changed", [False, True])
@pytest.mark.parametrize("names", [["zebra", "dog"], ["dog", "cat"], ["cat", "dog", "cow"]])
def test_other_classes_are_refused_in_any_case(names, allow_changed):
    before = TrainingData(["cat", "dog"], ROWS).state_dict()
    with pytest.raises(ValueError, match=rf"has the classes cat, dog; this one has {', '.join(names)}: give the data"):
        TrainingData(names, ROWS, allow_changed).load_state_dict(before)
