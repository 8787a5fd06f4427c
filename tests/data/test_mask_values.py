"""Values of masks become ids of classes."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from cosa_hf.data import DatasetOptions, load_dataset_by_name
from cosa_hf.data.images import read_mask, undecoded
from cosa_hf.data.mask_values import with_mask_values
from cosa_hf.data.tags import tag_features

BINARY = ["0=background", "255=cat"]


@pytest.fixture
def folder(tmp_path):
    """Two images of cats, whose masks hold 0 and 255."""
    lines = ["file_name,labels,mask_file_name,split"]
    for number in range(2):
        Image.new("RGB", (4, 3), (number, 0, 0)).save(tmp_path / f"{number}.png")
        mask = np.zeros((3, 4), dtype=np.uint8)
        mask[number, 1:] = 255
        Image.fromarray(mask).save(tmp_path / f"{number}_mask.png")
        lines.append(f"{number}.png,cat,{number}_mask.png,val")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    return tmp_path


def load(folder, mask_values):
    options = DatasetOptions(mask_values=mask_values)
    return undecoded(load_dataset_by_name("folder", folder, "val", masks=True, options=options))


def test_named_values_become_ids(folder):
    plain, named = load(folder, None), load(folder, BINARY)
    assert named.features == plain.features
    for number, (before, after) in enumerate(zip(plain, named, strict=True)):
        expected = np.zeros((3, 4))
        expected[number, 1:] = 1
        assert np.array_equal(read_mask(after, (4, 3), num_classes=1), expected)
        assert after["mask"]["path"] == before["mask"]["path"]  # named where it does not fit
        assert {key: after[key] for key in ("labels", "image_id")} == {
            key: before[key] for key in ("labels", "image_id")
        }


@pytest.mark.parametrize("classes", [["cat", "dog"], [f"class {number}" for number in range(998)] + ["cat", "dog"]])
def test_any_values_of_any_depth(classes):
    values = np.array([[0, 300, 7, 65535]])
    rows = {"image": [Image.new("RGB", (4, 1))], "labels": [[0]], "image_id": ["a"]}
    rows["mask"] = [Image.fromarray(values.astype(np.uint16))]
    dataset = Dataset.from_dict(rows, features=tag_features(classes, masks=True))
    named = with_mask_values(dataset, ["0=ignore", "300=dog", "7=background", "65535=cat"])
    ignored = 255 if len(classes) == 2 else 65535
    read = read_mask(undecoded(named)[0], (4, 1), len(classes))
    assert np.asarray(read).tolist() == [[ignored, classes.index("dog") + 1, 0, classes.index("cat") + 1]]


@pytest.mark.parametrize(
    ("mask_values", "message"),
    [
        (["255=cat"], r"image '0' holds the values 0, mask_values names 255: name these too, =ignore those"),
        (["0=background", "255=dog"], "'255=dog' is not VALUE=NAME, .* one of background, ignore, cat"),
        (["0=background", "white=cat"], "'white=cat' is not VALUE=NAME"),
        (["0=background", "70000=cat"], "'70000=cat' is not VALUE=NAME, a number up to 65535"),
        (["background", "255=cat"], "'background' is not VALUE=NAME"),
        ([*BINARY, "255=ignore"], "names 255 twice"),
    ],
)
def test_what_does_not_fit_is_named(folder, mask_values, message):
    with pytest.raises(ValueError, match=message):
        load(folder, mask_values)


def test_what_the_errors_advise_reads_the_masks(folder):
    """From ids that are none to a name for each value, an error at a time."""
    for number in range(2):
        values = np.array(Image.open(folder / f"{number}_mask.png"))
        values[values == 255] = 77
        values[2] = 9
        Image.fromarray(values).save(folder / f"{number}_mask.png")
    with pytest.raises(ValueError, match=r"say which: --mask_values 0=background 9=CLASS") as said:
        read_mask(load(folder, None)[0], (4, 3), num_classes=1)
    named = str(said.value).replace("CLASS", "ignore").split("--mask_values ")[1].split()
    with pytest.raises(ValueError, match=r"holds the values 77, .*: name these too, =ignore those that do not count"):
        load(folder, named)
    masks = [read_mask(row, (4, 3), num_classes=1) for row in load(folder, [*named, "77=cat"])]
    assert [np.unique(mask).tolist() for mask in masks] == [[0, 1, 255]] * 2


def test_masks_that_nobody_asks_for_are_not_read(folder):
    (folder / "0_mask.png").write_bytes(b"never opened")
    options = DatasetOptions(mask_values=BINARY)
    assert len(load_dataset_by_name("folder", folder, "val", options=options)) == 2
    with pytest.raises(ValueError, match="cannot read the mask of image '0'"):
        load(folder, BINARY)
