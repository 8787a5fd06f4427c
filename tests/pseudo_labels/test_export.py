"""What is written is what the model says, in every format; what cannot be written is refused or taken up again."""

import errno
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from pets import CLASSES
from PIL import Image, ImageOps
from tiny import square, tiny_cosa

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation
from cosa_hf.data import class_names, load_voc
from cosa_hf.data.images import read_image, read_mask, undecoded
from cosa_hf.data.tags import tag_features
from cosa_hf.evaluation.crf import DenseCRF
from cosa_hf.files import whole_file
from cosa_hf.inference import Segmenter
from cosa_hf.pseudo_labels import formats
from cosa_hf.pseudo_labels.export import SOURCES, export_pseudo_labels
from cosa_hf.pseudo_labels.formats import FORMATS
from cosa_hf.pseudo_labels.load import check_masks, load_pseudo_labels


def export(segmenter, dataset, output_dir, **settings):
    settings = {"source": "cam", "format": "png", "split": "train", "shard_size": 2, "progress": False} | settings
    return export_pseudo_labels(segmenter, dataset, output_dir, **settings)


def expected_masks(segmenter, dataset, protocol, threshold=0.4):
    """What evaluation compares with the ground truth, for these images."""
    return {one.image_id: one.label(protocol, threshold)[0].numpy() for one in segmenter.predict(dataset)}


def masks_in_png(directory):
    rows = undecoded(load_voc(directory, "train", masks=True))
    return {
        unquote(row["image_id"]): np.array(read_mask(row, read_image(row).size, num_classes=len(CLASSES)))
        for row in rows
    }


def masks_in_parquet(directory):
    rows = load_dataset(
        "parquet", data_files=str(directory / "data" / "*.parquet"), split="train", cache_dir=str(directory / ".cache")
    )
    return {row["image_id"]: np.array(row["mask"]) for row in rows}


def masks_in_coco_json(directory):
    from pycocotools.coco import COCO

    coco = COCO(directory / "annotations" / "instances_train.json")
    masks = {}
    for number, image in coco.imgs.items():
        masks[image["name"]] = mask = np.zeros((image["height"], image["width"]), dtype=int)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=number, iscrowd=False)):
            mask += annotation["category_id"] * coco.annToMask(annotation).astype(int)
    return masks


READERS = {"png": masks_in_png, "parquet": masks_in_parquet, "coco-json": masks_in_coco_json}


