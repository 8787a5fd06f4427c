import pytest
from images_of import image_of

from cosa_hf.data import class_names, load_folder
from cosa_hf.data.importers import ImportOptions, Row, gather, write_table


@pytest.fixture
def photos(tmp_path):
    for name in ("a.jpg", "train/b.jpg", "val/b.jpg", "val/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image_of(8, 8).save(tmp_path / name)
    return tmp_path


def gathered(photos, *rows, directory=None, skip_missing=False, verified=False, **options):
    pairs = [(directory or photos, row) for row in rows]
    return gather(pairs, photos, ImportOptions(**options), verified, skip_missing)


@pytest.mark.parametrize(
    ("name", "directory", "found"),
    [
        ("a.jpg", ".", "a.jpg"),
        ("a", ".", "a.jpg"),
        ("b.jpg", "train", "train/b.jpg"),
        ("/home/me/pictures/val/b.jpg", ".", "val/b.jpg"),
        ("C:\\pictures\\val\\b.jpg", ".", "val/b.jpg"),
        ("./val/../val/c.png", ".", "val/c.png"),
        ("somewhere/c.png", "exports", "val/c.png"),
    ],
)
def test_files_are_found_by_what_exports_call_them(photos, name, directory, found):
    images, _ = gathered(photos, Row("line 2", [name], ["cat"]), directory=photos / directory)
    assert [image.file for image in images] == [found]


def test_names_that_fit_several_files_or_none(photos):
    with pytest.raises(ValueError, match=r"line 2: b.jpg could be train/b.jpg or val/b.jpg: rename"):
        gathered(photos, Row("line 2", ["b.jpg"], ["cat"]))
    with pytest.raises(ValueError, match=r"line 3: x/a.jpg and y/a.jpg would both be a.jpg"):
        gathered(photos, Row("line 2", ["x/a.jpg"]), Row("line 3", ["y/a.jpg"]))
    with pytest.raises(ValueError, match="line 2 names no file"):
        gathered(photos, Row("line 2", [""]))
    with pytest.raises(ValueError, match="names no images"):
        gathered(photos)


def test_images_that_are_not_there_are_left_out_when_told(photos):
    rows = [Row("line 2", ["a.jpg"], ["cat"]), Row("line 3", ["gone.jpg"], ["dog"])]
    with pytest.raises(FileNotFoundError, match=r"lacks 1 image \(gone.jpg\).*or leave them out with --skip_missing"):
        gathered(photos, *rows)
    images, missing = gathered(photos, *rows, skip_missing=True)
    assert [image.file for image in images] == ["a.jpg"]
    assert missing == ["gone.jpg"]
    with pytest.raises(FileNotFoundError, match=r"that the export names: put them there$"):
        gathered(photos, rows[1], skip_missing=True)


def test_no_contradictions(photos):
    rows = [Row("line 2", ["a.jpg"], ["cat"]), Row("line 3", ["a.jpg"], absent=["cat"])]
    with pytest.raises(ValueError, match=r"a.jpg has the tag 'cat' in line 2 and not in line 3: correct one"):
        gathered(photos, *rows)
    with pytest.raises(ValueError, match=r"line 3: a.jpg has the split 'val' here and 'train' before"):
        gathered(photos, Row("line 2", ["a.jpg"], split="train"), Row("line 3", ["a.jpg"], split="val"))


CAT, DOG = ["cat"], ["dog"]


@pytest.mark.parametrize(
    ("rows", "advice", "moved", "mended"),
    [
        (
            [Row("line 2", ["b.jpg"], CAT)],
            "b.jpg could be train/b.jpg or val/b.jpg: rename one of them, here and in the export",
            ("val/b.jpg", "val/d.jpg"),
            [Row("line 2", ["d.jpg"], CAT)],
        ),
        (
            [Row("line 2", ["x/a.jpg"], CAT), Row("line 3", ["y/a.jpg"], DOG)],
            "x/a.jpg and y/a.jpg would both be a.jpg: rename one of them",
            ("val/c.png", "d.jpg"),
            [Row("line 2", ["x/a.jpg"], CAT), Row("line 3", ["y/d.jpg"], DOG)],
        ),
        (
            [Row("line 2", ["a.jpg"], CAT), Row("line 3", ["a.jpg"], absent=CAT)],
            "has the tag 'cat' in line 2 and not in line 3: correct one of them",
            None,
            [Row("line 2", ["a.jpg"], CAT), Row("line 3", ["a.jpg"], absent=DOG)],
        ),
        ([Row("line 2", ["d.jpg"], CAT)], "put them there", ("a.jpg", "d.jpg"), [Row("line 2", ["d.jpg"], CAT)]),
    ],
)
def test_what_an_error_advises_works(photos, rows, advice, moved, mended):
    with pytest.raises((ValueError, FileNotFoundError), match=advice):
        gathered(photos, *rows)
    if moved:
        (photos / moved[0]).rename(photos / moved[1])
    images, missing = gathered(photos, *mended)
    assert len(images) == len({image.file for image in images}) == len({row.files[0] for row in mended})
    assert not missing


def test_verified_are_those_that_lack_every_class(photos):
    rows = [
        Row("1", ["a.jpg"], ["cat"]),
        Row("2", ["train/b.jpg"], ["dog"]),
        Row("3", ["val/b.jpg"], absent=["cat", "dog"]),
        Row("4", ["val/c.png"], absent=["cat"]),
    ]
    images, _ = gathered(photos, *rows)
    assert [image.verified for image in images] == [False, False, True, False]
    images, _ = gathered(photos, *rows, classes=["cat"])
    assert [image.verified for image in images] == [False, False, True, True]
    assert [list(image.tags) for image in images] == [["cat"], [], [], []], "other tags are left out"
    images, _ = gathered(photos, *rows, Row("5", ["val/c.png"], seen=False), verified=True)
    assert [image.verified for image in images] == [False, False, True, True]


def test_what_is_written_is_what_is_read(photos):
    tags = [["red, ripe", "cat"], ["7"], ["Gänse"], []]
    files = ["a.jpg", "train/b.jpg", "val/b.jpg", "val/c.png"]
    images, _ = gathered(photos, *(Row(file, [file], tags) for file, tags in zip(files, tags, strict=True)))
    write_table(images, photos / "metadata.csv")
    read = {}
    for split in ("train", "val"):
        dataset = load_folder(photos, split)
        names = class_names(dataset)
        read |= {
            row: [names[i] for i in labels] for row, labels in zip(dataset["image_id"], dataset["labels"], strict=True)
        }
    assert read == {"a": ["cat", "red, ripe"], "train_b": ["7"], "val_b": ["Gänse"], "val_c": []}
