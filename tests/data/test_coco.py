import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from images_of import image_of
from PIL import Image

from cosa_hf.data import COCO_CLASSES, class_names, coco, load_coco, read_image, read_mask, undecoded, without_untagged
from cosa_hf.data.coco import read_instances, render_mask

ROOT = Path(__file__).resolve().parents[2]
REAL_COCO = ROOT / "../shared/data/COCO2014"


def box(left, top, right, bottom) -> dict:
    area = (right - left) * (bottom - top)
    return {"area": float(area), "segmentation": [[left, top, right, top, right, bottom, left, bottom]]}


@pytest.fixture
def coco_dir(tmp_path) -> Path:
    """Three images: a cat on a couch; a crowd of people; nothing."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "val2014").mkdir()
    crowd = {"area": 12.0, "iscrowd": 1, "segmentation": {"size": [8, 11], "counts": [8, 12, 68]}}
    objects = [(1, 63, box(1, 1, 9, 7)), (1, 17, box(2, 2, 5, 5)), (2, 1, crowd)]
    content = {
        "images": [
            {"id": number, "file_name": f"COCO_val2014_{number}.jpg", "width": 9 + number, "height": 8}
            for number in (1, 2, 3)
        ],
        "annotations": [
            {"id": index, "image_id": image, "category_id": category} | shape
            for index, (image, category, shape) in enumerate(objects)
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 17, "name": "cat"}, {"id": 63, "name": "couch"}],
    }
    (root / "annotations/instances_val2014.json").write_text(json.dumps(content))
    for image in content["images"]:
        image_of(image["width"], 8).save(root / "val2014" / image["file_name"])
    return root


def test_tags_and_images(coco_dir):
    dataset = load_coco(coco_dir, "val2014")
    names = class_names(dataset)
    assert len(names) == 80
    assert (names[0], names[-1]) == ("person", "toothbrush")
    assert [[names[label] for label in labels] for labels in dataset["labels"]] == [["cat", "couch"], ["person"], []]
    assert dataset["image_id"][:] == ["COCO_val2014_1", "COCO_val2014_2", "COCO_val2014_3"]
    assert [image.size for image in dataset["image"]] == [(10, 8), (11, 8), (12, 8)]
    tagged, dropped = without_untagged(dataset)
    assert (len(tagged), dropped) == (2, ["COCO_val2014_3"])


def test_the_converter_writes_masks_once_that_the_reader_reads(coco_dir, cosa_hf):
    with pytest.raises(FileNotFoundError, match=rf"cosa-hf convert coco-masks --data_dir {coco_dir} --split val2014"):
        load_coco(coco_dir, "val2014", masks=True)
    (coco_dir / "masks/val2014").mkdir(parents=True)
    Image.new("L", (12, 8), 9).save(coco_dir / "masks/val2014/COCO_val2014_3.png")
    printed = cosa_hf("convert", "coco-masks", "--data_dir", coco_dir, "--split", "val2014", "--num_workers", 1)
    assert "3 masks in" in printed
    assert "2 written, 1 were there; 1 images have no annotation" in printed
    rows = list(undecoded(load_coco(coco_dir, "val2014", masks=True)))
    masks = [np.asarray(read_mask(row, read_image(row).size, num_classes=80)) for row in rows]
    cat, couch = COCO_CLASSES.index("cat") + 1, COCO_CLASSES.index("couch") + 1
    expected = np.zeros((8, 10), np.uint8)
    expected[1:7, 1:9] = couch
    expected[2:5, 2:5] = cat
    assert np.array_equal(masks[0], expected)
    assert np.count_nonzero(masks[1] == 1) == 12, "a crowd is of its class"
    assert (masks[2] == 9).all(), "what was there stays"
    assert Image.open(coco_dir / "masks/val2014/COCO_val2014_1.png").mode == "P"


def test_smaller_objects_are_on_top():
    large, small = box(0, 0, 8, 8), box(2, 2, 4, 4)
    for objects in ([(0, large), (1, small)], [(1, small), (0, large)]):
        ids = render_mask(8, 8, objects)
        assert (ids[3, 3], ids[0, 0]) == (2, 1)
    assert render_mask(8, 8, [(4, small), (5, small)])[3, 3] == 5, "of equal areas the first is on top"


def test_what_is_missing_is_named(coco_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"instances_train2014.json; splits found: val2014"):
        load_coco(coco_dir, "train2014")
    with pytest.raises(FileNotFoundError, match="splits found: none"):
        load_coco(tmp_path / "nowhere", "train2014")
    (coco_dir / "val2014/COCO_val2014_2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 file \(COCO_val2014_2.jpg\) of 3"):
        load_coco(coco_dir, "val2014")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("annotations"), "KeyError: 'annotations'"),
        (
            lambda content: content["categories"].append({"id": 4, "name": "unicorn"}),
            "has no category unicorn: classes of your own",
        ),
        (lambda content: content["images"][0].pop("id"), r"1 image \(COCO_val2014_1.jpg\) without id"),
        (
            lambda content: content["images"][1].update(id=1),
            r"gives 1 id \(1 of COCO_val2014_1.jpg and COCO_val2014_2.jpg\) to more than one image",
        ),
        (
            lambda content: content["images"][1].update(file_name="COCO_val2014_1.png"),
            r"1 name \(COCO_val2014_1 of COCO_val2014_1.jpg and COCO_val2014_1.png\) to more than one image",
        ),
        (
            lambda content: content["annotations"][2].update(image_id="2"),
            r"1 annotation \(2 with image_id '2' and category_id 1\) of an image or category that it does not list",
        ),
        (lambda content: content["annotations"][0].update(category_id=99), "0 with image_id 1 and category_id 99"),
        (lambda content: content["images"].append(content["images"][0]), r"1 image \(COCO_val2014_1.jpg\) more than"),
        (lambda content: content["images"].clear(), "lists no images"),
    ],
)
def test_annotations_that_cannot_be_read(coco_dir, damage, message):
    path = coco_dir / "annotations/instances_val2014.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_coco(coco_dir, "val2014")


@pytest.mark.parametrize(
    ("part", "damage", "advice", "mended"),
    [
        ("images", {"id": 1}, "to more than one image: each needs its own", {"id": 2}),
        ("images", {"file_name": "COCO_val2014_1.png"}, "each needs its own", {"file_name": "COCO_val2014_2.jpg"}),
        ("annotations", {"image_id": "2"}, "ids must be equal in type too", {"image_id": 2}),
        ("annotations", {"category_id": "1"}, "ids must be equal in type too", {"category_id": 1}),
    ],
)
def test_what_an_error_advises_works(coco_dir, part, damage, advice, mended):
    path = coco_dir / "annotations/instances_val2014.json"
    content = json.loads(path.read_text())
    described = content[part][1 if part == "images" else 2]
    path.write_text(
        json.dumps(content | {part: [{**one, **(damage if one is described else {})} for one in content[part]]})
    )
    with pytest.raises(ValueError, match=advice):
        load_coco(coco_dir, "val2014")
    described |= mended
    path.write_text(json.dumps(content))
    assert len(load_coco(coco_dir, "val2014")) == 3


def test_directories_lie_side_by_side_as_the_error_says(coco_dir):
    (coco_dir / "zips").mkdir()
    (coco_dir / "annotations").rename(coco_dir / "zips/annotations")
    with pytest.raises(
        FileNotFoundError, match=r"expected COCO's annotations/, .* and val2014/, unzipped side by side"
    ):
        load_coco(coco_dir, "val2014")
    (coco_dir / "zips/annotations").rename(coco_dir / "annotations")
    assert len(load_coco(coco_dir, "val2014")) == 3


def test_an_annotation_without_an_outline_is_removed_or_drawn_as_the_error_says():
    drawn, empty = (0, box(0, 0, 2, 2)), {"id": 7, "area": 4.0, "segmentation": []}
    with pytest.raises(ValueError, match=r"annotation 7 .* remove the annotation or draw its outline"):
        render_mask(4, 4, [drawn, (1, empty)])
    assert np.unique(render_mask(4, 4, [drawn])).tolist() == [0, 1]
    assert np.unique(render_mask(4, 4, [drawn, (1, empty | box(2, 2, 4, 4))])).tolist() == [0, 1, 2]


def test_annotations_with_the_signature_of_utf_8(coco_dir):
    path = coco_dir / "annotations/instances_val2014.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(load_coco(coco_dir, "val2014")) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"segmentation": []}, "annotation 7 cannot be drawn: ValueError: its segmentation is empty"),
        ({"segmentation": [[]]}, "annotation 7 cannot be drawn: ValueError: its segmentation is empty"),
        ({"segmentation": [[1, 1]]}, "annotation 7 cannot be drawn: Exception: input type is not supported"),
        (
            {"segmentation": {"size": [4, 5], "counts": [0, 20]}},
            r"annotation 7 cannot be drawn: ValueError: its RLE has the size \[4, 5\], the image \[4, 4\]",
        ),
        ({"segmentation": None}, "annotation 7 cannot be drawn: TypeError"),
        ({"area": None}, r"1 annotation \(7\) without a number as area"),
    ],
)
def test_annotations_that_cannot_be_drawn_are_named(damage, message):
    with pytest.raises(ValueError, match=message):
        render_mask(4, 4, [(0, {"id": 7} | box(0, 0, 2, 2) | damage)])


def test_the_converter_names_the_image_too(tmp_path):
    with pytest.raises(ValueError, match=r"^no mask for photo: annotation 7 cannot be drawn: .* is empty"):
        coco._write_mask(tmp_path / "photo.png", (4, 4), [(0, {"id": 7, "area": 1, "segmentation": []})])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"height": None}, r"^error: the annotations give no height and width for 1 image \(COCO_val2014_2.jpg\)$"),
        ({"file_name": "COCO_val2014_1.png"}, r"^error: .* to more than one image: each needs its own$"),
    ],
)
def test_the_converter_names_images_that_it_cannot_write(coco_dir, damage, message, complaint):
    path = coco_dir / "annotations/instances_val2014.json"
    content = json.loads(path.read_text())
    content["images"][1] |= damage
    path.write_text(json.dumps(content))
    said = complaint("convert", "coco-masks", "--data_dir", coco_dir, "--split", "val2014")
    assert re.match(message, said)
    assert not (coco_dir / "masks").exists()


def test_without_pycocotools_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r'pip install "cosa-hf\[coco\]"'):
        render_mask(4, 4, [(0, box(0, 0, 2, 2))])


@pytest.mark.skipif(not REAL_COCO.is_dir(), reason="needs the COCO images beside the repository")
def test_real_masks_equal_pycocotools_pixel_by_pixel_and_stay_what_they_are():
    """Against the library's own reading of the JSON, and against a checksum, so that no change goes unseen."""
    from pycocotools.coco import COCO

    digest, crowds = hashlib.sha256(), 0
    for split, count in (("train2014", 170), ("val2014", 130)):
        instances = read_instances(REAL_COCO, split)
        official = COCO(REAL_COCO / f"annotations/instances_{split}.json")
        position = {category: index + 1 for index, category in enumerate(sorted(official.getCatIds()))}
        names = [category["name"] for category in official.loadCats(sorted(official.getCatIds()))]
        assert tuple(names) == COCO_CLASSES
        assert len(instances.images) == count
        for image in instances.images:
            size = (image["height"], image["width"])
            ids = render_mask(*size, instances.objects[image["id"]])
            expected, smallest = np.zeros(size, np.uint8), np.full(size, np.inf)
            for annotation in official.imgToAnns[image["id"]]:
                crowds += annotation["iscrowd"]
                on_top = (official.annToMask(annotation) == 1) & (annotation["area"] < smallest)
                expected[on_top] = position[annotation["category_id"]]
                smallest[on_top] = annotation["area"]
            assert np.array_equal(ids, expected), image["file_name"]
            digest.update(ids.tobytes())
    assert crowds == 30
    assert digest.hexdigest() == "4bab164e65a5b3e6c24c395df0684dc441e77048a20721325fd80b322301327d"


@pytest.mark.skipif(not REAL_COCO.is_dir(), reason="needs the COCO images beside the repository")
def test_real_images():
    dataset = undecoded(load_coco(REAL_COCO, "val2014"))
    assert len(dataset) == 130
    assert sum(not labels for labels in dataset["labels"]) == 2
    assert read_image(dataset[0]).mode == "RGB"
