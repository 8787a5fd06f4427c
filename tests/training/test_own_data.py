"""Training on data that is not in one of the official layouts: folders, streams, and what is broken in them."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from runs_of import assert_equal, summary_of, weights_of
from transformers import AutoConfig

from cosa_hf.data import SHAPES_CLASSES, Views, load_shapes, undecoded
from cosa_hf.data.formats import Reading
from cosa_hf.inference import Segmenter
from cosa_hf.training.checkpoints import Checkpoints
from cosa_hf.training.trainer import train


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six drawn images: five in train, with a table of tags; one in val, with a mask."""
    root = tmp_path / "photos"
    (root / "masks").mkdir(parents=True)
    dataset = load_shapes("train", num_images=6, image_size=48, masks=True)
    names = dataset.features["labels"].feature.names
    lines = ["file_name,labels,mask_file_name,split"]
    for index, row in enumerate(undecoded(dataset)):
        (root / f"{index}.png").write_bytes(row["image"]["bytes"])
        (root / f"masks/{index}.png").write_bytes(row["mask"]["bytes"] if index == 5 else b"never opened")
        tags = ";".join(names[label] for label in row["labels"])
        lines.append(f"{index}.png,{tags},masks/{index}.png,{'val' if index == 5 else 'train'}")
    (root / "metadata.csv").write_text("\n".join(lines))
    return root


@pytest.fixture
def parquet(tmp_path) -> str:
    """The same images without masks, one of them broken and one untagged, as a dataset to stream."""
    dataset = undecoded(load_shapes("train", num_images=8, image_size=48))
    rows = [dict(row) for row in dataset]
    rows[3]["image"] = {"bytes": b"no image", "path": "broken.png"}
    rows[5]["labels"] = []
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    (tmp_path / "parquet").mkdir()
    Dataset.from_dict(columns, features=load_shapes("train", num_images=1).features).to_parquet(
        tmp_path / "parquet/train-00000-of-00001.parquet"
    )
    return str(tmp_path / "parquet")


def test_a_folder_trains_and_is_evaluated_with_its_own_classes(folder, tiny, capsys):
    config = tiny(
        dataset="folder", data_dir=str(folder), train_split="train", eval_split="val", eval_every=2,
        max_steps=2, warmup_steps=1, classes=["train", "boat", "disc", "square", "triangle", "star", "ring", "cross"],
        mask_values=[f"{value}={name}" for value, name in enumerate(["background", *SHAPES_CLASSES])],
    )  # fmt: skip
    model = train(config)
    assert "5 images, 8 classes (train, boat, disc," in capsys.readouterr().out
    labels = AutoConfig.from_pretrained(model).id2label
    assert [labels[index] for index in range(9)] == ["background", *config.classes]
    assert (summary_of(config)["images"], summary_of(config)["unreadable_replaced"]) == (5, [])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (("mask_file_name", "somewhere"), "names no mask for 1 image"),
        ((",val", ",train"), "has no images of split 'val'"),
        (("masks/5.png", "empty.png"), "the masks hold nothing but 0: there is no object to score"),
    ],
)
def test_what_a_run_cannot_be_scored_on_is_said_first_and_it_trains_without(folder, tiny, tmp_path, spoil, reason):
    Image.new("L", (48, 48)).save(folder / "empty.png")
    table = folder / "metadata.csv"
    table.write_text(table.read_text().replace(*spoil))
    settings = {"dataset": "folder", "data_dir": str(folder), "train_split": "train", "max_steps": 2, "warmup_steps": 1}
    with pytest.raises((ValueError, FileNotFoundError), match=f"{reason}.*: to train without, pass --eval_every 0"):
        train(tiny(**settings, eval_every=1))
    assert not (tmp_path / "run").exists()
    train(tiny(**settings, eval_every=0))


def test_a_broken_image_does_not_end_the_run_but_is_listed(folder, tiny, capsys):
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])
    config = tiny(dataset="folder", data_dir=str(folder), train_split="train", warmup_steps=6)
    train(config)
    (problem,) = summary_of(config)["unreadable_replaced"]
    assert f"cannot read the image of image '2' ({folder / '2.png'})" in problem
    assert (
        f"1 images could not be read, others took their places (all in run.json):\n{problem}" in capsys.readouterr().out
    )


