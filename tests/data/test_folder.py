import csv
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from images_of import image_of
from PIL import Image

from cosa_hf.data import class_names, load_folder, read_image, read_mask, undecoded, without_untagged
from cosa_hf.data.folder import unnamed_images

TAGS = {"a.jpg": ["dog", "cat"], "b.png": ["cow"], "c.jpg": []}


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of three images, without any tags yet."""
    root = tmp_path / "photos"
    root.mkdir()
    for number, name in enumerate(TAGS):
        image_of(20 + number, 10).save(root / name)
    return root


def jsonl(root: Path, rows: list[dict]) -> Path:
    path = root / "metadata.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(dataset) -> dict[str, list[str]]:
    names = class_names(dataset)
    return {row["image_id"]: [names[label] for label in row["labels"]] for row in undecoded(dataset)}


EXPECTED = {"a": ["cat", "dog"], "b": ["cow"], "c": []}


def test_jsonl_with_lists(photos):
    jsonl(photos, [{"file_name": name, "labels": tags} for name, tags in TAGS.items()])
    dataset = load_folder(photos)
    assert rows_of(dataset) == EXPECTED
    assert class_names(dataset) == ["cat", "cow", "dog"]
    assert dataset.column_names == ["image", "labels", "image_id"]
    assert [image.size for image in dataset["image"]] == [(20, 10), (21, 10), (22, 10)]


@pytest.mark.parametrize("separator", [",", ";", "|", " ; "])
def test_csv_with_text_as_a_spreadsheet_writes_it(photos, separator):
    with (photos / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "labels"])
        writer.writerows((name, separator.join(tags)) for name, tags in TAGS.items())
    assert rows_of(load_folder(photos)) == EXPECTED


def test_sidecar(photos):
    (photos / "tags.json").write_text(json.dumps(TAGS))
    assert rows_of(load_folder(photos)) == EXPECTED


def test_a_sub_folder_per_tag(tmp_path):
    for name in ("cat/1.jpg", "cat/2.jpg", "traffic light/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image_of(8, 9).save(tmp_path / name)
    (tmp_path / "cat/.DS_Store").write_text("litter")
    (tmp_path / "cat/Thumbs.db").write_text("litter")
    assert rows_of(load_folder(tmp_path)) == {
        "cat_1": ["cat"],
        "cat_2": ["cat"],
        "traffic light_1": ["traffic light"],
    }


def test_splits_by_directory(tmp_path):
    for name in ("train/cat/1.jpg", "train/dog/2.jpg", "val/dog/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        image_of(8, 9).save(tmp_path / name)
    assert rows_of(load_folder(tmp_path, "train")) == {"cat_1": ["cat"], "dog_2": ["dog"]}
    val = load_folder(tmp_path, "val")
    assert rows_of(val) == {"dog_1": ["dog"]}
    assert class_names(val) == ["cat", "dog"], "val has no cat, but the model knows it"
    with pytest.raises(ValueError, match=r"no images of split 'test', only of train \(2\), val \(1\)"):
        load_folder(tmp_path, "test")


@pytest.mark.parametrize(
    "names", [("train", "valid", "test"), ("training", "dev", "testing"), ("Train", "Val", "Test")]
)
def test_splits_by_other_names(tmp_path, names):
    for name, tag in zip(names, ("cat", "dog", "cow"), strict=True):
        (tmp_path / name).mkdir()
        image_of(8, 9).save(tmp_path / name / "1.jpg")
        (tmp_path / name / "metadata.csv").write_text(f"file_name,labels\n1.jpg,{tag}\n")
    for split, tag in (("train", "cat"), ("val", "dog"), ("validation", "dog"), ("test", "cow")):
        dataset = load_folder(tmp_path, split)
        assert rows_of(dataset) == {"1": [tag]}
        assert class_names(dataset) == ["cat", "cow", "dog"]
    (tmp_path / "validation").mkdir()
    image_of(8, 9).save(tmp_path / "validation/2.jpg")
    (tmp_path / "validation/tags.json").write_text('{"2.jpg": ["dog"]}')
    assert rows_of(load_folder(tmp_path, "validation")) == {"2": ["dog"]}, "the very name wins"
    assert rows_of(load_folder(tmp_path, names[1])) == {"1": ["dog"]}


def test_directories_that_are_no_tags(tmp_path):
    (tmp_path / "fold1").mkdir()
    image_of(8, 9).save(tmp_path / "fold1/1.jpg")
    (tmp_path / "fold1/metadata.csv").write_text("file_name,labels\n1.jpg,cat\n")
    with pytest.raises(ValueError, match=r"fold1 has a table of its own, metadata.csv, so 'fold1' is not a tag: pass"):
        load_folder(tmp_path)
    assert rows_of(load_folder(tmp_path / "fold1")) == {"1": ["cat"]}
    (tmp_path / "fold1").rename(tmp_path / "train")
    assert rows_of(load_folder(tmp_path)) == {"1": ["cat"]}
    (tmp_path / "x/[cat]").mkdir(parents=True)
    image_of(8, 9).save(tmp_path / "x/[cat]/1.jpg")
    with pytest.raises(ValueError, match=r"the sub-folder of a tag: '\[cat\]' is not a tag"):
        load_folder(tmp_path / "x")


def test_splits_beside_something_else(tmp_path):
    for name in ("train/cat/1.jpg", "val/cat/1.jpg", "masks/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        image_of(8, 9).save(tmp_path / "photos" / name)
    with pytest.raises(ValueError, match=r"has the splits train, val and beside them masks: move what is not a split"):
        load_folder(tmp_path / "photos")
    (tmp_path / "photos/masks").rename(tmp_path / "masks")
    assert rows_of(load_folder(tmp_path / "photos", "val")) == {"cat_1": ["cat"]}


def test_an_id_too_long_for_a_file_name(tmp_path):
    directory = tmp_path / ("a" * 150) / ("b" * 150)
    directory.mkdir(parents=True)
    image_of(8, 9).save(directory / "1.jpg")
    jsonl(tmp_path, [{"file_name": f"{'a' * 150}/{'b' * 150}/1.jpg", "labels": ["cat"]}])
    with pytest.raises(ValueError, match=r"has 303 bytes, and files are named by it: at most 240; shorten"):
        load_folder(tmp_path)
    directory.parent.rename(tmp_path / "a")
    jsonl(tmp_path, [{"file_name": f"a/{'b' * 150}/1.jpg", "labels": ["cat"]}])
    assert len(load_folder(tmp_path)) == 1


def test_splits_by_table(photos):
    (photos / "val").mkdir()
    (photos / "c.jpg").rename(photos / "val/c.jpg")
    rows = [{"file_name": "a.jpg", "labels": "cat"}, {"file_name": "b.png", "labels": "cow", "split": "mine"}]
    jsonl(photos, [*rows, {"file_name": "val/c.jpg", "labels": "dog"}])
    assert rows_of(load_folder(photos, "train")) == {"a": ["cat"]}
    assert rows_of(load_folder(photos, "mine")) == {"b": ["cow"]}
    assert rows_of(load_folder(photos, "val")) == {"val_c": ["dog"]}


def test_each_split_directory_may_have_a_table(photos):
    for split in ("train", "val"):
        (photos / split).mkdir()
        image_of(5, 5).save(photos / split / "x.png")
        jsonl(photos / split, [{"file_name": "x.png", "labels": [split + " thing"]}])
    for name in TAGS:
        (photos / name).unlink()
    assert rows_of(load_folder(photos, "val")) == {"x": ["val thing"]}


def test_the_split_column_wins_over_the_directory(photos, tmp_path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / "sorted/train").mkdir(parents=True, exist_ok=True)
        (photos / name).rename(tmp_path / "sorted/train" / name)
    rows = [{"file_name": "a.jpg", "labels": "cat"}, {"file_name": "b.png", "labels": "cow", "split": "val"}]
    jsonl(tmp_path / "sorted/train", rows)
    assert rows_of(load_folder(tmp_path / "sorted", "train")) == {"a": ["cat"]}
    assert rows_of(load_folder(tmp_path / "sorted", "val")) == {"b": ["cow"]}


def test_classes_can_be_fixed(photos):
    jsonl(photos, [{"file_name": "a.jpg", "labels": ["dog"]}])
    assert class_names(load_folder(photos, classes=["owl", "dog"])) == ["owl", "dog"]
    with pytest.raises(ValueError, match=r"not classes: 'dog' \(did you mean 'dogs'\?\) of 1 image \(a.jpg\)"):
        load_folder(photos, classes=["owl", "dogs"])


def test_masks_are_looked_for_when_asked_for_only(photos):
    rows = [{"file_name": "a.jpg", "labels": "cat; dog", "mask_file_name": "masks/a.png"}]
    jsonl(photos, rows)
    assert load_folder(photos).column_names == ["image", "labels", "image_id"]
    with pytest.raises(FileNotFoundError, match=r"lacks 1 file \(masks/a.png"):
        load_folder(photos, masks=True)
    (photos / "masks").mkdir()
    Image.fromarray(np.full((10, 20), 2, np.uint8)).save(photos / "masks/a.png")
    row = undecoded(load_folder(photos, masks=True))[0]
    assert np.unique(read_mask(row, read_image(row).size, num_classes=2)).tolist() == [2]
    with pytest.raises(ValueError, match=r"'a' holds the ids \[2\]"):
        read_mask(row, (20, 10), num_classes=1)
    jsonl(photos, [*rows, {"file_name": "b.png", "labels": "cat"}])
    with pytest.raises(FileNotFoundError, match=r"names no mask for 1 image \(b.png\): give each a mask_file_name in"):
        load_folder(photos, masks=True)
    jsonl(photos, [*rows, {"file_name": "b.png", "labels": "cat", "mask_file_name": "masks/a.png"}])
    assert len(load_folder(photos, masks=True)) == 2


def test_an_image_without_tags_is_kept_for_evaluation_and_counted_in_training(photos):
    jsonl(photos, [{"file_name": "a.jpg", "labels": "cat"}, {"file_name": "b.png", "labels": None}])
    dataset = load_folder(photos)
    assert dataset["labels"][:] == [[0], []]
    assert without_untagged(dataset)[1] == ["b"]


def test_missing_files_are_all_named(photos):
    jsonl(photos, [{"file_name": f"{name}.jpg", "labels": "cat"} for name in ("a", "x", "y")])
    with pytest.raises(FileNotFoundError, match=r"lacks 2 files \(x.jpg of .*line 2, y.jpg of .*line 3\)"):
        load_folder(photos)


def test_tags_of_other_case_or_with_spaces(photos):
    jsonl(photos, [{"file_name": "a.jpg", "labels": [" cat "]}, {"file_name": "b.png", "labels": "cat ,"}])
    assert rows_of(load_folder(photos)) == {"a": ["cat"], "b": ["cat"]}
    jsonl(photos, [{"file_name": "a.jpg", "labels": ["Cat"]}, {"file_name": "b.png", "labels": "cat"}])
    with pytest.raises(ValueError, match=r"'Cat' \(images: 1\) and 'cat' \(images: 1\) differ in case or width alone"):
        load_folder(photos)
    with pytest.raises(ValueError, match=r"'Cat' \(did you mean 'cat'\?\) of 1 image \(a.jpg\)"):
        load_folder(photos, classes=["cat"])


def test_an_image_named_twice(photos):
    jsonl(photos, [{"file_name": "a.jpg", "labels": ["cat"]}, {"file_name": "a.jpg", "labels": ["dog"]}])
    with pytest.raises(ValueError, match=r"a.jpg is named twice, in .*line 1 with the tags \['cat'\].*line 2.*'dog'"):
        load_folder(photos)


def test_two_images_of_the_same_stem(photos):
    image_of(4, 4).save(photos / "a.png")
    jsonl(photos, [{"file_name": "a.jpg", "labels": ["cat"]}, {"file_name": "a.png", "labels": ["dog"]}])
    with pytest.raises(ValueError, match=r"a.jpg and a.png would both be called 'a'"):
        load_folder(photos)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unicode_names_in_either_form(tmp_path, form):
    name = "Gänse am Fluß 湖.jpg"
    image_of(4, 4).save(tmp_path / unicodedata.normalize(form, name))
    jsonl(tmp_path, [{"file_name": name, "labels": ["Gänse"]}])
    dataset = load_folder(tmp_path)
    assert rows_of(dataset) == {"Gänse am Fluß 湖": ["Gänse"]}
    assert read_image(undecoded(dataset)[0]).size == (4, 4)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_directories_in_either_form(tmp_path, form):
    for name in ("tagged/Gänse/Fluß ä.png", "table/Gänse/Fluß ä.png"):
        path = tmp_path / unicodedata.normalize(form, name)
        path.parent.mkdir(parents=True)
        image_of(4, 4).save(path)
    assert rows_of(load_folder(tmp_path / "tagged")) == {"Gänse_Fluß ä": ["Gänse"]}
    jsonl(tmp_path / "table", [{"file_name": "Gänse/Fluß ä.png", "labels": ["x"]}])
    dataset = load_folder(tmp_path / "table")
    assert rows_of(dataset) == {"Gänse_Fluß ä": ["x"]}
    assert read_image(undecoded(dataset)[0]).size == (4, 4)
    assert unnamed_images(tmp_path / "table") == []


def test_a_folder_whose_own_name_is_decomposed(tmp_path):
    root = tmp_path / unicodedata.normalize("NFD", "Gänse")
    root.mkdir()
    image_of(4, 4).save(root / "a.png")
    jsonl(root, [{"file_name": "a.png", "labels": ["x"]}])
    assert rows_of(load_folder(root)) == {"a": ["x"]}
    assert unnamed_images(root) == []


def test_a_tag_in_both_forms_is_one_class(photos):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    jsonl(photos, [{"file_name": "a.jpg", "labels": [composed]}, {"file_name": "b.png", "labels": decomposed}])
    assert rows_of(load_folder(photos)) == {"a": [composed], "b": [composed]}
    assert load_folder(photos, classes=["x", decomposed])["labels"][:] == [[1], [1]]


def test_two_directories_of_one_name_in_both_forms(tmp_path):
    for form in ("NFC", "NFD"):
        directory = tmp_path / unicodedata.normalize(form, "café")
        if directory.exists():
            pytest.skip("this file system takes both forms for one")
        directory.mkdir()
        image_of(4, 4).save(directory / f"{form}.png")
    with pytest.raises(ValueError, match=r"'café' whose names differ in Unicode form alone: rename or merge them"):
        load_folder(tmp_path)
    (directory / "NFD.png").rename(tmp_path / unicodedata.normalize("NFC", "café") / "NFD.png")
    directory.rmdir()
    assert rows_of(load_folder(tmp_path)) == {"café_NFC": ["café"], "café_NFD": ["café"]}


def test_a_blank_split_is_none(photos):
    (photos / "metadata.csv").write_text("file_name,labels,split\na.jpg,cat, \nb.png,cow, val \n")
    assert rows_of(load_folder(photos)) == {"a": ["cat"]}
    assert rows_of(load_folder(photos, "val")) == {"b": ["cow"]}


def test_empty_cells_beyond_the_header_say_nothing(photos):
    (photos / "metadata.csv").write_text(',file_name,labels,\n0,a.jpg,"cat, dog",,\n1,b.png,cow\n')
    assert rows_of(load_folder(photos)) == {"a": ["cat", "dog"], "b": ["cow"]}


def test_files_that_are_not_images(photos, tmp_path):
    (photos / "notes.txt").write_text("buy film")
    jsonl(photos, [{"file_name": "notes.txt", "labels": ["cat"]}])
    with pytest.raises(ValueError, match=r"1 file \(notes.txt\) that, by their names, are not images"):
        load_folder(photos)
    (tmp_path / "tagged/cat").mkdir(parents=True)
    (photos / "notes.txt").rename(tmp_path / "tagged/cat/notes.txt")
    with pytest.raises(ValueError, match=r"cat/notes.txt"):
        load_folder(tmp_path / "tagged")


def test_a_file_without_content(photos):
    (photos / "a.jpg").write_bytes(b"")
    jsonl(photos, [{"file_name": "a.jpg", "labels": ["cat"]}])
    with pytest.raises(ValueError, match=r"1 file \(a.jpg\) without content"):
        load_folder(photos)


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.jpg", "labels": []}\n{"file', "metadata.jsonl, line 2 cannot be read"),
        ("metadata.jsonl", '["a.jpg"]', "line 1: expected an object"),
        ("metadata.jsonl", "null", "line 1: the row is empty: remove it"),
        ("metadata.jsonl", '{"file_name": null, "labels": null}', "line 1: the row is empty: remove it"),
        ("metadata.jsonl", '{"labels": ["cat"]}', "line 1: no file_name; found labels"),
        ("metadata.jsonl", '{"file_name": null, "labels": ["cat"]}', "line 1: the row names no file"),
        ("metadata.csv", "file_name,labels\na.jpg,cat\n,\n", "line 3: the row is empty: remove it"),
        ("metadata.csv", "file_name,labels\na.jpg,nan\n", r"line 2, image 'a.jpg': 'nan' is not a tag"),
        ("tags.json", '{"a.jpg": "[cat"}', r"tags.json, image 'a.jpg': '\[cat' is not a tag: it has brackets"),
        ("metadata.jsonl", "\n", "names no images"),
        ("metadata.jsonl", '{"file_name": "a.jpg"}', "line 1: no labels; found file_name"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "labels": 3}', "image 'a.jpg': tags must be text"),
        ("metadata.jsonl", '{"file_name": "../a.jpg", "labels": []}', "must be a path inside"),
        ("metadata.jsonl", '{"file_name": "/a.jpg", "labels": []}', "must be a path inside"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "labels": []}', "no image has a tag"),
        ("metadata.jsonl", '{"file_name": 1, "labels": []}', "line 1: file_name must be text, got 1"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "labels": [], "split": 1}', "line 1: split must be text, got 1"),
        (
            "metadata.jsonl",
            '\n{"file_name": "a.jpg", "labels": [], "mask_file_name": ["m.png"]}',
            r"line 2: mask_file_name must be text, got \['m.png'\]",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "labels": ["cat"], "labels": ["dog"]}',
            "line 1 cannot be read: the key 'labels' occurs twice",
        ),
        ("tags.json", '{"a.jpg": ["cat"], "a.jpg": ["dog"]}', "tags.json cannot be read: the key 'a.jpg' occurs twice"),
        ("metadata.csv", "file_name,labels\na.jpg,cat,dog\n", "line 2 has more cells than the header: dog; put tags"),
        ("metadata.csv", "file_name,labels,\na.jpg,cat,dog\n", "line 2 has more cells than the header: dog; put tags"),
        ("metadata.csv", "file_name,labels,labels\na.jpg,cat,dog\n", "metadata.csv has more than one column labels"),
        ("metadata.csv", 'file_name,labels\na.jpg,"cat\nb.jpg,dog\n', "line 2 cannot be read: unexpected end of data"),
        ("metadata.csv", "file_name;labels\na.jpg;cat\n", "line 2: no file_name and no labels; found file_name;labels"),
        ("tags.json", "[]", "must be an object"),
        ("tags.json", "{", "tags.json cannot be read"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(photos, table, content, message):
    (photos / table).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_folder(photos)


@pytest.mark.parametrize(
    ("table", "content"),
    [
        ("metadata.jsonl", '{"file_name": "a.jpg", "labels": []}\n{"file_name": "b.png", "labels": ["Gänse"]}\n'),
        ("metadata.csv", "file_name,labels\na.jpg,Gänse\n"),
        ("tags.json", '{\n"a.jpg": ["Gänse"]}'),
    ],
)
def test_a_table_in_another_encoding_says_so(photos, table, content):
    (photos / table).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{table}, line 2 cannot be read: save the file as UTF-8"):
        load_folder(photos)
    (photos / table).write_bytes(content.encode("utf-16"))
    with pytest.raises(ValueError, match=rf"{table}, line 1 cannot be read: save the file as UTF-8"):
        load_folder(photos)
    (photos / table).write_bytes(content.encode("utf-8-sig"))
    assert class_names(load_folder(photos)) == ["Gänse"]


@pytest.mark.parametrize(
    ("before", "refusal", "after"),
    [
        (
            {"metadata.csv": "file_name,labels\na.jpg,cat,dog\n"},
            "put tags with commas between them in quotes, or semicolons between them",
            {"metadata.csv": 'file_name,labels\na.jpg,"cat,dog"\n'},
        ),
        (
            {"metadata.csv": "file_name,labels\na.jpg,cat,dog\n"},
            "put tags with commas between them in quotes, or semicolons between them",
            {"metadata.csv": "file_name,labels\na.jpg,cat;dog\n"},
        ),
        (
            {"metadata.csv": "file_name,labels,split\na.jpg,cat,dog\nb.png,dog,train\n"},
            "line 2: the split 'dog' is a tag elsewhere: put tags with commas between them in quotes",
            {"metadata.csv": 'file_name,labels,split\na.jpg,"cat,dog"\nb.png,dog,train\n'},
        ),
        (
            {"metadata.csv": "file_name,labels,labels\na.jpg,cat;dog,cat\n"},
            "more than one column labels: leave one of each",
            {"metadata.csv": "file_name,labels\na.jpg,cat;dog\n"},
        ),
        (
            {"metadata.csv": "file_name,labels\na.jpg,cat\na.jpg,dog\n"},
            r"a.jpg is named twice.*: write all of its tags in one row",
            {"metadata.csv": "file_name,labels\na.jpg,cat;dog\n"},
        ),
        (
            {"tags.json": '{"a.jpg": ["cat"], "a.jpg": ["dog"]}'},
            "the key 'a.jpg' occurs twice: join what they say under one",
            {"tags.json": '{"a.jpg": ["cat", "dog"]}'},
        ),
        (
            {"tags.json": '{"a.jpg": ["cat", "dog"]}', "metadata.csv": "file_name,labels\na.jpg,cat\n"},
            "metadata.csv and tags.json: keep one",
            {"tags.json": '{"a.jpg": ["cat", "dog"]}'},
        ),
        (
            {"metadata.csv": "file_name,labels\na.jpg,cat;dog\n,\n"},
            "line 3: the row is empty: remove it",
            {"metadata.csv": "file_name,labels\na.jpg,cat;dog\n"},
        ),
        (
            {"tags.json": '{"a.jpg": ["cat", "dog"], "b.png": ["Cat"]}'},
            "differ in case or width alone: write one of them everywhere",
            {"tags.json": '{"a.jpg": ["cat", "dog"], "b.png": ["cat"]}'},
        ),
        (
            {"tags.json": '{"a.jpg": "[cat, dog]"}'},
            r"write tags as cat; dog or as \[\"cat\", \"dog\"\]",
            {"tags.json": '{"a.jpg": "cat; dog"}'},
        ),
        (
            {"metadata.csv": "file_name,labels\ncat;dog,a.jpg\n"},
            "'a.jpg' is not a tag: it is the name of a file; are two columns swapped",
            {"metadata.csv": "labels,file_name\ncat;dog,a.jpg\n"},
        ),
    ],
)
def test_what_an_error_advises_works(before, refusal, after, photos):
    for name, content in before.items():
        (photos / name).write_text(content)
    with pytest.raises(ValueError, match=refusal):
        load_folder(photos)
    for name in before:
        (photos / name).unlink()
    for name, content in after.items():
        (photos / name).write_text(content)
    assert rows_of(load_folder(photos))["a"] == ["cat", "dog"]


CAT = {"cat/1.jpg": None}


@pytest.mark.parametrize(
    ("before", "refusal", "after"),
    [
        ({"1.jpg": None}, "has no tags: neither .* nor a sub-folder per tag", CAT),
        ({"1.jpg": None}, "has no tags: neither .* tags.json", {"1.jpg": None, "tags.json": '{"1.jpg": "cat"}'}),
        (CAT | {"dog/": None}, "dog is the sub-folder of a tag, but empty: remove it or fill it", CAT),
        ({"cat/": None}, "cat is the sub-folder of a tag, but empty: remove it or fill it", CAT),
        (CAT | {"cat/notes.txt": "x"}, r"\(cat/notes.txt\) that, by their names, are not images: take them out", CAT),
        ({"cat/1.jpg": ""}, r"\(cat/1.jpg\) without content: replace or remove them", CAT),
        (CAT | {"cat/2.jpg": ""}, r"\(cat/2.jpg\) without content: replace or remove them", CAT),
        (
            CAT | {"_classes.csv": "filename,cat\n1.jpg,1\n"},
            "_classes.csv: `cosa-hf import one-hot .*` makes a table of tags of it; or move it away",
            CAT,
        ),
        (
            {"images/1.jpg": None},
            "is the directory of all images, so 'images' is not a tag: write the images' tags into .*/metadata.csv",
            {"images/1.jpg": None, "metadata.csv": "file_name,labels\nimages/1.jpg,cat\n"},
        ),
        ({"images/cat/1.jpg": None}, "so 'images' is not a tag: pass .*/images as --data_dir", CAT),
        (
            {"first/cat/1.jpg": None, "second/cat/1.jpg": None},
            "first/cat is a directory inside the sub-folder .* all are called train, val and test",
            {"train/cat/1.jpg": None, "val/cat/1.jpg": None},
        ),
        (
            {"train/1.jpg": None, "val/1.jpg": None, "masks/1.png": None},
            "beside them masks: move what is not a split out of it, or name the images in .*/metadata.csv",
            {"train/1.jpg": None, "masks/1.png": None, "metadata.csv": "file_name,labels\ntrain/1.jpg,cat\n"},
        ),
        (
            {"a.jpg": None, "a.png": None, "metadata.csv": "file_name,labels\na.jpg,cat\na.png,cat\n"},
            "a.jpg and a.png would both be called 'a': rename one",
            {"a.jpg": None, "b.png": None, "metadata.csv": "file_name,labels\na.jpg,cat\nb.png,cat\n"},
        ),
        (
            {"1.jpg": None, "metadata.csv": "file_name,labels\n,cat\n1.jpg,cat\n"},
            "line 2: the row names no file: write its file_name, or remove the row",
            {"1.jpg": None, "metadata.csv": "file_name,labels\n1.jpg,cat\n"},
        ),
        (
            {"1.jpg": None, "metadata.csv": "file_name,labels\n/photos/1.jpg,cat\n"},
            "file_name '/photos/1.jpg' must be a path inside",
            {"1.jpg": None, "metadata.csv": "file_name,labels\n1.jpg,cat\n"},
        ),
        (
            {"1.jpg": None, "metadata.jsonl": '{"file_name": "1.jpg", "labels": "cat", "split": 1}'},
            "split must be text, got 1",
            {"1.jpg": None, "metadata.jsonl": '{"file_name": "1.jpg", "labels": "cat", "split": "train"}'},
        ),
        (
            {"1.jpg": None, "tags.json": '["1.jpg", "cat"]'},
            "must be an object, file name -> list of tags",
            {"1.jpg": None, "tags.json": '{"1.jpg": ["cat"]}'},
        ),
        (
            {"1.jpg": None, "metadata.csv": "file_name,labels\n1.jpg,3.0\n"},
            "it is a number or an id; write the name of the class",
            {"1.jpg": None, "metadata.csv": "file_name,labels\n1.jpg,cat\n"},
        ),
        (
            {"1.jpg": None, "metadata.csv": "file_name,labels\n1.jpg,?\n"},
            "neither letters nor digits; write the name of the class",
            {"1.jpg": None, "metadata.csv": "file_name,labels\n1.jpg,cat\n"},
        ),
    ],
)
def test_what_an_error_advises_of_files_works(before, refusal, after, tmp_path):
    def write(name, files):
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.endswith("/"):
                path.mkdir()
            else:
                image_of(8, 9).save(path) if text is None else path.write_text(text)
        return tmp_path / name

    with pytest.raises((ValueError, FileNotFoundError), match=refusal):
        load_folder(write("before", before))
    assert set(map(tuple, rows_of(load_folder(write("after", after))).values())) == {("cat",)}


@pytest.mark.parametrize("by", ["directory", "column"])
def test_a_split_is_made_as_the_error_says(by, tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    image_of(8, 9).save(tmp_path / "train/cat/1.jpg")
    with pytest.raises(ValueError, match="a split is a directory of that name, or a `split` column in the metadata"):
        load_folder(tmp_path, "val")
    if by == "directory":
        (tmp_path / "train").rename(tmp_path / "val")
    else:
        (tmp_path / "metadata.csv").write_text("file_name,labels,split\ntrain/cat/1.jpg,cat,val\n")
    assert list(rows_of(load_folder(tmp_path, "val")).values()) == [["cat"]]


def test_images_that_no_table_names_are_found(photos):
    (photos / "more").mkdir()
    image_of(4, 4).save(photos / "more/Fluß.png")
    image_of(4, 4, "L").save(photos / "mask.png")
    (photos / "notes.txt").write_text("buy film")
    jsonl(photos, [{"file_name": "a.jpg", "labels": ["cat"], "mask_file_name": "mask.png"}])
    assert unnamed_images(photos) == ["b.png", "c.jpg", "more/Fluß.png"]


def test_layouts_that_are_none(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no tags: neither metadata.jsonl, metadata.csv, tags.json nor"):
        load_folder(photos)
    (photos / "tags.json").write_text("{}")
    (photos / "metadata.csv").write_text("")
    with pytest.raises(ValueError, match=r"metadata.csv and tags.json: keep one"):
        load_folder(photos)
    (tmp_path / "empty/cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="cat is the sub-folder of a tag, but empty"):
        load_folder(tmp_path / "empty")
    (tmp_path / "empty/cat/more").mkdir()
    with pytest.raises(ValueError, match="more is a directory inside the sub-folder of the tag 'cat'"):
        load_folder(tmp_path / "empty")
