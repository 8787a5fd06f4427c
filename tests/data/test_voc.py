import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_hf.data import VOC_CLASSES, VOC_COEXISTENCE, TrainingDataset, Views, class_names, load_voc
from cosa_hf.data.images import read_image, read_mask, undecoded

REAL_VOC = Path(__file__).resolve().parents[2] / "../shared/data/VOC2012"
LIST = "ImageSets/Segmentation/train.txt"

_opened: list[str] | None = None


def _record_opened(event: str, arguments: tuple) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir"):
        _opened.append(str(arguments[0]))


sys.addaudithook(_record_opened)


@pytest.fixture
def opened():
    """Every path that Python opens or lists during the test."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


def _annotate(voc_dir: Path, image_id: str, objects: str) -> None:
    (voc_dir / "Annotations").mkdir(exist_ok=True)
    (voc_dir / f"Annotations/{image_id}.xml").write_text(f"<annotation>{objects}</annotation>")


def test_reads_ids_tags_and_images_in_list_order(voc_dir):
    dataset = load_voc(voc_dir, "train")
    assert dataset["image_id"][:] == ["2007_01", "2007_02", "2007_03"]
    assert dataset["labels"][:] == [[7, 11], [18], [0]]
    assert [image.size for image in dataset["image"]] == [(20, 10), (21, 10), (22, 10)]
    assert dataset.column_names == ["image", "labels", "image_id"]
    assert class_names(dataset) == list(VOC_CLASSES)
    assert len(VOC_CLASSES) == 20
    assert set(VOC_COEXISTENCE) < set(VOC_CLASSES)


def test_accepts_strings_and_relative_directories(voc_dir, monkeypatch):
    monkeypatch.chdir(voc_dir.parent)
    dataset = load_voc("VOC2012", "train")
    monkeypatch.chdir("/")
    assert dataset[0]["image"].size == (20, 10)


def test_train_aug_is_made_from_the_lists_of_sbd(voc_dir):
    lists = voc_dir / "ImageSets/Segmentation"
    sbd = voc_dir / "benchmark_RELEASE/dataset"
    with pytest.raises(FileNotFoundError, match=r"available splits: train .or put SBD's benchmark_RELEASE into"):
        load_voc(voc_dir, "train_aug")
    sbd.mkdir(parents=True)
    (sbd / "train.txt").write_text("2007_02\n")
    (lists / "train.txt").write_text("2007_03\n")
    (lists / "val.txt").write_text("2007_01\n")
    with pytest.raises(FileNotFoundError, match=r"made from four lists; missing .*benchmark_RELEASE/dataset/val.txt"):
        load_voc(voc_dir, "train_aug")
    (sbd / "val.txt").write_text("2007_01\n")
    assert load_voc(voc_dir, "train_aug")["image_id"][:] == ["2007_02", "2007_03"], "without VOC's val"
    (lists / "train_aug.txt").write_text("2007_01\n")
    assert load_voc(voc_dir, "train_aug")["image_id"][:] == ["2007_01"], "a list of one's own wins"


def test_masks_are_class_ids(voc_dir):
    dataset = undecoded(load_voc(voc_dir, "train", masks=True))
    masks = [read_mask(row, read_image(row).size, num_classes=20) for row in dataset]
    assert [np.unique(mask).tolist() for mask in masks] == [[0], [1], [2]]


def test_masks_of_the_plain_download(voc_dir):
    (voc_dir / "SegmentationClassAug").rename(voc_dir / "SegmentationClass")
    row = undecoded(load_voc(voc_dir, "train", masks=True))[1]
    assert np.unique(read_mask(row, (21, 10), num_classes=20)).tolist() == [1]


def test_masks_of_the_augmented_set_come_first(voc_dir):
    (voc_dir / "SegmentationClass").mkdir()
    Image.new("L", (21, 10), 2).save(voc_dir / "SegmentationClass/2007_02.png")
    row = undecoded(load_voc(voc_dir, "train", masks=True))[1]
    assert np.unique(read_mask(row, (21, 10), num_classes=20)).tolist() == [1]


def test_masks_are_not_opened_unless_asked_for(voc_dir, opened):
    stream = TrainingDataset(load_voc(voc_dir, "train"), Views(32, (0.5,) * 3, (0.5,) * 3), length=3, seed=0)
    assert all("mask" not in stream[p] for p in range(3))
    assert any("JPEGImages" in path for path in opened), "the recorder saw nothing"
    assert not [path for path in opened if "SegmentationClass" in path]


def test_masks_need_not_exist_unless_asked_for(voc_dir):
    shutil.rmtree(voc_dir / "SegmentationClassAug")
    assert load_voc(voc_dir, "train").num_rows == 3
    with pytest.raises(FileNotFoundError, match="SegmentationClass"):
        load_voc(voc_dir, "train", masks=True)


def test_tags_from_annotations(voc_dir):
    (voc_dir / "image_labels.json").unlink()
    part = "<part><name>head</name></part>"
    difficult = "<object><name>person</name><difficult>1</difficult>" + part + "</object>"
    _annotate(voc_dir, "2007_01", "<object><name>dog</name></object><object><name>dog</name></object>")
    _annotate(voc_dir, "2007_02", "<object><name>train</name></object>" + difficult)
    _annotate(voc_dir, "2007_03", "")
    assert load_voc(voc_dir, "train")["labels"][:] == [[11], [14, 18], []]


def test_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_voc(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("above", [1, 2])
def test_a_directory_above_gives_a_hint(voc_dir, above):
    if above == 2:
        (voc_dir.parent / "VOCdevkit").mkdir()
        voc_dir = voc_dir.rename(voc_dir.parent / "VOCdevkit/VOC2012")
    with pytest.raises(FileNotFoundError, match=f"found {voc_dir}: pass that"):
        load_voc(voc_dir.parents[above - 1], "train")
    assert len(load_voc(voc_dir, "train")) == 3


def test_missing_list_names_those_there_are(voc_dir):
    with pytest.raises(FileNotFoundError, match=r"trainaug\.txt; available splits: train"):
        load_voc(voc_dir, "trainaug")


def test_empty_split(voc_dir):
    (voc_dir / LIST).write_text("\n")
    with pytest.raises(ValueError, match=r"train\.txt is empty"):
        load_voc(voc_dir, "train")


def test_image_listed_twice(voc_dir):
    (voc_dir / LIST).write_text("2007_01\n2007_02\n2007_01\n")
    with pytest.raises(ValueError, match=r"1 image \(2007_01\) more than once"):
        load_voc(voc_dir, "train")


def test_missing_images_are_counted_and_named(voc_dir):
    for image_id in ("2007_01", "2007_03"):
        (voc_dir / f"JPEGImages/{image_id}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 files \(2007_01\.jpg, 2007_03\.jpg\)"):
        load_voc(voc_dir, "train")


def test_missing_mask(voc_dir):
    (voc_dir / "SegmentationClassAug/2007_02.png").unlink()
    assert load_voc(voc_dir, "train").num_rows == 3
    with pytest.raises(FileNotFoundError, match=r"1 file \(2007_02\.png\)"):
        load_voc(voc_dir, "train", masks=True)


def test_image_without_an_entry_in_the_tags(voc_dir):
    (voc_dir / "image_labels.json").write_text(json.dumps({"2007_01": [], "2007_02": ["train"]}))
    with pytest.raises(ValueError, match=r"no entry for 1 image \(2007_03\); an image without classes needs \[\]"):
        load_voc(voc_dir, "train")
    (voc_dir / "image_labels.json").write_text(json.dumps({"2007_01": [], "2007_02": ["train"], "2007_03": []}))
    assert load_voc(voc_dir, "train")["labels"][:] == [[], [18], []]


def test_image_without_an_annotation(voc_dir):
    (voc_dir / "image_labels.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither image_labels\.json nor Annotations"):
        load_voc(voc_dir, "train")
    _annotate(voc_dir, "2007_01", "")
    with pytest.raises(FileNotFoundError, match=r"2 images \(2007_02, 2007_03\)"):
        load_voc(voc_dir, "train")


def test_tag_that_no_class_has(voc_dir):
    (voc_dir / "image_labels.json").write_text(json.dumps({"2007_01": ["cat"], "2007_02": ["tram"], "2007_03": []}))
    with pytest.raises(ValueError, match=r"1 tag \(tram\) that are not classes of VOC"):
        load_voc(voc_dir, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "holds a list"),
        ('{"2007_01": "cat", "2007_02": [], "2007_03": []}', r"expected a list of class names for 1 image \(2007_01\)"),
        ('{"2007_01": [8], "2007_02": [], "2007_03": []}', r"expected a list of class names for 1 image \(2007_01\)"),
        ('{"2007_01": [], "2007_01": ["cat"]}', "cannot be read: the key '2007_01' occurs twice"),
    ],
)
def test_malformed_tags(voc_dir, content, message):
    (voc_dir / "image_labels.json").write_text(content)
    with pytest.raises(ValueError, match=rf"image_labels\.json:? {message}"):
        load_voc(voc_dir, "train")
    (voc_dir / "image_labels.json").write_text('{"2007_01": ["cat"], "2007_02": [], "2007_03": []}')
    assert load_voc(voc_dir, "train")["labels"][:] == [[7], [], []]


def test_files_with_the_signature_of_utf_8(voc_dir):
    (voc_dir / "classes.txt").write_text("dog\ncat\ntrain\naeroplane\n")
    before = load_voc(voc_dir, "train")
    for name in (LIST, "image_labels.json", "classes.txt"):
        (voc_dir / name).write_text((voc_dir / name).read_text(), encoding="utf-8-sig")
    after = load_voc(voc_dir, "train")
    assert (after["labels"][:], class_names(after)) == (before["labels"][:], class_names(before))


@pytest.mark.parametrize("name", [LIST, "image_labels.json", "classes.txt"])
def test_files_in_another_encoding_are_named(voc_dir, name):
    (voc_dir / name).write_bytes("Gänse".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}, line 1 cannot be read: save the file as UTF-8"):
        load_voc(voc_dir, "train")


def test_malformed_annotation(voc_dir):
    (voc_dir / "image_labels.json").unlink()
    for image_id in ("2007_01", "2007_02", "2007_03"):
        _annotate(voc_dir, image_id, "<object>" if image_id == "2007_02" else "")
    with pytest.raises(ValueError, match=r"2007_02\.xml is not valid XML"):
        load_voc(voc_dir, "train")


@pytest.mark.skipif(not REAL_VOC.is_dir(), reason="needs a VOC 2012 directory")
def test_real_voc():
    assert load_voc(REAL_VOC, "train_aug").num_rows == 1696
    dataset = undecoded(load_voc(REAL_VOC, "val", masks=True))
    assert dataset.num_rows == 300
    for row in dataset.select(range(0, 300, 25)):
        image = read_image(row)
        ids = set(np.unique(read_mask(row, image.size, num_classes=20)).tolist()) - {0, 255}
        assert image.mode == "RGB"
        assert max(image.size) <= 384
        assert ids == {label + 1 for label in row["labels"]}, row["image_id"]


def test_classes_of_its_own_without_a_list_of_them(voc_dir):
    (voc_dir / "image_labels.json").write_text('{"2007_01": ["cats", "scratch "], "2007_02": [], "2007_03": ["cats"]}')
    with pytest.raises(
        ValueError, match=r"2 tags \(cats, scratch\) that are not classes of VOC: if they are your own"
    ) as it:
        load_voc(voc_dir, "train")
    assert "did you mean" not in str(it.value)
    (path,) = re.findall(r"one a line, into (\S+)", str(it.value))
    Path(path).write_text("scratch\n\n  cats \r\n\n")
    dataset = load_voc(voc_dir, "train")
    assert class_names(dataset) == ["scratch", "cats"], "blank lines and blanks are no classes"
    assert dataset["labels"][:] == [[0, 1], [], [1]]
    Path(path).write_text("scratch\ncats\nscratch\n")
    with pytest.raises(ValueError, match=r"classes.txt has 1 class \(scratch\) more than once: leave one line of each"):
        load_voc(voc_dir, "train")
    Path(path).write_text("scratch\ncats\n")
    assert class_names(load_voc(voc_dir, "train")) == ["scratch", "cats"]
    Path(path).unlink()
    (voc_dir / "image_labels.json").write_text('{"2007_01": ["[cat"], "2007_02": [], "2007_03": []}')
    with pytest.raises(ValueError, match=r"image_labels.json, image '2007_01': '\[cat' is not a tag"):
        load_voc(voc_dir, "train")


def test_classes_of_its_own(voc_dir):
    (voc_dir / "classes.txt").write_text("dog\ncat\ntrain\naeroplane\n")
    dataset = load_voc(voc_dir, "train")
    assert class_names(dataset) == ["dog", "cat", "train", "aeroplane"]
    assert dataset["labels"][:] == [[0, 1], [2], [3]]
    (voc_dir / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(ValueError, match=r"'train' of 1 image \(2007_02\).*The classes are dog, cat"):
        load_voc(voc_dir, "train")