def tree(directory):
    """Every file by its path: its bytes, or where the link leads."""
    return {
        str(path.relative_to(directory)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in directory.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("format", FORMATS)
def test_read_back_the_masks_are_those_of_evaluation(format, segmenter, dataset, tmp_path):
    assert export(segmenter, dataset, tmp_path / "out", format=format, source="cam_mean") == 5
    expected = expected_masks(segmenter, dataset, "cam_mean")
    found = READERS[format](tmp_path / "out")
    assert list(found) == list(expected)
    for image_id, mask in expected.items():
        np.testing.assert_array_equal(found[image_id], mask, err_msg=image_id)
    assert found["turned"].shape == (50, 20)  # as it is looked at, not as it lies in the file
    assert {0, 1, 2, 3} == {int(i) for mask in expected.values() for i in np.unique(mask)}, "no test without classes"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("threshold", [None, 0.7])
def test_every_source_at_every_threshold(source, threshold, segmenter, dataset, tmp_path):
    export(segmenter, dataset, tmp_path / "out", source=source, threshold=threshold)
    expected = expected_masks(segmenter, dataset, SOURCES[source], threshold or segmenter.model.config.cam_threshold)
    for image_id, mask in masks_in_png(tmp_path / "out").items():
        np.testing.assert_array_equal(mask, expected[image_id])


def test_spread_cams_of_a_model_that_spreads_nothing_are_refused(segmenter, dataset, tmp_path):
    config = CoSAConfig.from_dict(segmenter.model.config.to_dict() | {"affinity": "none"})
    plain = replace(segmenter, model=CoSAForWeaklySupervisedSegmentation(config))
    with pytest.raises(ValueError, match="cam_spread needs a model whose config names an affinity"):
        export(plain, dataset, tmp_path / "out", source="cam_spread")
    assert not (tmp_path / "out").exists()


def test_png_is_a_voc_directory_with_links_to_the_images(segmenter, dataset, columns, tmp_path, capsys):
    export(segmenter, dataset, tmp_path / "out", progress=True)
    assert "5/5 [" in capsys.readouterr().err
    read = load_voc(tmp_path / "out", "train", masks=True)
    assert class_names(read) == CLASSES
    assert read["labels"][:] == columns["labels"]
    assert read["image_id"][:] == ["plain", "IMG%2012%25", "pets%2Fübung", "turned", "long"]
    links = [os.readlink(tmp_path / "out" / "JPEGImages" / f"{image_id}.jpg") for image_id in read["image_id"]]
    assert links == columns["image"]
    with Image.open(tmp_path / "out" / "SegmentationClassAug" / "plain.png") as mask:
        assert mask.mode == "P"
    assert not (tmp_path / "out" / ".parts").exists()


def test_links_to_images_of_relative_names_lead_to_them(segmenter, columns, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    columns["image"] = [f"photos/{number}.jpg" for number in range(5)]
    export(segmenter, Dataset.from_dict(columns, features=tag_features(CLASSES)), tmp_path / "out")
    assert os.readlink(tmp_path / "out/JPEGImages/plain.jpg") == str(tmp_path / "photos/0.jpg")


def test_images_without_a_file_are_written_out(segmenter, columns, tmp_path):
    images = [{"bytes": Path(path).read_bytes(), "path": None} for path in columns["image"]]
    dataset = Dataset.from_dict(columns | {"image": images}, features=tag_features(CLASSES))
    export(segmenter, dataset, tmp_path / "out")
    written = [path.read_bytes() for path in sorted((tmp_path / "out" / "JPEGImages").iterdir())]
    assert sorted(written) == sorted(image["bytes"] for image in images)
    assert not any(path.is_symlink() for path in (tmp_path / "out" / "JPEGImages").iterdir())


def test_parquet_is_a_dataset_with_images_tags_and_confidence(segmenter, dataset, columns, tmp_path):
    export(segmenter, dataset, tmp_path / "out", format="parquet")
    read = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert class_names(read) == CLASSES
    assert read.column_names == ["image", "labels", "image_id", "mask", "confidence"]
    assert read["labels"][:] == columns["labels"]
    assert undecoded(read)[0]["image"] == {"bytes": Path(columns["image"][0]).read_bytes(), "path": "0.jpg"}
    for row, one in zip(read, segmenter.predict(dataset), strict=True):
        confidence, mask = np.array(row["confidence"]), np.array(row["mask"])
        assert confidence.dtype == np.uint8
        np.testing.assert_array_equal(confidence, np.rint(255 * one.label("cam")[1].numpy()))
        assert ((confidence > 0.4 * 255 + 1) <= (mask > 0)).all()
        assert ((confidence < 0.4 * 255 - 1) <= (mask == 0)).all()
    assert len(list((tmp_path / "out" / "data").iterdir())) == 3  # five images, two a shard


def test_confidence_of_a_segmentation_is_the_probability_of_its_label(segmenter, dataset, tmp_path):
    export(segmenter, dataset, tmp_path / "out", format="parquet", source="seg")
    read = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    one, row = next(segmenter.predict(dataset)), read[0]  # tagged "cat"
    probability = one.upsample(one.seg_logits[:2]).softmax(0).amax(0)
    np.testing.assert_allclose(np.array(row["confidence"]), 255 * probability.numpy(), atol=0.6)


def test_confidence_after_a_crf_is_a_probability(segmenter, dataset, tmp_path):
    """Also of a CAM: the threshold that it was refined at is recorded, and no middle of what confidence means."""
    refining = replace(segmenter, crf=lambda logits, image: logits.softmax(0))
    export(refining, dataset, tmp_path / "out", format="parquet", source="cam_spread")
    read = load_pseudo_labels(str(tmp_path / "out"))
    assert (read.threshold, read.record["settings"]["threshold"]) == (None, 0.4)
    for row, one in zip(read.dataset, refining.predict(dataset), strict=True):
        ids, probability = one.label("cam_spread")
        np.testing.assert_array_equal(np.array(row["mask"]), ids)
        np.testing.assert_array_equal(np.array(row["confidence"]), np.rint(255 * probability.numpy()))
    export(segmenter, dataset, tmp_path / "plain", format="parquet", source="cam_spread")
    assert load_pseudo_labels(str(tmp_path / "plain")).threshold == 0.4


def test_coco_json_has_what_pycocotools_wants(segmenter, dataset, tmp_path):
    export(segmenter, dataset, tmp_path / "out", format="coco-json", data_dir=tmp_path)
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert content["categories"] == [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    assert [image["file_name"] for image in content["images"]] == [f"photos/{number}.jpg" for number in range(5)]
    numbers = [annotation["id"] for annotation in content["annotations"]]
    assert numbers == list(range(1, len(numbers) + 1))
    masks = masks_in_coco_json(tmp_path / "out")
    names = {image["id"]: image["name"] for image in content["images"]}
    for annotation in content["annotations"]:
        segment = masks[names[annotation["image_id"]]] == annotation["category_id"]
        assert annotation["area"] == segment.sum() > 0
        rows, columns = np.nonzero(segment)
        left, top = columns.min(), rows.min()
        assert annotation["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]
        assert annotation["iscrowd"] == 0


def test_coco_json_tells_images_of_equal_names_apart(segmenter, columns, tmp_path):
    """Two folders with a 1.jpg each, and no directory that they were read from."""
    places = [tmp_path / "animals" / name for name in ("cat/1.jpg", "dog/1.jpg")]
    for place, source in zip(places, columns["image"], strict=False):
        place.parent.mkdir(parents=True)
        place.write_bytes(Path(source).read_bytes())
    rows = {"image": list(map(str, places)), "labels": [[0], [1]], "image_id": ["a", "b"]}
    dataset = Dataset.from_dict(rows, features=tag_features(CLASSES))
    export(segmenter, dataset, tmp_path / "out", format="coco-json")
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["cat/1.jpg", "dog/1.jpg"]
    # In a dataset with the bytes, nothing but the name is left of a path.
    rows["image"] = [{"bytes": place.read_bytes(), "path": place.name} for place in places]
    dataset = Dataset.from_dict(rows, features=tag_features(CLASSES))
    with pytest.raises(ValueError, match=r"1\.jpg more than once among the images' files.*export png or parquet"):
        export(segmenter, dataset, tmp_path / "other", format="coco-json")
    assert not (tmp_path / "other").exists()
    for format in ("png", "parquet"):
        assert export(segmenter, dataset, tmp_path / format, format=format) == 2


def test_parquet_of_a_split_that_cannot_be_read_back_is_refused(segmenter, dataset, tmp_path):
    with pytest.raises(ValueError, match=r"`datasets` reads none of 'train\[:1\]': export the whole split, or another"):
        export(segmenter, dataset, tmp_path / "out", format="parquet", split="train[:1]")
    assert not (tmp_path / "out").exists()
    export(segmenter, dataset, tmp_path / "out", format="parquet", split="train.clean_2")
    assert len(load_dataset(str(tmp_path / "out"), split="train.clean_2", cache_dir=str(tmp_path / "cache"))) == 5
    assert export(segmenter, dataset, tmp_path / "png", split="train[:1]") == 5


def test_without_pycocotools_coco_json_says_what_to_install(segmenter, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match=r'pip install "cosa-hf\[coco\]"'):
        export(segmenter, dataset, tmp_path / "out", format="coco-json")
    assert not (tmp_path / "out").exists()


def test_images_without_a_tag_are_named_and_refused(segmenter, columns, tmp_path):
    columns["labels"][1] = columns["labels"][3] = []
    dataset = Dataset.from_dict(columns, features=tag_features(CLASSES))
    said = r"2 of 5 images have no tag: IMG 12%, turned; tag them, take them off the split, or .*\(--tags predicted\)"
    with pytest.raises(ValueError, match=said):
        export(segmenter, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(segmenter, dataset.select([0, 2, 4]), tmp_path / "out") == 3
    assert export(segmenter, dataset, tmp_path / "predicted", class_threshold=0.5) == 5
    columns["labels"][1] = columns["labels"][3] = [0]
    assert export(segmenter, Dataset.from_dict(columns, features=tag_features(CLASSES)), tmp_path / "tagged") == 5


def test_predicted_tags_are_for_images_without_one(segmenter, columns, tmp_path):
    columns["labels"] = [[0], [], [2], [], []]
    dataset = Dataset.from_dict(columns, features=tag_features(CLASSES))
    with torch.no_grad():
        images = [read_image(row) for row in undecoded(dataset)]
        probabilities = segmenter.model(**segmenter.processor(images, return_tensors="pt")).cls_logits.sigmoid()
    threshold = float(probabilities[1].median())  # one or two classes of the second image reach it
    expected = [
        tags or (probabilities[number] >= threshold).nonzero().flatten().tolist()
        for number, tags in enumerate(columns["labels"])
    ]
    assert len(expected[1]) == 2
    export(segmenter, dataset, tmp_path / "out", class_threshold=threshold)
    assert load_voc(tmp_path / "out", "train")["labels"][:] == expected
    # The masks are those of somebody who had given these tags.
    tagged = Dataset.from_dict(columns | {"labels": expected}, features=tag_features(CLASSES))
    for image_id, mask in expected_masks(segmenter, tagged, "cam").items():
        np.testing.assert_array_equal(masks_in_png(tmp_path / "out")[image_id], mask)


def test_no_class_recognised_is_all_background(segmenter, columns, tmp_path):
    columns["labels"][0] = []
    dataset = Dataset.from_dict(columns, features=tag_features(CLASSES))
    for source in SOURCES:
        export(segmenter, dataset, tmp_path / source, class_threshold=0.9999, source=source)
        assert not masks_in_png(tmp_path / source)["plain"].any()


@pytest.mark.parametrize("format", FORMATS)
def test_a_complete_export_is_left_alone(format, segmenter, dataset, tmp_path):
    export(segmenter, dataset, tmp_path / "out", format=format)
    before = {path: os.lstat(path).st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert json.loads((tmp_path / "out" / "export.json").read_text())["complete"] is True
    assert export(segmenter, dataset, tmp_path / "out", format=format) == 0
    assert {path: os.lstat(path).st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_settings_are_recorded_and_others_refused(segmenter, dataset, columns, tmp_path):
    export(segmenter, dataset, tmp_path / "out", threshold=0.3)
    settings = json.loads((tmp_path / "out" / "export.json").read_text())["settings"]
    assert (settings["source"], settings["threshold"], settings["scales"]) == ("cam", 0.3, [1.0])
    for name, other in {"threshold": 0.35, "source": "cam_aux", "shard_size": 3}.items():
        with pytest.raises(ValueError, match=f"(?s)other settings.*  {name}: "):
            export(segmenter, dataset, tmp_path / "out", **({"threshold": 0.3} | {name: other}))
    for name, other in {"scales": (1.0, 0.5), "flip": True, "crf": DenseCRF(backend="torch")}.items():
        with pytest.raises(ValueError, match=f"(?s)other settings.*  {name}: "):
            export(replace(segmenter, **{name: other}), dataset, tmp_path / "out", threshold=0.3)
    columns["labels"][0] = [1]
    retagged = Dataset.from_dict(columns, features=tag_features(CLASSES))
    with pytest.raises(ValueError, match=r"repeat them or choose another directory\n  dataset_sha256: "):
        export(segmenter, retagged, tmp_path / "out", threshold=0.3)
    assert export(segmenter, retagged, tmp_path / "other", threshold=0.3) == 5
    assert export(segmenter, dataset, tmp_path / "out", threshold=0.3) == 0


def test_another_model_is_another_export(segmenter, dataset, tmp_path):
    export(segmenter, dataset, tmp_path / "out")
    with torch.no_grad():
        segmenter.model.classifier.weight[0, 0] += 1e-3
    try:
        with pytest.raises(ValueError, match="weights_sha256: "):
            export(segmenter, dataset, tmp_path / "out")
    finally:
        with torch.no_grad():
            segmenter.model.classifier.weight[0, 0] -= 1e-3


def test_a_directory_with_other_files_is_not_touched(segmenter, dataset, tmp_path):
    mask = tmp_path / "VOC2012" / "SegmentationClassAug" / "plain.png"
    mask.parent.mkdir(parents=True)
    mask.write_bytes(b"drawn by hand")
    with pytest.raises(FileExistsError, match=r"not empty and has no export\.json: choose another directory"):
        export(segmenter, dataset, tmp_path / "VOC2012")
    assert tree(tmp_path / "VOC2012") == {"SegmentationClassAug/plain.png": b"drawn by hand"}
    assert export(segmenter, dataset, tmp_path / "another") == 5


@pytest.mark.parametrize(
    ("format", "write"),
    [
        *(("png", write) for write in (0, 1, 2, 4, 8, 10)),
        ("parquet", 0),
        ("parquet", 2),
        ("coco-json", 1),
        ("coco-json", 3),
    ],
)
def test_full_disk(format, write, segmenter, dataset, tmp_path, monkeypatch):
    """The disk is full at one write after another: what is there is whole, and the next call goes on."""
    export(segmenter, dataset, tmp_path / "whole", format=format)
    count = 0

    @contextmanager
    def until_full(path):
        nonlocal count
        with whole_file(path) as unfinished:
            yield unfinished
            count += 1
            if count > write:
                os.truncate(unfinished, unfinished.stat().st_size // 2)
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(formats, "whole_file", until_full)
    with pytest.raises(OSError, match=r"No space left on device: .*make room and run the same command again"):
        export(segmenter, dataset, tmp_path / "out", format=format)
    monkeypatch.undo()
    whole, there = tree(tmp_path / "whole"), tree(tmp_path / "out")
    assert json.loads(there.pop("export.json"))["complete"] is False
    there = {path: content for path, content in there.items() if not path.startswith(".parts")}
    assert there.items() <= whole.items()
    written = {path: os.lstat(tmp_path / "out" / path).st_mtime_ns for path in there}

    export(segmenter, dataset, tmp_path / "out", format=format)
    assert tree(tmp_path / "out") == whole
    # What the end of an export makes of all parts is made again; a mask never is.
    again = {path for path in written if os.lstat(tmp_path / "out" / path).st_mtime_ns != written[path]}
    assert again <= {"image_labels.json", "classes.txt"}


def test_what_a_killed_export_left_is_removed(segmenter, dataset, tmp_path):
    left = tmp_path / "out" / ".0a1b.unfinished"
    left.parent.mkdir()
    left.write_bytes(b"half")
    export(segmenter, dataset, tmp_path / "out")
    assert not left.exists()
    parts = tmp_path / "out/.parts"  # of one killed when its record said that it is complete
    parts.mkdir()
    (parts / "00000.json").write_text("[]")
    assert export(segmenter, dataset, tmp_path / "out") == 0
    assert not parts.exists()


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_stops_no_other_shard(content, segmenter, dataset, columns, tmp_path):
    broken, good = Path(columns["image"][2]), Path(columns["image"][2]).read_bytes()
    broken.write_bytes(good[: len(good) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"(?s)image 'pets/übung' .*2\.jpg.*replaced, the same command goes on"):
        export(segmenter, dataset, tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out" / "SegmentationClassAug").iterdir()} >= {"plain", "long"}
    with pytest.raises(ValueError, match="this export was interrupted; run the same export again, it goes on"):
        load_pseudo_labels(str(tmp_path / "out"))
    broken.write_bytes(good)
    assert export(segmenter, dataset, tmp_path / "out") == 2
    assert len(load_pseudo_labels(str(tmp_path / "out")).dataset) == 5
    assert set(masks_in_png(tmp_path / "out")) == set(columns["image_id"])


def test_every_unreadable_image_of_a_shard_is_named_once(segmenter, dataset, columns, tmp_path):
    for number in (0, 1, 4):
        Path(columns["image"][number]).write_bytes(b"no image")
    with pytest.raises(ValueError, match="another export, which starts anew in another directory") as refused:
        export(replace(segmenter, batch_size=1), dataset, tmp_path / "out", shard_size=3)
    lines = str(refused.value).splitlines()
    assert len(lines) == 4
    for line, image_id in zip(lines, ("plain", "IMG 12%", "long"), strict=False):
        assert f"image {image_id!r}" in line
    assert "take the image off the split's list" in lines[0]
    assert export(segmenter, dataset.select([2, 3]), tmp_path / "anew") == 2


@pytest.mark.parametrize(
    "record", ["", "{", "[]", "{}", '{"settings": 5, "complete": false}', '{"settings": {"source": "cam"}}']
)
def test_a_broken_record_is_named(record, segmenter, dataset, tmp_path):
    (tmp_path / "export.json").write_text(record)
    with pytest.raises(ValueError, match=r"export\.json is not as an export writes it.*: take another directory"):
        export(segmenter, dataset, tmp_path)
    assert export(segmenter, dataset.select([0]), tmp_path / "another") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "crf"}, "unknown source 'crf'; known: cam, cam_aux, cam_mean, cam_spread, seg"),
        ({"format": "gif"}, "unknown format 'gif'; known: png, parquet, coco-json"),
        ({"threshold": 1.0}, "threshold must lie strictly between 0 and 1, got 1.0"),
        ({"class_threshold": 0.0}, "class_threshold must lie strictly between 0 and 1"),
        ({"shard_size": 0}, "shard_size must be 1 or more, got 0"),
    ],
)
def test_settings_out_of_range(settings, message, segmenter, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(segmenter, dataset, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_datasets_that_cannot_be_exported(segmenter, dataset, columns, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        export(segmenter, dataset.select([]), tmp_path / "out")
    columns["image_id"][4] = "plain"
    with pytest.raises(ValueError, match="plain more than once"):
        export(segmenter, Dataset.from_dict(columns, features=tag_features(CLASSES)), tmp_path / "out")
    columns["image_id"][4] = "long"
    with pytest.raises(ValueError, match="classes are not the model's"):
        export(segmenter, Dataset.from_dict(columns, features=tag_features(CLASSES[::-1])), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_that_only_segments_labels_from_given_tags_alone(segmentation_only, dataset, tmp_path):
    segmenter = Segmenter.from_pretrained(segmentation_only, device="cpu", size=64)
    with pytest.raises(
        ValueError, match="only segments: its masks come from source seg and given tags, got source cam"
    ):
        export(segmenter, dataset, tmp_path / "out")
    with pytest.raises(ValueError, match="got source seg and predicted tags"):
        export(segmenter, dataset, tmp_path / "out", source="seg", class_threshold=0.5)
    assert export(segmenter, dataset, tmp_path / "out", source="seg") == 5
    for image_id, mask in expected_masks(segmenter, dataset, "seg_tags").items():
        np.testing.assert_array_equal(masks_in_png(tmp_path / "out")[image_id], mask)


@pytest.mark.parametrize("number", [254, 255, 300])
def test_masks_have_the_bits_that_the_classes_need(columns, tmp_path, number):
    classes = [f"class {index}" for index in range(number)]
    segmenter = Segmenter(tiny_cosa(classes, decoder_channels=8), square(48))
    columns["labels"] = [[number - 1]] * 5
    dataset = Dataset.from_dict(columns, features=tag_features(classes))
    for format in ("png", "parquet"):
        assert export(segmenter, dataset, tmp_path / format, format=format) == 5
    expected = expected_masks(segmenter, dataset, "cam", 0.5)
    png, parquet = (load_pseudo_labels(str(tmp_path / format)).dataset for format in ("png", "parquet"))
    for written in (png, parquet):
        check_masks(written)
        for row, mask in zip(written, expected.values(), strict=True):
            assert row["mask"].mode == ("P" if number == 254 else "I;16")
            np.testing.assert_array_equal(np.asarray(row["mask"]), mask)
    assert {index for mask in expected.values() for index in np.unique(mask)} == {0, number}


def test_over_long_ids_have_names_of_their_own(segmenter, columns, tmp_path):
    columns["image_id"] = ["x" * 300 + end for end in "abcde"]
    dataset = Dataset.from_dict(columns, features=tag_features(CLASSES))
    assert export(segmenter, dataset, tmp_path / "out") == 5
    written = load_voc(tmp_path / "out", "train", masks=True)
    assert len(set(written["image_id"])) == 5
    assert written["labels"][:] == columns["labels"]


def test_masks_in_the_dataset_are_not_opened(segmenter, columns, tmp_path):
    columns["mask"] = [str(tmp_path / "nowhere.png")] * 5
    dataset = Dataset.from_dict(columns, features=tag_features(CLASSES, masks=True))
    assert export(segmenter, dataset, tmp_path / "out") == 5


def test_upright_images(columns):
    """The fixture is what the tests above need it to be."""
    with Image.open(columns["image"][3]) as image:
        assert image.size == (50, 20)
        assert ImageOps.exif_transpose(image).size == (20, 50)
