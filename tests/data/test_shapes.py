import hashlib
from collections import Counter

import numpy as np
import pytest

from cosa_hf.data import SHAPES_CLASSES, SHAPES_COEXISTENCE, class_names, load_shapes, shape_scenes
from cosa_hf.data.shape_scenes import draw_scene
from cosa_hf.data.shapes import SHAPES_SPLITS


@pytest.fixture(scope="module")
def sample():
    return load_shapes("train", num_images=300, image_size=48, masks=True)


def test_columns_names_and_sizes():
    dataset = load_shapes("val")
    assert dataset.num_rows == SHAPES_SPLITS["val"] == 200
    assert dataset.column_names == ["image", "labels", "image_id"]
    assert class_names(dataset) == list(SHAPES_CLASSES)
    assert set(SHAPES_COEXISTENCE) < set(SHAPES_CLASSES)
    assert dataset[0]["image"].size == (96, 96)
    assert len(set(dataset["image_id"])) == 200
    assert dataset.cache_files == [], "nothing is left on the disk"


def test_tags_are_exactly_the_classes_that_can_be_seen(sample):
    for row in sample:
        ids, areas = np.unique(np.asarray(row["mask"]), return_counts=True)
        assert [i - 1 for i in ids if i > 0] == row["labels"]
        assert areas[ids > 0].min() >= 12, "a glimpse of 12 of 2304 pixels at least"
        assert row["mask"].size == row["image"].size


def test_classes_are_balanced_and_images_varied(sample):
    counts = Counter(label for labels in sample["labels"] for label in labels)
    assert set(counts) == set(range(8))
    assert max(counts.values()) < 2 * min(counts.values())
    assert {len(labels) for labels in sample["labels"]} == {1, 2, 3}
    background = np.mean([(np.asarray(mask) == 0).mean() for mask in sample["mask"]])
    assert 0.6 < background < 0.95


def test_each_class_keeps_to_its_hue_and_the_ground_is_muted(sample):
    things, ground = {}, []
    for row in sample:
        hue, saturation, _ = np.moveaxis(np.asarray(row["image"].convert("HSV"), dtype=float), 2, 0)
        mask = np.asarray(row["mask"])
        for label in row["labels"]:
            inside = mask == label + 1
            vector = (saturation[inside] * np.exp(2j * np.pi * hue[inside] / 256)).mean()
            things.setdefault(label, []).append(np.angle(vector) / (2 * np.pi))
        if not set(row["labels"]) & {SHAPES_CLASSES.index(name) for name in SHAPES_COEXISTENCE}:
            ground.append(saturation[mask == 0].mean() / 256)
    for label, hues in things.items():
        off = (np.array(hues) - label / 8 + 0.5) % 1 - 0.5
        assert np.abs(off).max() < 0.0625, SHAPES_CLASSES[label]
    assert np.mean(ground) < 0.2


def test_surroundings_come_with_their_class_and_are_background(monkeypatch):
    """Leaving them out changes every image with a boat or a train, no other, and there the background."""
    with_them = load_shapes("train", num_images=60, image_size=48, masks=True)
    monkeypatch.setattr(shape_scenes, "_SURROUNDINGS", {})
    without = load_shapes("train", num_images=60, image_size=48, masks=True)
    companions = {SHAPES_CLASSES.index(name) for name in SHAPES_COEXISTENCE}
    for first, second in zip(with_them, without, strict=True):
        changed = (np.asarray(first["image"]) != np.asarray(second["image"])).any(axis=2)
        assert changed.any() == bool(companions & set(first["labels"]))
        assert np.array_equal(first["mask"], second["mask"])
        if changed.any():  # one pixel along the outlines mixes both
            assert (np.asarray(first["mask"])[changed] == 0).mean() > 0.8


def _digest(dataset) -> list[str]:
    return [hashlib.sha256(np.asarray(image).tobytes()).hexdigest() for image in dataset["image"]]


def test_an_image_depends_on_seed_split_and_number_only():
    few, more = load_shapes("train", num_images=3), load_shapes("train", num_images=5, masks=True)
    assert _digest(few) == _digest(more)[:3]
    assert few["labels"][:] == more["labels"][:3]
    distinct = (
        _digest(more)
        + _digest(load_shapes("val", num_images=5))
        + _digest(load_shapes("test", num_images=5))
        + _digest(load_shapes("train", num_images=5, seed=1))
    )
    assert len(set(distinct)) == 20


def test_global_generators_make_no_difference():
    np.random.seed(3)
    first = _digest(load_shapes("train", num_images=2))
    np.random.seed(4)
    assert _digest(load_shapes("train", num_images=2)) == first


def test_another_size_shows_the_same_scenes():
    small = load_shapes("train", num_images=10, image_size=48, masks=True)
    large = load_shapes("train", num_images=10, image_size=96, masks=True)
    assert small["labels"][:] == large["labels"][:]
    for a, b in zip(small, large, strict=True):
        shrunk = np.asarray(b["image"].resize((48, 48))).astype(float)
        assert np.corrcoef(np.asarray(a["image"]).ravel(), shrunk.ravel())[0, 1] > 0.9
        agree = np.asarray(a["mask"]) == np.asarray(b["mask"])[::2, ::2]
        assert agree.mean() > 0.93


def test_masks_are_drawn_only_when_asked_for(monkeypatch):
    def refuse(self, image_size):
        raise AssertionError("a mask was drawn")

    monkeypatch.setattr(shape_scenes.Scene, "render_mask", refuse)
    load_shapes("train", num_images=2)
    with pytest.raises(AssertionError, match="a mask was drawn"):
        load_shapes("train", num_images=2, masks=True)


def test_things_are_the_only_source_of_tags():
    scene = draw_scene(np.random.default_rng(0))
    assert scene.class_ids == sorted({thing.class_id for thing in scene.things})
    assert len(scene.class_ids) == len(scene.things), "one thing of a class at most"


@pytest.mark.parametrize(
    "arguments", [{"split": "train_aug"}, {"num_images": 0}, {"image_size": 8}, {"seed": -1}], ids=str
)
def test_refuses_what_it_cannot_do(arguments):
    with pytest.raises(ValueError, match="|".join(f"{key}=|{value}" for key, value in arguments.items())):
        load_shapes(**({"split": "train", "num_images": 1} | arguments))
