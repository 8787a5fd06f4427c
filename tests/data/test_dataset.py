import random
from collections import Counter

import numpy as np
import pytest
import torch
from images_of import image_of
from PIL import Image
from torch.utils.data import DataLoader

from cosa_hf.data import TrainingDataset, Views, load_shapes, load_voc

VIEWS = Views(40, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def shapes():
    return load_shapes("train", num_images=7, image_size=32, masks=True)


def _items(stream: TrainingDataset) -> list[dict]:
    return [stream[position] for position in range(len(stream))]


def _assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name]
        assert same, name


def test_item(shapes):
    item = TrainingDataset(shapes, VIEWS, length=7, seed=0, masks=True)[3]
    row = next(row for row in shapes if row["image_id"] == item["image_id"])
    assert item["labels"].dtype == torch.float32
    assert item["labels"].nonzero().flatten().tolist() == row["labels"]
    assert item["labels"].shape == (8,)
    assert set(item) == {"weak", "strong", "valid", "mask", "labels", "image_id", "unreadable"}
    assert item["unreadable"] == ""
    assert set(item["mask"].unique().tolist()) <= {0, 255} | {label + 1 for label in row["labels"]}


def test_every_image_once_an_epoch_in_changing_order(shapes):
    stream = TrainingDataset(shapes, VIEWS, length=24, seed=0)
    order = [stream[p]["image_id"] for p in range(24)]
    epochs = [order[:7], order[7:14], order[14:21]]
    assert all(set(epoch) == set(shapes["image_id"]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert max(Counter(order[21:]).values()) == 1
    other = TrainingDataset(shapes, VIEWS, length=7, seed=1)
    assert [other[p]["image_id"] for p in range(7)] != epochs[0]


def test_views_change_from_item_to_item():
    stream = TrainingDataset(load_shapes("train", num_images=1, image_size=32), VIEWS, length=16, seed=0)
    weak = [stream[p]["weak"] for p in range(16)]
    assert all(not torch.equal(weak[i], weak[j]) for i in range(16) for j in range(i))


def test_an_item_depends_on_seed_and_position_only(shapes):
    """Workers, a restart in the middle, the order of reading, global generators: none makes a difference."""
    reference = [TrainingDataset(shapes, VIEWS, length=20, seed=5)[p] for p in range(20)]

    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    restarted = TrainingDataset(shapes, VIEWS, length=20, seed=5)
    for position in (13, 19, 2, 13):
        _assert_equal(restarted[position], reference[position])

    for workers in (0, 2):
        loader = DataLoader(TrainingDataset(shapes, VIEWS, length=20, seed=5), batch_size=None, num_workers=workers)
        for item, expected in zip(loader, reference, strict=True):
            _assert_equal(item, expected)


def test_longer_stream_begins_with_the_same_items(shapes):
    _assert_equal(
        TrainingDataset(shapes, VIEWS, length=20, seed=5)[9],
        TrainingDataset(shapes, VIEWS, length=2000, seed=5)[9],
    )


def test_global_random_states_are_left_alone(shapes):
    stream = TrainingDataset(shapes, VIEWS, length=20, seed=5)
    torch_state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),
    )
    stream[11]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_batches_through_the_default_collation(shapes):
    batch = next(iter(DataLoader(TrainingDataset(shapes, VIEWS, length=20, seed=5), batch_size=4)))
    assert batch["weak"].shape == (4, 3, 40, 40)
    assert batch["labels"].shape == (4, 8)
    assert len(batch["image_id"]) == 4


def test_masks_make_no_difference_to_the_rest(shapes):
    with_masks = TrainingDataset(shapes, VIEWS, length=7, seed=0, masks=True)[2]
    del with_masks["mask"]
    _assert_equal(with_masks, TrainingDataset(shapes, VIEWS, length=7, seed=0)[2])


