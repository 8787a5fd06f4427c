import io
import json

import numpy as np
import pytest
from datasets import Dataset
from images_of import image_of
from PIL import Image

from cosa_hf.data import load_folder, load_shapes
from cosa_hf.data.check import ADVICE, check_splits, format_findings
from cosa_hf.data.tags import tag_features


@pytest.fixture
def folder(tmp_path):
    """Two splits with masks, all in order: three images with cats, one with a dog."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        rows = []
        for number, tag in enumerate(("cat", "dog")):
            image_of(8 + number + 2 * (split == "val"), 8).save(tmp_path / split / f"{tag}.png")
            ids = np.zeros((8, 8 + number + 2 * (split == "val")), np.uint8)
            ids[:4] = number + 1
            ids[4] = 255
            Image.fromarray(ids).save(tmp_path / split / f"{tag}_mask.png")
            rows.append({"file_name": f"{tag}.png", "labels": [tag], "mask_file_name": f"{tag}_mask.png"})
        _write(tmp_path / split, rows)
    return tmp_path


def _write(directory, rows) -> None:
    (directory / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metadata.jsonl").read_text().splitlines()]


def check(folder, masks=True):
    return check_splits({split: load_folder(folder, split, masks) for split in ("train", "val")}, progress=False)


def test_no_errors(folder):
    found = check(folder)
    assert not found.errors
    assert set(found.warnings) == {"few images"}
    assert found.images == {"train": 2, "val": 2}
    assert found.class_counts == {"train": {"cat": 1, "dog": 1}, "val": {"cat": 1, "dog": 1}}
    assert "no errors" in format_findings(found)


def test_workers_make_no_difference():
    splits = {"train": load_shapes("train", num_images=40, masks=True)}
    assert check_splits(splits, num_workers=1, progress=False) == check_splits(splits, progress=False)


@pytest.mark.parametrize("damage", ["truncated", "no image", "gone"])
def test_broken_files(folder, damage):
    path = folder / "train/cat.png"
    content = path.read_bytes()
    splits = {"train": load_folder(folder, "train")}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:100] if damage == "truncated" else b"hello")
    found = check_splits(splits, progress=False)
    assert list(found.errors) == ["unreadable"]
    (problem,) = found.errors["unreadable"]
    assert "train: cannot read the image of image 'cat'" in problem


def _tag(folder, **labels):
    """Other tags for images of the split train; of none, their rows are removed."""
    rows = [row | {"labels": labels.get(row["file_name"][:-4], row["labels"])} for row in _rows(folder / "train")]
    _write(folder / "train", [row for row in rows if row["labels"]])


def _copy(folder, source, target):
    (folder / target).write_bytes((folder / source).read_bytes())


def _fill(folder, ids):
    Image.fromarray(np.full((8, 8), ids, np.uint8)).save(folder / "train/cat_mask.png")


def _frames(folder, number):
    image = image_of(8, 8)
    image.save(folder / "train/cat.png", save_all=True, append_images=[image_of(8, 9).resize((8, 8))][:number])


def _replace(folder):
    image_of(8, 8).save(folder / "train/cat.png")


def _rename(folder, old, new):
    for split in ("train", "val"):
        renamed = [
            row | {"labels": [new if tag == old else tag for tag in row["labels"]]} for row in _rows(folder / split)
        ]
        _write(folder / split, renamed)


@pytest.mark.parametrize(
    ("kind", "spoil", "advised"),
    [
        (
            "unreadable",
            lambda at: (at / "train/cat.png").write_bytes(b"hello"),
            [_replace, lambda at: _tag(at, cat=[])],
        ),
        ("mask", lambda at: _fill(at, 7), [lambda at: _fill(at, 1)]),
        (
            "contradiction",
            lambda at: _copy(at, "train/cat.png", "train/dog.png"),
            [lambda at: _tag(at, dog=["cat"]), lambda at: _tag(at, cat=["cat", "dog"], dog=["cat", "dog"]),
             lambda at: _tag(at, dog=[])],
        ),
        ("leak", lambda at: _copy(at, "train/cat.png", "val/cat.png"), [lambda at: _tag(at, cat=[])]),
        ("missing tag", lambda at: _fill(at, 2), [lambda at: _tag(at, cat=["cat", "dog"]), lambda at: _fill(at, 1)]),
        (
            "missing pixels",
            lambda at: _tag(at, cat=["cat", "dog"]),
            [lambda at: _fill(at, [[1] * 8] * 4 + [[2] * 8] * 4), lambda at: _tag(at, cat=["cat"])],
        ),
        ("several", lambda at: _frames(at, 1), [lambda at: _frames(at, 0)]),
        ("dark", lambda at: Image.new("RGB", (8, 8)).save(at / "train/cat.png"), [_replace]),
        ("number", lambda at: _rename(at, "cat", "7"), [lambda at: _rename(at, "7", "cat")]),
    ],
)  # fmt: skip
def test_what_is_found_is_gone_when_its_advice_is_followed(folder, kind, spoil, advised):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    masks = kind not in ("contradiction", "leak")  # the copies do not fit their masks
    for follow in advised:
        kinds = []
        for change in (spoil, follow):
            change(folder)
            found = check(folder, masks)
            kinds.append(found.errors.keys() | found.warnings.keys())
        assert kind in kinds[0], ADVICE[kind]
        assert kind not in kinds[1], ADVICE[kind]
        for path, content in before.items():
            path.write_bytes(content)


def test_masks_that_cannot_be_used(folder):
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(folder / "train/cat_mask.png")
    Image.fromarray(np.zeros((8, 3), np.uint8)).save(folder / "val/dog_mask.png")
    found = check(folder)
    assert list(found.errors) == ["mask"]
    assert "mask of image 'cat' holds the ids [7]" in found.errors["mask"][0]
    assert "mask of image 'dog' is 3x8" in found.errors["mask"][1]
    assert not check(folder, masks=False).errors


def test_masks_and_tags_that_disagree(folder):
    rows = _rows(folder / "train")
    rows[0]["labels"], rows[1]["labels"] = ["cat", "dog"], []
    _write(folder / "train", rows)
    found = check(folder)
    assert found.warnings["missing pixels"] == ["train: cat: dog"]
    assert found.warnings["missing tag"] == ["train: dog: dog"]
    assert found.warnings["untagged"] == ["train: dog"]
    assert not found.errors


def test_equal_images(folder):
    rows = _rows(folder / "train")
    for name, tag in (("again", "cat"), ("other", "dog")):
        (folder / f"train/{name}.png").write_bytes((folder / "train/cat.png").read_bytes())
        rows.append({"file_name": f"{name}.png", "labels": [tag]})
    (folder / "val/leak.png").write_bytes((folder / "train/dog.png").read_bytes())
    _write(folder / "val", [*_rows(folder / "val"), {"file_name": "leak.png", "labels": ["dog"]}])
    _write(folder / "train", rows[:-1])
    found = check(folder, masks=False)
    assert found.warnings["duplicate"] == ["train: cat [cat] = train: again [cat]"]
    assert found.errors == {"leak": ["train: dog [dog] = val: leak [dog]"]}
    _write(folder / "train", rows)
    found = check(folder, masks=False)
    assert found.errors["contradiction"] == ["train: cat [cat] = train: again [cat] = train: other [dog]"]
    assert "duplicate" not in found.warnings


def test_a_row_without_an_image_is_empty():
    features = tag_features(["cat", "dog"])
    columns = {"image": [{"bytes": _png(), "path": None}, None], "labels": [[0], [1]], "image_id": ["a", "b"]}
    found = check_splits({"train": Dataset.from_dict(columns, features=features)}, progress=False)
    assert found.errors == {"unreadable": ["train: image 'b' has no picture: the row is empty; remove it"]}
    whole = Dataset.from_dict({name: cells[:1] for name, cells in columns.items()}, features=features)
    assert not check_splits({"train": whole}, progress=False).errors


def test_classes_that_may_be_something_else():
    features = tag_features(["haze", "haze primary", "primary", "3"])
    columns = {"image": [{"bytes": _png(), "path": None}], "labels": [[0]], "image_id": ["a"]}
    found = check_splits({"train": Dataset.from_dict(columns, features=features)}, progress=False)
    assert found.warnings["combined"] == ["class 'haze primary': haze + primary"]
    assert found.warnings["number"] == ["class '3'"]


@pytest.mark.parametrize(("advised", "dogs"), [("find more", 20), ("take the tag off them", 0)])
def test_few_images_are_said_until_there_are_more_or_none(advised, dogs, tmp_path):
    assert advised in ADVICE["few images"]
    for number in range(40):
        image_of(8 + number, 8).save(tmp_path / f"{number}.png")

    def found_with(dogs):
        tags = ["cat"] * 20 + ["dog"] * dogs + [""] * (20 - dogs)
        lines = [f"{number}.png,{tag}\n" for number, tag in enumerate(tags)]
        (tmp_path / "metadata.csv").write_text("file_name,labels\n" + "".join(lines))
        return check_splits({"train": load_folder(tmp_path)}, progress=False)

    assert found_with(19).warnings["few images"] == ["class 'dog': 19"]
    found = found_with(dogs)
    assert not found.errors
    assert "few images" not in found.warnings


def test_splits_must_have_the_same_classes():
    with pytest.raises(ValueError, match=r"split 'val' has the classes .*: give both the same --classes"):
        check_splits({"train": load_shapes("train", num_images=1), "val": _cats()}, progress=False)


def test_splits_are_given_the_same_classes_as_the_error_says(folder):
    places = {"train": folder / "train", "val": folder / "val"}
    _tag(folder, dog=[])
    with pytest.raises(ValueError, match="give both the same --classes"):
        check_splits({split: load_folder(place) for split, place in places.items()}, progress=False)
    classes = ["cat", "dog"]
    check_splits({split: load_folder(place, classes=classes) for split, place in places.items()}, progress=False)


def _png():
    buffer = io.BytesIO()
    image_of(4, 4).save(buffer, "PNG")
    return buffer.getvalue()


def _cats():
    columns = {"image": [{"bytes": _png(), "path": None}], "labels": [[0]], "image_id": ["a"]}
    return Dataset.from_dict(columns, features=tag_features(["cat"]))


def test_every_kind_is_explained_and_long_lists_are_counted(folder):
    found = check(folder)
    for kind in ADVICE:
        found.errors[kind] = [f"image {number}" for number in range(12)]
    text = format_findings(found, shown=10)
    assert text.count("... and 2 more") == len(ADVICE)
    assert all(advice in text for advice in ADVICE.values())
