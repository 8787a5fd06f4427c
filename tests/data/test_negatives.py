"""Images verified to show none of the classes, from every reader to the items of training."""

import io

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from images_of import image_of

from cosa_hf.data import (
    DatasetOptions,
    TrainingDataset,
    Views,
    load_folder,
    load_hub,
    stream_hub,
    streaming_loader,
    without_untagged,
)
from cosa_hf.data.check import check_splits, format_findings
from cosa_hf.data.encoded import EncodedDataset

VIEWS = Views(16, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def photos(tmp_path):
    """A tagged photo, one without any of the classes, and one that nobody looked at."""
    root = tmp_path / "photos"
    root.mkdir()
    for number, name in enumerate(("crack", "sound", "unseen")):
        image_of(20 + number, 16).save(root / f"{name}.png")
    (root / "metadata.csv").write_text("file_name,labels\ncrack.png,crack\nsound.png, - \nunseen.png,\n")
    return root


@pytest.fixture
def parquet(tmp_path):
    buffer = io.BytesIO()
    image_of(16, 16).save(buffer, "PNG")
    rows = {"image": [{"bytes": buffer.getvalue()}] * 3, "labels": ["crack", "-", ""], "image_id": list("abc")}
    features = Features({"image": Image(), "labels": Value("string"), "image_id": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub/train.parquet")
    return DatasetOptions(dataset_name=str(tmp_path / "hub"), classes=["crack"])


def test_a_folder_tells_them_from_untagged_images(photos):
    dataset = load_folder(photos)
    assert dataset.features["labels"].feature.names == ["crack"]
    assert dataset["labels"][:] == [[0], [], []]
    assert dataset["negative"][:] == [False, True, False]


def test_a_sub_folder_of_them(tmp_path):
    for tag in ("crack", "-"):
        (tmp_path / tag).mkdir()
        image_of(8, 8).save(tmp_path / tag / "a.png")
    dataset = load_folder(tmp_path)
    assert dict(zip(dataset["image_id"], dataset["negative"], strict=True)) == {"crack_a": False, "-_a": True}


def test_without_any_the_columns_are_what_they_were(photos):
    (photos / "metadata.csv").write_text("file_name,labels\ncrack.png,crack\nsound.png,hair-line\nunseen.png,\n")
    dataset = load_folder(photos)
    assert dataset.column_names == ["image", "labels", "image_id"]
    assert dataset["labels"][:] == [[0], [1], []]


def test_the_mark_beside_tags_is_refused_and_either_advice_works(photos):
    table = photos / "metadata.csv"
    table.write_text("file_name,labels\ncrack.png,crack; -\nsound.png,crack\nunseen.png,\n")
    with pytest.raises(ValueError, match=r"1 image \(crack.png\): '-' says .* stands beside tags: remove one"):
        load_folder(photos)
    for kept in ("crack", "-"):
        table.write_text(table.read_text().replace("crack; -", kept))
        load_folder(photos)
        table.write_text(table.read_text().replace(f"crack.png,{kept}", "crack.png,crack; -"))


def test_training_keeps_them_with_a_vector_of_zeros(photos):
    dataset, untagged = without_untagged(load_folder(photos))
    assert (dataset["image_id"][:], untagged) == (["crack", "sound"], ["unseen"])
    items = TrainingDataset(dataset, VIEWS, length=2, seed=0)
    assert {item["image_id"]: item["labels"].tolist() for item in items} == {"crack": [1.0], "sound": [0.0]}


def test_their_features_are_items_too(photos):
    dataset, _ = without_untagged(load_folder(photos))
    maps = {"features": torch.zeros(2, 4, 1, 1)}
    items = EncodedDataset(dataset, lambda key: maps, ["a", "b"], size=16, length=2, seed=0)
    assert {item["image_id"]: item["labels"].tolist() for item in items} == {"crack": [1.0], "sound": [0.0]}


def test_they_alone_are_nothing_to_train_on(photos):
    (photos / "metadata.csv").write_text("file_name,labels\ncrack.png,-\nsound.png,-\nunseen.png,\n")
    with pytest.raises(ValueError, match="none of the 3 images has a tag"):
        without_untagged(load_folder(photos, classes=["crack"]))


def test_a_dataset_of_the_hub_has_them_too(parquet):
    dataset = load_hub(parquet, "train")
    assert dataset["negative"][:] == [False, True, False]
    assert without_untagged(dataset)[1] == ["c"]


def test_what_a_folder_says_of_them_comes_back_from_disk(photos, tmp_path):
    load_folder(photos).to_parquet(tmp_path / "saved/train.parquet")
    again = load_hub(DatasetOptions(dataset_name=str(tmp_path / "saved")), "train")
    assert again["negative"][:] == [False, True, False]
    streamed = stream_hub(DatasetOptions(dataset_name=str(tmp_path / "saved")), "train")
    assert [row["negative"] for row in streamed] == [False, True, False]


def test_a_stream_takes_them(parquet):
    untagged: list[str] = []
    loader = streaming_loader(
        stream_hub(parquet, "train"), VIEWS, length=2, seed=0, batch_size=2, untagged=untagged, shuffle_buffer=1
    )
    (batch,) = loader
    assert dict(zip(batch["image_id"], batch["labels"].tolist(), strict=True)) == {"a": [1.0], "b": [0.0]}
    assert torch.is_tensor(batch["weak"])


def test_check_counts_and_names_them(photos):
    found = check_splits({"train": load_folder(photos)}, progress=False)
    assert found.notes == {"negative": ["train: sound"]}
    assert found.warnings["untagged"] == ["train: unseen"]
    assert "note  negative, 1: marked as showing none of the classes" in format_findings(found)