def test_a_stream_trains_and_a_resumed_run_equals_the_uninterrupted_one(parquet, tiny, tmp_path, monkeypatch):
    def streamed(name, **fields):
        return tiny(
            dataset="hub", dataset_name=parquet, streaming=True, shuffle_buffer=3, train_split="train",
            output_dir=str(tmp_path / name), checkpoint_every=4, **fields,
        )  # fmt: skip

    uninterrupted = streamed("uninterrupted")
    train(uninterrupted)
    summary = summary_of(uninterrupted)
    assert (summary["images"], summary["untagged_dropped"]) == (None, ["train-00005"])
    assert "cannot read the image of image 'train-00003' (broken.png)" in summary["unreadable_replaced"][0]

    save = Checkpoints.save

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(streamed("broken"))
    monkeypatch.setattr(Checkpoints, "save", save)
    resumed = streamed("broken", resume=True)
    train(resumed)
    assert summary_of(resumed) | {"seconds": 0} == summary | {"seconds": 0}
    assert_equal(weights_of(uninterrupted), weights_of(resumed))


def test_streaming_is_for_tags_of_the_hub(tiny):
    with pytest.raises(ValueError, match="streaming is for training on the tags of dataset hub, got dataset voc"):
        tiny(dataset="voc", streaming=True)
    with pytest.raises(ValueError, match="supervision masks"):
        tiny(dataset="hub", streaming=True, supervision="masks")


@pytest.fixture
def deep_folder(tmp_path) -> Path:
    """Six images of 12 bits in 16, of one class."""
    root = tmp_path / "deep"
    (root / "thing").mkdir(parents=True)
    for number in range(6):
        values = np.random.default_rng(number).integers(0, 4096, (48, 48), dtype=np.uint16)
        Image.fromarray(values).save(root / f"thing/{number}.tif")
    return root


def test_prediction_sees_what_training_saw(deep_folder, tiny, capsys, monkeypatch):
    weak = []
    views = Views.__call__
    monkeypatch.setattr(Views, "__call__", lambda self, image, *more: weak.append(image) or views(self, image, *more))
    config = tiny(dataset="folder", data_dir=str(deep_folder), train_split="train", max_steps=3, warmup_steps=1)
    model = train(config)
    assert "values of more than 8 bits in 6 images looked at: --value_range 2 4094" in capsys.readouterr().out
    segmenter = Segmenter.from_pretrained(model, device="cpu")
    assert segmenter.reading == Reading((2.0, 4094.0))
    assert "--value_range" not in capsys.readouterr().err
    seen = [np.asarray(segmenter(path).image) for path in sorted((deep_folder / "thing").iterdir())]
    assert seen[0].max() == 255
    for image in weak:
        assert any(np.array_equal(image, one) for one in seen)


def test_a_resumed_run_reads_photos_as_before(folder, tiny):
    options = {"dataset": "folder", "data_dir": str(folder), "train_split": "train", "warmup_steps": 1}
    train(tiny(max_steps=2, checkpoint_every=1, **options))
    advice = "to go on as before, restore the images, without --value_range and --bands"
    with pytest.raises(ValueError, match=advice):
        train(tiny(max_steps=3, resume=True, bands=[3, 2, 1], **options))
    train(tiny(max_steps=3, resume=True, **options))


def test_a_resumed_run_keeps_its_value_range(deep_folder, tiny):
    options = {"dataset": "folder", "data_dir": str(deep_folder), "train_split": "train", "warmup_steps": 1}
    train(tiny(max_steps=2, checkpoint_every=1, **options))
    Image.fromarray(np.full((48, 48), 60000, np.uint16)).save(deep_folder / "thing/0.tif")
    more = tiny(max_steps=3, resume=True, **options)
    with pytest.raises(ValueError, match=r"to go on as before, pass --value_range 2\.0 4094\.0"):
        train(more)
    train(tiny(max_steps=3, resume=True, value_range=["2.0", "4094.0"], **options))
