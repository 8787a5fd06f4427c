import pytest

from cosa_hf.data import COEXISTENCE_CLASSES, class_names, load_dataset_by_name


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
