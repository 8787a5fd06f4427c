import functools

import pytest

import cosa_hf.data
from cosa_hf.data import COEXISTENCE_CLASSES, DatasetOptions, class_names, load_dataset_by_name, load_shapes


def test_known_names(voc_dir):
    assert load_dataset_by_name("voc", voc_dir, "train").num_rows == 3
    assert "mask" in load_dataset_by_name("voc", voc_dir, "train", masks=True).column_names
    shapes = load_dataset_by_name("shapes", None, "val")
    assert shapes.num_rows == 200
    assert set(COEXISTENCE_CLASSES) == {"voc", "coco", "shapes", "folder", "hub"}
    assert set(COEXISTENCE_CLASSES["shapes"]) < set(class_names(shapes))


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="unknown dataset 'imagenet'; known: voc, coco, shapes"):
        load_dataset_by_name("imagenet", None, "train")


def test_directory_must_fit(tmp_path):
    with pytest.raises(ValueError, match="'voc' needs data_dir"):
        load_dataset_by_name("voc", None, "train")
    with pytest.raises(ValueError, match="'shapes' is generated"):
        load_dataset_by_name("shapes", tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "data_dir", "options", "advice", "followed"),
    [
        ("shapes", "somewhere", {}, "leave data_dir out", {"data_dir": None}),
        ("voc", None, {}, "needs data_dir", {"data_dir": "voc"}),
        ("hub", None, {}, "needs dataset_name, a name on the Hub or a local path", {"dataset_name": "saved"}),
        ("hub", "saved", {"dataset_name": "saved"}, "and no data_dir", {"data_dir": None, "dataset_name": "saved"}),
        ("imagenet", None, {}, "known: voc, coco, shapes, folder, hub", {"name": "shapes"}),
        ("shapes", None, {"classes": ["cat"]}, "has classes of its own", {"classes": None}),
    ],
)
def test_what_an_error_advises_works(name, data_dir, options, advice, followed, voc_dir, monkeypatch):
    monkeypatch.chdir(voc_dir.parent)
    monkeypatch.setattr(cosa_hf.data, "load_shapes", functools.partial(load_shapes, num_images=1))  # of 2,000
    voc_dir.rename("voc")
    load_dataset_by_name("voc", "voc", "train").to_parquet("saved/train.parquet")
    with pytest.raises(ValueError, match=advice):
        load_dataset_by_name(name, data_dir, "train", options=DatasetOptions(**options))
    name, data_dir = followed.pop("name", name), followed.pop("data_dir", data_dir)
    assert len(load_dataset_by_name(name, data_dir, "train", options=DatasetOptions(**options | followed)))
