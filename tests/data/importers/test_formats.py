"""Every format of importers, on what its tool writes."""

import csv
import json
from pathlib import Path

import pytest
from exports import FILES, TABLES, write_exports

from cosa_hf.data.importers import FORMATS, ImportOptions, gather, import_command, read_names, write_table

EXPORTS = {
    "roboflow": ("one-hot", "_classes.csv"),
    "openimages": ("csv", "labels.csv"),
    "kaggle": ("csv", "train.csv"),
    "labelstudio": ("label-studio", "export.json"),
    "cvat": ("cvat", "annotations.xml"),
    "own-coco": ("coco", "instances.json"),
    "own-voc": ("voc", "Annotations"),
    "hf": ("imagefolder", "."),
    "lightroom": ("keywords", "."),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    write_exports(root)
    return root


def imported(format, path, root=None, verified=False, **options):
    """The table of an export: image -> (tags, split)."""
    root = root or path.parent
    directory = path if path.is_dir() else path.parent
    rows = [(directory, row) for row in FORMATS[format].read(path, ImportOptions(**options))]
    images, _ = gather(rows, root, ImportOptions(**options), verified)
    write_table(images, root / "metadata.csv")
    with (root / "metadata.csv").open(encoding="utf-8", newline="") as file:
        table = {row["file_name"]: (row["labels"], row.get("split", "")) for row in csv.DictReader(file)}
    (root / "metadata.csv").unlink()
    return table


def options_of(directory, exports):
    return {
        "openimages": {"names": read_names(exports / "openimages/names.csv")},
        "kaggle": {"tag_separator": " "},
    }.get(directory, {})


@pytest.mark.parametrize("directory", TABLES)
def test_what_each_tool_exports(directory, exports):
    format, name = EXPORTS[directory]
    table = imported(format, exports / directory / name, exports / directory, **options_of(directory, exports))
    assert table == TABLES[directory]


@pytest.mark.parametrize("directory", [name for name in TABLES if name != "hf"])
def test_an_export_is_known_by_its_content(directory, exports):
    format, name = EXPORTS[directory]
    path = exports / directory / name
    if path.is_file():
        assert import_command(path, Path("metadata.csv")) == f"cosa-hf import {format} {path} --output metadata.csv"
    assert FORMATS[format].recognises(path)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def photos(exports):
    return exports / "labelstudio"


MIN = [
    {"image": "1.jpg", "id": 1, "animals": {"choices": ["cat", "dog"]}, "annotator": 1, "lead_time": 2.5},
    {"image": "/data/upload/9f8e7d6c-2.jpg", "id": 2, "animals": "cat", "annotator": 1},
    {"image": "3.jpg", "id": 3, "annotator": 1},
]


def test_label_studio_json_min_and_csv(photos, tmp_path):
    expected = {"1.jpg": ("cat; dog", ""), "2.jpg": ("cat", ""), "3.jpg": ("", "")}
    path = write(tmp_path / "min.json", MIN)
    assert imported("label-studio", path, photos) == expected
    assert FORMATS["label-studio"].recognises(path)
    lines = ["image,id,animals,annotator"]
    lines += ['1.jpg,1,"{""choices"":[""cat"",""dog""]}",1', "/data/upload/9f8e7d6c-2.jpg,2,cat,1", "3.jpg,3,,1"]
    path = write(tmp_path / "export.csv", "\n".join(lines))
    assert imported("label-studio", path, photos) == expected
    assert FORMATS["label-studio"].recognises(path)


def test_label_studio_json_and_json_min_in_one_file(photos, tmp_path):
    result = {"from_name": "animals", "type": "choices", "value": {"choices": ["cat"]}}
    full = {"data": {"image": "2.jpg"}, "annotations": [{"result": [result]}]}
    expected = {"1.jpg": ("cat; dog", ""), "2.jpg": ("cat", "")}
    assert imported("label-studio", write(tmp_path / "both.json", [MIN[0], full]), photos) == expected


def test_label_studio_boxes_polygons_and_taxonomies(photos, tmp_path):
    regions = [{"x": 1, "rectanglelabels": ["cat"]}, {"points": [], "polygonlabels": ["dog"]}]
    tasks = [{"image": "1.jpg", "label": regions}, {"image": "2.jpg", "label": [{"brushlabels": ["dog"]}]}]
    path = write(tmp_path / "min.json", tasks)
    assert imported("label-studio", path, photos) == {"1.jpg": ("cat; dog", ""), "2.jpg": ("dog", "")}
    result = {"from_name": "kind", "type": "taxonomy", "value": {"taxonomy": [["animal", "cat"], ["thing"]]}}
    task = {"data": {"image": "1.jpg"}, "annotations": [{"result": [result]}]}
    assert imported("label-studio", write(tmp_path / "t.json", [task]), photos) == {"1.jpg": ("cat; thing", "")}


def test_label_studio_with_several_controls(photos, tmp_path):
    values = {"quality": {"choices": ["sharp"]}, "animals": {"choices": ["cat"]}}
    results = [{"from_name": name, "type": "choices", "value": value} for name, value in values.items()]
    full = write(tmp_path / "full.json", [{"data": {"image": "1.jpg"}, "annotations": [{"result": results}]}])
    flat = write(tmp_path / "min.json", [{"image": "1.jpg"} | values])
    for path in (full, flat):
        with pytest.raises(ValueError, match=r"animals.*quality.*|quality.*animals.*--tag_column"):
            imported("label-studio", path, photos)
        assert imported("label-studio", path, photos, tag_column="animals") == {"1.jpg": ("cat", "")}


def test_looked_at_and_nothing_found(exports, tmp_path):
    tasks = json.loads(FILES["labelstudio/export.json"])
    tasks[2]["annotations"] = [{"result": []}]
    table = imported("label-studio", write(tmp_path / "x.json", tasks), exports / "labelstudio", verified=True)
    assert table == {"1.jpg": ("cat; dog", ""), "2.jpg": ("", ""), "3.jpg": ("-", "")}, "2.jpg was not looked at"
    table = imported("coco", exports / "own-coco/instances.json", verified=True)
    assert table == {"1.jpg": ("cat", ""), "2.jpg": ("-", "")}


def test_a_column_for_each_class(photos, tmp_path):
    text = "id;image;cat;dog;Unlabeled;split\n7;1.jpg;1.0;0.0;0;train\n8;2.jpg;0;;0;valid\n9;3.jpg;0;0;1;train\n"
    path = write(tmp_path / "x.csv", text)
    with pytest.raises(ValueError, match=r"line 2: id is '7', neither 0 nor 1: pass --classes"):
        imported("one-hot", path, photos)
    table = imported("one-hot", path, photos, classes=["cat", "dog", "Unlabeled"])
    assert table == {"1.jpg": ("cat", "train"), "2.jpg": ("", "valid"), "3.jpg": ("", "train")}
    with pytest.raises(ValueError, match=r"no column of a file: pass --file_column with one of picture, cat"):
        imported("one-hot", write(tmp_path / "y.csv", "picture,cat\n1.jpg,1\n"), photos)
    assert imported("one-hot", tmp_path / "y.csv", photos, file_column="picture") == {"1.jpg": ("cat", "")}


def test_a_row_for_each_tag_and_masks(photos, tmp_path):
    text = (
        "file_name\tlabels\tsplit\tmask_file_name\n1.jpg\tcat\tval\tm/1.png\n1.jpg\tdog\tval\tm/1.png\n2.jpg\tdog\t\t\n"
    )
    rows = [(tmp_path, row) for row in FORMATS["csv"].read(write(tmp_path / "x.tsv", text), ImportOptions())]
    images, _ = gather(rows, photos, ImportOptions())
    write_table(images, tmp_path / "metadata.csv")
    assert (tmp_path / "metadata.csv").read_text().splitlines() == [
        "file_name,labels,split,mask_file_name",
        "1.jpg,cat; dog,val,m/1.png",
        "2.jpg,dog,,",
    ]


@pytest.mark.parametrize(
    ("format", "name", "content", "message"),
    [
        ("csv", "x.csv", "image,label\n1.jpg,/m/01yrx\n", "line 2, column label: /m/01yrx is an id: pass --names"),
        ("csv", "x.csv", "image,label\n1.jpg,3\n2.jpg,4\n", "the tags are numbers: pass --names"),
        (
            "csv",
            "x.csv",
            "image,label,class\n1.jpg,3,cat\n",
            "label and class could all be the tags: pass --tag_column",
        ),
        ("csv", "x.csv", "image,kind\n1.jpg,cat\n", "no column of a tag: pass --tag_column with one of kind"),
        ("csv", "x.csv", "image,label\n1.jpg,[cat\n", r"line 2, column label: '\[cat' is not a tag"),
        ("csv", "x.csv", "image,label,Confidence\n1.jpg,cat,high\n", "the confidence 'high' is not a number"),
        ("label-studio", "x.json", {"a": 1}, "is not a list of tasks"),
        ("label-studio", "x.json", [{"text": "a", "choice": "cat"}], "no images: pass --file_column with one of text"),
        ("cvat", "x.xml", "<annotations><track/></annotations>", 'export from CVAT as "CVAT for images 1.1"'),
        ("cvat", "x.xml", "<annotations>", "is not valid XML"),
        ("coco", "x.json", {"images": []}, "KeyError: 'categories'"),
        (
            "coco",
            "x.json",
            {"images": [], "categories": [], "annotations": [{"id": 5, "image_id": 1, "category_id": 1}]},
            "annotation 5 is of an image or category that is not listed",
        ),
        ("voc", "x.xml", "<annotations/>", "is not an annotation of VOC: its outermost element is annotations"),
    ],
)
def test_an_export_that_cannot_be_read_says_where(format, name, content, message, photos, tmp_path):
    with pytest.raises(ValueError, match=message):
        imported(format, write(tmp_path / name, content), photos)


ONE_TASK = [{"left": "1.jpg", "right": "2.jpg", "choice": "cat"}]


@pytest.mark.parametrize(
    ("format", "content", "advice", "options"),
    [
        ("csv", "image,label,class\n1.jpg,3,cat\n", "pass --tag_column with one of label,", {"tag_column": "class"}),
        ("csv", "image,kind\n1.jpg,cat\n", "pass --tag_column with one of kind", {"tag_column": "kind"}),
        ("csv", "photo,label\n1.jpg,cat\n", "pass --file_column with one of photo, label", {"file_column": "photo"}),
        ("csv", "image,label\n1.jpg,3\n", "pass --names with a CSV file of their names", {"names": {"3": "cat"}}),
        ("csv", "image,label\n1.jpg,/m/01yrx\n", "pass --names with the file of", {"names": {"/m/01yrx": "cat"}}),
        ("one-hot", "image,id,cat\n1.jpg,7,1\n", "pass --classes with the columns that are", {"classes": ["cat"]}),
        ("label-studio", [{"photo": "1", "choice": "cat"}], "pass --file_column with one of", {"file_column": "photo"}),
        ("label-studio", ONE_TASK, "2 images: pass --file_column with one of left, right", {"file_column": "left"}),
    ],
)
def test_what_an_error_advises_works(format, content, advice, options, photos, tmp_path):
    path = write(tmp_path / ("x.json" if format == "label-studio" else "x.csv"), content)
    with pytest.raises(ValueError, match=advice):
        imported(format, path, photos)
    assert imported(format, path, photos, **options) == {"1.jpg": ("cat", "")}


CVAT_VIDEO = (
    '<annotations><version>1.1</version><track id="0" label="cat"><box frame="0" xtl="1"/></track></annotations>'
)
CVAT_IMAGES = (
    "<annotations><version>1.1</version><meta><task><labels><label><name>cat</name></label></labels></task></meta>"
    '<image id="0" name="1.jpg"><tag label="cat"/></image></annotations>'
)
CHOICE = {"from_name": "choice", "type": "choices", "value": {"choices": ["cat"]}}
LABEL_STUDIO = {
    "full.json": [{"id": 1, "annotations": [{"result": [CHOICE]}], "data": {"image": "/data/upload/1/0a1b2c3d-1.jpg"}}],
    "min.json": [{"image": "/data/upload/1/0a1b2c3d-1.jpg", "id": 1, "choice": "cat", "annotator": 1}],
    "x.csv": "image,id,choice,annotator\n/data/upload/1/0a1b2c3d-1.jpg,1,cat,1\n",
}


@pytest.mark.parametrize(
    ("format", "other", "advice", "advised"),
    [
        ("cvat", CVAT_VIDEO, 'export from CVAT as "CVAT for images 1.1"', {"x.xml": CVAT_IMAGES}),
        ("cvat", FILES["own-voc/Annotations/1.xml"], 'export from CVAT as "CVAT for', {"x.xml": CVAT_IMAGES}),
        (
            "label-studio",
            json.loads(FILES["own-coco/instances.json"]),
            "export from Label Studio as JSON, JSON-MIN or CSV",
            LABEL_STUDIO,
        ),
    ],
)
def test_an_export_in_another_form_is_read_in_those_that_the_error_names(
    format, other, advice, advised, photos, tmp_path
):
    with pytest.raises(ValueError, match=advice):
        imported(format, write(tmp_path / "other", other), photos)
    for name, content in advised.items():
        assert imported(format, write(tmp_path / name, content), photos) == {"1.jpg": ("cat", "")}


def test_names_of_ids_are_completed_as_the_errors_say(photos, tmp_path):
    export, names = write(tmp_path / "x.csv", "image,label\n1.jpg,3\n"), tmp_path / "names.csv"
    with pytest.raises(ValueError, match=r"names.csv, line 1: expected an id and a name, as in 3,cat; got 'dog'"):
        read_names(write(names, "dog"))
    with pytest.raises(ValueError, match=r"--names has no name for 3: add the line 3,NAME to its file"):
        imported("csv", export, photos, names=read_names(write(names, "4,dog\n")))
    table = imported("csv", export, photos, names=read_names(write(names, "4,dog\n3,NAME\n")))
    assert table == {"1.jpg": ("NAME", "")}


def test_annotations_of_voc_lie_in_the_directory_that_is_asked_for(exports):
    root = exports / "own-voc"
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="has no XML files: pass the directory of the annotations"):
        imported("voc", root / "empty", root)
    (root / "empty").rmdir()
    assert imported("voc", root / "Annotations", root) == TABLES["own-voc"]


def test_a_photo_that_cannot_be_read_is_named(exports, tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"not a photo")
    (tmp_path / "2.png").write_bytes((exports / "lightroom/2.png").read_bytes())
    with pytest.raises(ValueError, match=r"1\.jpg cannot be read: .*; replace it or take it out"):
        imported("keywords", tmp_path)
    (tmp_path / "1.jpg").write_bytes((exports / "lightroom/1.jpg").read_bytes())
    assert list(imported("keywords", tmp_path, tmp_path)) == ["1.jpg", "2.png"]
    (tmp_path / "1.jpg").unlink()
    assert list(imported("keywords", tmp_path, tmp_path)) == ["2.png"]


def test_a_folder_in_brackets_is_named_and_can_be_renamed(exports, tmp_path):
    brackets = tmp_path / "hf[1]"
    (exports / "hf").rename(brackets)
    try:
        with pytest.raises(ValueError, match=r"takes \[ \] in '.*hf\[1\]' for a pattern: rename the directory"):
            imported("imagefolder", brackets)
    finally:
        brackets.rename(exports / "hf")
