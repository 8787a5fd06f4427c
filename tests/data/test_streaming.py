import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset

from cosa_hf.data import Views, load_shapes, streaming_loader, undecoded
from cosa_hf.data.tags import tag_features

VIEWS = Views(24, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def rows_of(dataset: Dataset, shards: int = 1):
    return undecoded(dataset).to_iterable_dataset(num_shards=shards)


@pytest.fixture(scope="module")
def shapes():
    return load_shapes("train", num_images=11, image_size=24)


def loader_of(dataset, length=33, shards=1, **options):
    settings = {"seed": 3, "batch_size": 3, "shuffle_buffer": 4, "num_workers": 0} | options
    return streaming_loader(rows_of(dataset, shards), VIEWS, length, **settings)


def ids(loader) -> list[str]:
    return [image_id for batch in loader for image_id in batch["image_id"]]


def _assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name], name


def test_every_row_once_an_epoch_in_changing_order(shapes):
    order = ids(loader_of(shapes, shards=2))
    epochs = [order[:11], order[11:22], order[22:]]
    assert all(set(epoch) == set(shapes["image_id"]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert ids(loader_of(shapes, shards=2, seed=4)) != order


def test_items_are_those_of_a_training_stream(shapes):
    batch = next(iter(loader_of(shapes)))
    assert set(batch) == {"weak", "strong", "valid", "labels", "image_id", "unreadable"}
    assert batch["weak"].shape == (3, 3, 24, 24)
    tags = dict(zip(shapes["image_id"], shapes["labels"], strict=True))
    for image_id, labels in zip(batch["image_id"], batch["labels"], strict=True):
        assert labels.nonzero().flatten().tolist() == tags[image_id]


def test_views_differ_from_epoch_to_epoch():
    batches = list(loader_of(load_shapes("train", num_images=1, image_size=24), length=4, batch_size=1))
    assert all(not torch.equal(batches[0]["weak"], batch["weak"]) for batch in batches[1:])


def test_workers_make_no_difference(shapes):
    for alone, shared in zip(loader_of(shapes), loader_of(shapes, num_workers=1), strict=True):
        _assert_equal(alone, shared)


@pytest.mark.parametrize("shards", [1, 2])
def test_processes_share_the_rows(shapes, shards):
    first, second = (set(ids(loader_of(shapes, 5, shards, batch_size=1, process=(index, 2)))) for index in (0, 1))
    assert not first & second
    assert len(first | second) == 10


def test_processes_take_turns_in_the_positions(shapes):
    loaders = [loader_of(shapes, length=3, process=(index, 2)) for index in (0, 1)]
    assert [[position for position, _ in loader.sampler] for loader in loaders] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("skipped", [1, 7])
def test_a_resumed_run_goes_on_where_it_was(shapes, skipped):
    """As the training loop does it: prepared for one process, then the first batches skipped."""
    whole = list(loader_of(shapes))
    prepared = prepare_data_loader(loader_of(shapes), torch.device("cpu"), num_processes=1, process_index=0)
    rest = list(skip_first_batches(prepared, skipped))
    assert len(rest) == len(whole) - skipped
    for expected, resumed in zip(whole[skipped:], rest, strict=True):
        _assert_equal(expected, resumed)


def _with_bad_rows(shapes) -> Dataset:
    rows = [dict(row) for row in undecoded(shapes)]
    rows[4]["image"] = {"bytes": b"no image", "path": None}
    rows[5]["image"] = None
    rows[6]["image"]["bytes"] = rows[6]["image"]["bytes"][:80]
    rows[8]["labels"] = []
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Dataset.from_dict(columns, features=tag_features(shapes.features["labels"].feature.names))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_rows_in_the_middle_are_replaced_or_left_out_and_named(shapes, workers):
    untagged: list[str] = []
    batches = list(loader_of(_with_bad_rows(shapes), length=30, untagged=untagged, num_workers=workers))
    assert untagged == ["train-00008"]
    unreadable = {problem for batch in batches for problem in batch["unreadable"] if problem}
    assert len(unreadable) == 3
    assert all(any(f"'train-0000{n}'" in problem for problem in unreadable) for n in (4, 5, 6))
    seen = [image_id for batch in batches for image_id in batch["image_id"]]
    assert len(seen) == 30
    assert not {"train-00004", "train-00005", "train-00006", "train-00008"} & set(seen)
    assert seen.count("train-00000") == 3 + 3 * 3, "in every epoch itself and in the place of three others"


def test_a_loader_that_is_read_again_names_untagged_rows_once(shapes):
    untagged: list[str] = []
    loader = loader_of(_with_bad_rows(shapes), length=15, untagged=untagged)
    assert ids(loader) == ids(loader)
    assert untagged == ["train-00008"]


def test_nothing_to_train_on_is_known_before_the_first_step(shapes):
    images = [{"bytes": b"no image", "path": None}] * 2
    features = tag_features(["cat"])
    bad = Dataset.from_dict({"image": images, "labels": [[0], [0]], "image_id": ["a", "b"]}, features=features)
    with pytest.raises(ValueError, match=r"none of the first 100 rows.*cannot read the image of image 'b'"):
        loader_of(bad)
    rows = [row | {"labels": []} for row in undecoded(shapes)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    with pytest.raises(ValueError, match="image 'train-00010' has no tag"):
        loader_of(Dataset.from_dict(columns, features=shapes.features))


def test_the_global_random_state_is_left_alone(shapes):
    loader = loader_of(shapes)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader.dataset[0, next(iter(rows_of(shapes)))]
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
