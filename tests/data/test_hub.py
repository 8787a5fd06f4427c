"""Any dataset that `load_dataset` loads, here from parquet files on disk."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from datasets.table import embed_table_storage
from images_of import image_of
from PIL import Image

from cosa_hf.data import DatasetOptions, class_names, load_hub, read_image, read_mask, stream_hub, undecoded
from cosa_hf.data.palette import to_palette_image
from cosa_hf.data.tags import tag_features

PETS = ClassLabel(names=["owl", "cat", "dog"])


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def parquet(tmp_path):
    """Writes columns as a directory of parquet files and returns the options to read it with."""

    def write(labels: list, feature, images: list | None = None, files: int = 1, **more) -> DatasetOptions:
        images = images or [image_of(10 + number, 8) for number in range(len(labels))]
        columns = {"photo": [_png(image) for image in images], "kind": labels}
        features = {"photo": ImageFeature(), "kind": feature}
        for name, (values, value_feature) in more.items():
            columns[name], features[name] = values, value_feature
        dataset = Dataset.from_dict(columns, features=Features(features))
        root = tmp_path / f"pets{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        for index in range(files):
            part = dataset.shard(files, index, contiguous=True)
            part.to_parquet(root / f"train-{index:05d}-of-{files:05d}.parquet")
        return DatasetOptions(dataset_name=str(root), image_column="photo", label_column="kind")

    return write


def _png(image) -> dict | None:
    if image is None or isinstance(image, bytes):
        return image and {"bytes": image, "path": None}
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("values", "feature", "names", "labels"),
    [
        ([1, 0, -1, None], PETS, ["owl", "cat", "dog"], [[1], [0], [], []]),
        ([[2, 1], [], [0], None], List(PETS), ["owl", "cat", "dog"], [[1, 2], [], [0], []]),
        (["owl", "dog; cat ", "", None], Value("string"), ["cat", "dog", "owl"], [[2], [0, 1], [], []]),
        ([["owl"], ["dog", "cat"], [], None], List(Value("string")), ["cat", "dog", "owl"], [[2], [0, 1], [], []]),
    ],
)
def test_every_kind_of_label_column(parquet, values, feature, names, labels):
    dataset = load_hub(parquet(values, feature), "train")
    assert dataset.features == tag_features(names)
    assert dataset["labels"][:] == labels
    assert dataset["image_id"][:] == ["00000000", "00000001", "00000002", "00000003"]
    assert [image.size for image in dataset["image"]] == [(10, 8), (11, 8), (12, 8), (13, 8)]


@pytest.mark.parametrize(
    ("values", "feature"),
    [([1, 0, 2], PETS), ([[2, 1], [0], [1]], List(PETS)), (["owl", "cat,dog", "dog"], Value("string"))],
)
def test_a_stream_has_the_same_rows(parquet, values, feature):
    options = parquet(values, feature, image_id=(["x", "y", "z/1"], Value("string")))
    options.classes = ["owl", "cat", "dog"]
    rows = list(undecoded(stream_hub(options, "train")))
    loaded = load_hub(options, "train")
    assert loaded["image_id"][:] == ["x", "y", "z_1"]
    # Whether any row is a true negative shows only at the end of a stream.
    assert stream_hub(options, "train").features == tag_features(options.classes, negatives=True)
    assert class_names(stream_hub(options, "train")) == ["owl", "cat", "dog"]
    assert [(row["image_id"], row["labels"]) for row in rows] == list(
        zip(["x", "y", "z_1"], loaded["labels"][:], strict=True)
    )
    for row, expected in zip(rows, undecoded(loaded), strict=True):
        assert np.array_equal(read_image(row), read_image(expected))


def test_masks_and_ids(parquet):
    masks = [_png(to_palette_image(np.full((8, 10 + n), n))) for n in range(2)]
    options = parquet([0, 1], PETS, annotation=(masks, ImageFeature()), image_id=([7, 8], Value("int64")))
    options.mask_column = "annotation"
    dataset = load_hub(options, "train", masks=True)
    assert dataset.features == tag_features(PETS.names, masks=True)
    assert dataset["image_id"][:] == ["7", "8"]
    rows = list(undecoded(dataset))
    assert [np.unique(read_mask(row, read_image(row).size, 3)).tolist() for row in rows] == [[0], [1]]


def test_a_stream_never_opens_a_mask(parquet):
    masks = [{"bytes": b"no mask", "path": None}] * 2
    options = parquet([0, 1], PETS, mask=(masks, ImageFeature()))
    rows = list(undecoded(stream_hub(options, "train")))
    assert [sorted(row) for row in rows] == [["image", "image_id", "labels", "negative"]] * 2


def test_classes_of_the_dataset_cannot_be_renumbered(parquet):
    options = parquet([0, 1], PETS)
    options.classes = ["cat", "dog", "owl"]
    with pytest.raises(ValueError, match=r"has the classes \['owl', 'cat', 'dog'\], in this order"):
        load_hub(options, "train")


def test_what_cannot_be_read_is_named(parquet, tmp_path):
    options = parquet(["owl", "Cat"], Value("string"), number=([1.0, 2.0], Value("float64")))
    with pytest.raises(ValueError, match=r"no column 'mask': pass --mask_column.*photo: Image"):
        load_hub(options, "train", masks=True)
    with pytest.raises(ValueError, match=r"no column 'image': pass --image_column.*kind: Value"):
        load_hub(DatasetOptions(dataset_name=options.dataset_name, label_column="kind"), "train")
    with pytest.raises(ValueError, match=r"column 'kind' of .* is Value.*, not Image"):
        load_hub(DatasetOptions(dataset_name=options.dataset_name, image_column="kind", label_column="kind"), "train")
    with pytest.raises(ValueError, match=r"column 'number'.*expected ClassLabel, text"):
        load_hub(
            DatasetOptions(dataset_name=options.dataset_name, image_column="photo", label_column="number"), "train"
        )
    with pytest.raises(ValueError, match="train"):
        load_hub(options, "validation")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_hub(DatasetOptions(dataset_name=str(tmp_path / "nowhere")), "train")
    with pytest.raises(FileNotFoundError, match="some/where"):
        load_hub(DatasetOptions(dataset_name="some/where"), "train")
    with pytest.raises(ValueError, match="needs --classes"):
        stream_hub(options, "train")
    options.classes = ["owl", "cat"]
    with pytest.raises(ValueError, match=r"'Cat' \(did you mean 'cat'\?\) of 1 image \(00000001\)"):
        load_hub(options, "train")
    twice = parquet([0, 1], PETS, image_id=(["a", "a"], Value("string")))
    with pytest.raises(ValueError, match=r"1 image_id \(a\) more than once"):
        load_hub(twice, "train")


@pytest.mark.parametrize(
    ("options", "advice", "followed"),
    [
        ({}, "no column 'image': pass --image_column", {"image_column": "photo", "label_column": "kind"}),
        ({"image_column": "photo"}, "no column 'labels': pass --label_column", {"label_column": "kind"}),
        ({"image_column": "photo", "label_column": "number"}, "pass another --label_column", {"label_column": "kind"}),
        (
            {"image_column": "photo", "label_column": "kind", "classes": ["cat"]},
            r"leave out --classes \(got \['cat'\]\)",
            {"classes": None},
        ),
        (
            {"image_column": "photo", "label_column": "kind", "masks": True},
            "no column 'mask': pass --mask_column",
            {"mask_column": "annotation"},
        ),
    ],
)
def test_what_an_error_advises_of_columns_works(parquet, options, advice, followed):
    masks = [_png(to_palette_image(np.full((8, 10 + n), n))) for n in range(2)]
    more = {"annotation": (masks, ImageFeature()), "number": ([1.0, 2.0], Value("float64"))}
    name, masks = parquet([0, 1], PETS, **more).dataset_name, options.pop("masks", False)
    with pytest.raises(ValueError, match=advice):
        load_hub(DatasetOptions(dataset_name=name, **options), "train", masks)
    assert len(load_hub(DatasetOptions(dataset_name=name, **options | followed), "train", masks)) == 2


def test_what_an_error_advises_of_values_works(parquet):
    """Each time the same rows, written as the error says."""
    with pytest.raises(ValueError, match=r"expected ClassLabel, text, or a list of one of them; .* or cast it"):
        load_hub(parquet([0.0, 1.0], Value("float64")), "train")
    assert load_hub(parquet([0, 1], PETS), "train")["labels"][:] == [[0], [1]]
    ids = (["a", "a"], Value("string"))
    with pytest.raises(ValueError, match=r"1 image_id \(a\) more than once: rename that column"):
        load_hub(parquet([0, 1], PETS, image_id=ids), "train")
    assert load_hub(parquet([0, 1], PETS, camera=ids), "train")["image_id"][:] == ["00000000", "00000001"]
    options = parquet(["owl", "cat"], Value("string"))
    with pytest.raises(ValueError, match="holds text: a stream needs --classes"):
        stream_hub(options, "train")
    options.classes = ["cat", "owl"]
    assert [row["labels"] for row in undecoded(stream_hub(options, "train"))] == [[1], [0]]


def test_a_path_that_is_a_pattern_is_named_and_can_be_renamed(parquet, tmp_path):
    options = parquet(["owl"], Value("string"))
    brackets = tmp_path / "pets [1]"
    Path(options.dataset_name).rename(brackets)
    options.dataset_name = str(brackets)
    with pytest.raises(ValueError, match=r"takes \[ \] in '.*pets \[1\]' for a pattern: rename the directory"):
        load_hub(options, "train")
    brackets.rename(tmp_path / "pets 1")
    options.dataset_name = str(tmp_path / "pets 1")
    assert load_hub(options, "train")["labels"][:] == [[0]]


def test_ids_too_long_and_text_that_is_no_tag(parquet):
    options = parquet(["owl"], Value("string"), image_id=(["x/" * 200], Value("string")))
    with pytest.raises(ValueError, match="has 400 bytes, and files are named by it: at most 240"):
        load_hub(options, "train")
    options = parquet(["owl", "['owl' 'cat']"], Value("string"))
    with pytest.raises(ValueError, match=r"image '00000001': .* is not a tag: it has brackets"):
        load_hub(options, "train")
    options = parquet(["owl", "['owl', 'cat']"], Value("string"))
    assert load_hub(options, "train")["labels"][:] == [[1], [0, 1]]


def test_a_row_with_an_unknown_tag_does_not_stop_a_stream(parquet, caplog):
    options = parquet(["owl", "Cat", "cat"], Value("string"), image_id=(["x", "y", "z"], Value("string")))
    options.classes = ["owl", "cat"]
    assert [row["labels"] for row in undecoded(stream_hub(options, "train"))] == [[0], [], [1]]
    assert "'Cat' (did you mean 'cat'?) of 1 image (y)" in caplog.text


def test_ids_of_a_stream_do_not_depend_on_the_order(parquet):
    options = parquet([0, 1, 2, 0], PETS, files=2)
    rows = list(undecoded(stream_hub(options, "train")))
    assert len({row["image_id"] for row in rows}) == 4
    shuffled = list(undecoded(stream_hub(options, "train").shuffle(seed=1, buffer_size=4)))
    assert {(row["image_id"], tuple(row["labels"])) for row in rows} == {
        (row["image_id"], tuple(row["labels"])) for row in shuffled
    }


def _palette_masks(size):
    ids = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[1], size[0]) % 3
    return to_palette_image(ids)


@pytest.mark.parametrize("variant", ["disk", "parquet", "stream"])
def test_what_is_saved_comes_back_identical(variant, tmp_path):
    """As after push_to_hub, which writes parquet: features, file contents, palettes."""
    for name in ("a", "b"):
        image_of(12, 9).save(tmp_path / f"{name}.jpg")
        _palette_masks((12, 9)).save(tmp_path / f"{name}_mask.png")
    columns = {
        "image": [str(tmp_path / f"{name}.jpg") for name in ("a", "b")],
        "labels": [[0, 1], []],
        "image_id": ["a", "b"],
        "mask": [str(tmp_path / f"{name}_mask.png") for name in ("a", "b")],
    }
    dataset = Dataset.from_dict(columns, features=tag_features(["cat", "dog"], masks=True))
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if variant == "disk":
        dataset.save_to_disk(tmp_path / "saved")
    else:
        (tmp_path / "saved").mkdir()
        # to_parquet writes the paths of files; push_to_hub embeds their contents first, like this.
        embedded = dataset.with_format("arrow").map(embed_table_storage, batched=True, keep_in_memory=True)
        embedded.with_format(None).to_parquet(tmp_path / "saved/train-00000-of-00001.parquet")
    for name in contents:
        (tmp_path / name).unlink()

    options = DatasetOptions(dataset_name=str(tmp_path / "saved"))
    saved = tmp_path / "saved"
    back = datasets.load_from_disk(saved) if variant == "disk" else load_hub(options, "train", masks=True)
    assert back.features == dataset.features
    rows = list(undecoded(back))
    assert [(row["image_id"], row["labels"]) for row in rows] == [("a", [0, 1]), ("b", [])]
    for row in rows:
        assert row["mask"]["bytes"] == contents[f"{row['image_id']}_mask.png"]
        assert row["image"]["bytes"] == contents[f"{row['image_id']}.jpg"]
        mask = Image.open(io.BytesIO(row["mask"]["bytes"]))
        assert mask.mode == "P"
        assert mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    if variant == "stream":
        streamed = list(undecoded(stream_hub(options, "train")))
        assert [row["image"]["bytes"] for row in streamed] == [row["image"]["bytes"] for row in rows]
        assert [row["image_id"] for row in streamed] == ["a", "b"]
