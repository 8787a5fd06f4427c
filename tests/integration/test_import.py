"""`cosa-hf import` as a user runs it: from docs/own-data.md, and from what an error says."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
from exports import FILES, TABLES, write_exports
from in_process import ROOT
from PIL import Image

from cosa_hf.data import class_names, load_coco, load_folder

GUIDE = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
(EXAMPLES,) = (
    block for block in re.findall(r"^```sh\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE) if "import" in block
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    color = tuple(61 * byte % 256 for byte in (len(str(path)), *path.name.encode()[:2]))  # no two alike
    Image.new("RGB", (8, 8), color).save(path)


def tags_of(root, split="train"):
    dataset = load_folder(root, split)
    names = class_names(dataset)
    return {
        image: [names[label] for label in labels]
        for image, labels in zip(dataset["image_id"], dataset["labels"], strict=True)
    }


def refused(root, split="train"):
    """What the reader says, and the arguments of the command in it, if there is one."""
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_folder(root, split)
    said = str(raised.value)
    command = re.search(r"`cosa-hf (import .*?)`", said)
    return said, shlex.split(command[1]) if command else None


def test_the_guide_shows_each_format_in_three_lines(here, cosa_hf):
    write_exports(here)
    examples = EXAMPLES.strip().split("\n\n")
    assert len(examples) == len(TABLES)
    for example in examples:
        first, second, command = example.splitlines()
        path, _, line = first.removeprefix("# ").partition(": ")
        for excerpt in (line, second.removeprefix("#").strip()) if path in FILES else ():
            assert excerpt in FILES[path]
        cosa_hf(*shlex.split(command)[1:])
        table = Path(shlex.split(command)[-1])
        with table.open(encoding="utf-8", newline="") as file:
            read = {row["file_name"]: (row["labels"], row.get("split", "")) for row in csv.DictReader(file)}
        assert read == TABLES[table.parent.name]


def test_what_it_says(here, cosa_hf, complaint):
    write_exports(here)
    line = ("import", "one-hot", "roboflow/_classes.csv", "--output", "roboflow/metadata.csv")
    said = cosa_hf(*line)
    assert "3 images, 2 classes; 1 verified to have none of them, 0 untagged" in said
    assert "next: cosa-hf check --dataset folder --data_dir roboflow" in said
    assert complaint(*line) == "error: roboflow/metadata.csv exists: move it away, or pass --overwrite\n"
    assert "2 classes" in cosa_hf(*line, "--overwrite")
    Path("roboflow/metadata.csv").rename("moved.csv")
    assert "2 classes" in cosa_hf(*line)
    assert "call it metadata.csv" in complaint(*line[:-1], "roboflow/tags.csv")
    assert complaint("import", "csv", "gone.csv", *line[3:], "--overwrite") == "error: no file gone.csv\n"
    names = ("--names", "openimages/names.csv", "--output", "openimages/metadata.csv")
    said = cosa_hf("import", "csv", "openimages/labels.csv", *names)
    assert said.startswith("1 tags of a confidence below 1 were left out: Cat\n")
    assert "1 verified to have none of them, 1 untagged" in said
    said = cosa_hf("import", "csv", "openimages/labels.csv", *names, "--min_confidence", 0.5, "--overwrite")
    assert said.startswith("openimages/metadata.csv: ")
    Path("roboflow/3.jpg").unlink()
    assert "lacks 1 image (3.jpg)" in complaint(*line, "--overwrite")
    assert "1 images that are not there were left out: 3.jpg" in cosa_hf(*line, "--overwrite", "--skip_missing")


def test_several_exports_become_one_table(here, cosa_hf):
    for split in ("train", "valid"):
        photo(here / split / "1.jpg")
        (here / split / "_classes.csv").write_text(f"filename,cat,{split}\n1.jpg,1,1\n")
    cosa_hf("import", "one-hot", "train/_classes.csv", "valid/_classes.csv", "--output", "metadata.csv")
    assert tags_of(here) == {"train_1": ["cat", "train"]}
    assert tags_of(here, "val") == {"valid_1": ["cat", "valid"]}


def test_an_export_beside_the_photos(here, cosa_hf):
    photo(here / "1.jpg")
    photo(here / "images/2.jpg")
    (here / "_classes.csv").write_text("filename,cat,dog\n1.jpg,1,1\n2.jpg,0,1\n")
    said, command = refused(here)
    assert said.startswith(f"{here} has _classes.csv: `cosa-hf import one-hot ")
    cosa_hf(*command)
    assert tags_of(here) == {"1": ["cat", "dog"], "images_2": ["dog"]}


def test_annotations_of_voc_among_the_photos(here, cosa_hf):
    for number, name in enumerate(("cat", "dog")):
        photo(here / f"{number}.jpg")
        (here / f"{number}.xml").write_text(f"<annotation><object><name>{name}</name></object></annotation>")
    _, command = refused(here)
    cosa_hf(*command)
    assert tags_of(here) == {"0": ["cat"], "1": ["dog"]}


def test_photos_with_keywords(here, cosa_hf):
    write_exports(here)
    said, command = refused(here / "lightroom")
    assert "keywords inside the photos go through" in said
    cosa_hf(*command)
    assert tags_of(here / "lightroom") == {"1": ["Gänse", "garden chair"], "2": ["cat"], "3": []}


def test_an_export_in_a_directory_of_its_own(here, cosa_hf):
    photo(here / "fold1/1.jpg")
    (here / "fold1/_annotations.csv").write_text("filename,class\n1.jpg,cat\n")
    said, _ = refused(here)
    assert f"so 'fold1' is not a tag: pass {here / 'fold1'} as --data_dir" in said
    _, command = refused(here / "fold1")
    cosa_hf(*command)
    assert tags_of(here / "fold1") == {"1": ["cat"]}


@pytest.mark.parametrize(
    ("name", "content", "tags"),
    [
        ("metadata.csv", "filename,cat,dog\n1.jpg,1,0\n2.jpg,1,1\n", {"1": ["cat"], "2": ["cat", "dog"]}),
        ("metadata.csv", "file_name;labels\n1.jpg;cat\n2.jpg;dog, cat\n", {"1": ["cat"], "2": ["cat", "dog"]}),
        ("metadata.csv", "file_name,labels\n1.jpg,cat\n2.jpg,cat\n2.jpg,dog\n", {"1": ["cat"], "2": ["cat", "dog"]}),
        (
            "tags.json",
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
                    "categories": [{"id": 1, "name": "cat"}],
                    "annotations": [{"id": 1, "image_id": 2, "category_id": 1}],
                }
            ),
            {"1": [], "2": ["cat"]},
        ),
        (
            "tags.json",
            json.dumps([{"image": f"{n}.jpg", "choice": "cat", "annotator": 1} for n in (1, 2)]),
            {"1": ["cat"], "2": ["cat"]},
        ),
    ],
)
def test_an_export_in_place_of_the_table(name, content, tags, here, cosa_hf):
    for number in (1, 2):
        photo(here / f"{number}.jpg")
    (here / name).write_text(content)
    said, command = refused(here)
    (export,) = re.findall(r"rename it to (\S+), and then", said)
    (here / name).rename(here / export)
    cosa_hf(*command)
    assert tags_of(here) == tags


def test_a_table_of_load_datasets(here, cosa_hf):
    photo(here / "1.jpg")
    (here / "metadata.jsonl").write_text('{"file_name": "1.jpg", "label": "cat"}\n')
    said, command = refused(here)
    assert said.endswith("and then move metadata.jsonl away")
    cosa_hf(*command)
    (here / "metadata.jsonl").unlink()
    assert tags_of(here) == {"1": ["cat"]}


def test_coco_with_classes_of_ones_own(here, cosa_hf):
    photo(here / "train/1.jpg")
    (here / "annotations").mkdir()
    (here / "annotations/instances_train.json").write_text(
        '{"images": [{"id": 1, "file_name": "1.jpg"}], "categories": [{"id": 1, "name": "scratch"}],'
        '"annotations": [{"id": 1, "image_id": 1, "category_id": 1}]}'
    )
    with pytest.raises(ValueError, match="COCO, which has no category scratch") as raised:
        load_coco(here, "train")
    cosa_hf(*shlex.split(re.search(r"`cosa-hf (import .*?)`", str(raised.value))[1]))
    assert tags_of(here) == {"train_1": ["scratch"]}


def test_tags_that_blanks_separate(here, cosa_hf):
    for name in ("1", "2", "3"):
        photo(here / f"{name}.jpg")
    (here / "metadata.csv").write_text("file_name,labels\n1.jpg,haze primary\n2.jpg,haze\n3.jpg,primary\n")
    said = cosa_hf("check", "--dataset", "folder", "--data_dir", here, "--num_workers", 0)
    assert "class 'haze primary': haze + primary" in said
    command = shlex.split(re.search(r"`cosa-hf (import .*?)`", said)[1])
    (here / "metadata.csv").rename(here / "export.csv")
    cosa_hf(*command)
    assert tags_of(here) == {"1": ["haze", "primary"], "2": ["haze"], "3": ["primary"]}