def test_a_mask_column_is_not_opened_unless_asked_for(voc_dir):
    dataset = load_voc(voc_dir, "train", masks=True)
    for path in (voc_dir / "SegmentationClassAug").iterdir():
        path.write_bytes(b"no mask")
    stream = TrainingDataset(dataset, VIEWS, length=3, seed=0)
    assert {stream[p]["image_id"] for p in range(3)} == set(dataset["image_id"])
    with pytest.raises(ValueError, match=r"3 images in a row cannot be read.*the mask of image '2007_0"):
        TrainingDataset(dataset, VIEWS, length=3, seed=0, masks=True)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_replaced_by_the_next(voc_dir, workers):
    whole = [item["image_id"] for item in _items(TrainingDataset(load_voc(voc_dir, "train"), VIEWS, length=9, seed=0))]
    path = voc_dir / "JPEGImages/2007_02.jpg"
    path.write_bytes(path.read_bytes()[:200])
    stream = TrainingDataset(load_voc(voc_dir, "train"), VIEWS, length=9, seed=0)
    items = list(DataLoader(stream, batch_size=None, num_workers=workers))
    assert whole.count("2007_02") == 3
    for position, image_id in enumerate(whole[:-1]):
        if image_id == "2007_02":
            assert items[position]["image_id"] == whole[position + 1]
            assert f"cannot read the image of image '2007_02' ({path})" in items[position]["unreadable"]
        else:
            assert (items[position]["image_id"], items[position]["unreadable"]) == (image_id, "")


def test_nothing_readable_is_an_error(voc_dir):
    first = TrainingDataset(load_voc(voc_dir, "train"), VIEWS, length=3, seed=0)[0]["image_id"]
    for path in (voc_dir / "JPEGImages").iterdir():
        path.write_bytes(b"no image")
    message = f"3 images in a row cannot be read. The first: cannot read the image of image '{first}'"
    with pytest.raises(ValueError, match=message):
        TrainingDataset(load_voc(voc_dir, "train"), VIEWS, length=3, seed=0)[0]


def test_a_mask_of_another_size_is_named(voc_dir):
    Image.new("L", (5, 5)).save(voc_dir / "SegmentationClassAug/2007_02.png")
    stream = TrainingDataset(load_voc(voc_dir, "train", masks=True), VIEWS, length=3, seed=0, masks=True)
    (problem,) = {item["unreadable"] for item in _items(stream)} - {""}
    assert "mask of image '2007_02' is 5x5" in problem


def test_any_error_says_which_image(shapes):
    def broken_views(image, mask, confidence):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck") as caught:
        TrainingDataset(shapes, broken_views, length=7, seed=0)[4]
    assert "item 4" in caught.value.__notes__[0]
    assert "image 'train-0000" in caught.value.__notes__[0]


def test_small_odd_images_pass(tmp_path, one_image):
    """Smaller than a patch, and not RGB."""
    for mode in ("L", "RGBA", "P"):
        path = tmp_path / f"{mode}.png"
        image_of(5, 3, mode).save(path)
        item = TrainingDataset(one_image(path), VIEWS, length=1, seed=0)[0]
        assert item["weak"].shape == (3, 40, 40)
        assert item["valid"].any()


def test_an_extremely_wide_image_passes(tmp_path, one_image):
    image_of(20_000, 20).save(tmp_path / "wide.png")
    item = TrainingDataset(one_image(tmp_path / "wide.png"), VIEWS, length=1, seed=0)[0]
    assert item["strong"].isfinite().all()
    assert item["valid"].any()


def test_refuses_what_it_cannot_do(shapes):
    with pytest.raises(ValueError, match=r"lacks the columns \['mask'\]"):
        TrainingDataset(shapes.remove_columns("mask"), VIEWS, length=7, seed=0, masks=True)
    with pytest.raises(ValueError, match="no images"):
        TrainingDataset(shapes.select([]), VIEWS, length=7, seed=0)
    with pytest.raises(ValueError, match="length"):
        TrainingDataset(shapes, VIEWS, length=0, seed=0)
    with pytest.raises(ValueError, match="seed"):
        TrainingDataset(shapes, VIEWS, length=7, seed=-1)
    with pytest.raises(IndexError):
        TrainingDataset(shapes, VIEWS, length=7, seed=0)[7]
