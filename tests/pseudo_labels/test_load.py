import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cosa_hf.data import undecoded
from cosa_hf.data.palette import to_palette_image
from cosa_hf.pseudo_labels.load import check_masks, load_pseudo_labels


@pytest.fixture
def png(export, tmp_path):
    """A copy of the PNG export that a test may spoil, and one of its masks."""
    directory = tmp_path / "export"
    shutil.copytree(export("png"), directory, symlinks=True)
    return directory, sorted((directory / "SegmentationClassAug").iterdir())[2]


def test_both_formats_hold_the_same_masks(export):
    png, parquet = (load_pseudo_labels(str(export(format))) for format in ("png", "parquet"))
    assert "confidence" in parquet.dataset.column_names
    assert png.threshold == parquet.threshold == 0.5
    for one, other in zip(png.dataset, parquet.dataset, strict=True):
        assert one["image_id"] == other["image_id"]
        assert one["labels"] == other["labels"]
        assert np.array_equal(np.array(one["mask"]), np.array(other["mask"]))
    for exported in (png, parquet):
        check_masks(exported.dataset)


def test_a_voc_layout_needs_a_split(png):
    directory, _ = png
    (directory / "export.json").unlink()
    with pytest.raises(ValueError, match="name one with train_split"):
        load_pseudo_labels(str(directory))
    exported = load_pseudo_labels(str(directory), "train")
    assert len(exported.dataset) == 6
    assert not exported.record


def test_what_is_no_finished_export_is_refused(png, tmp_path):
    directory, mask = png
    with pytest.raises(FileNotFoundError, match="is neither an export"):
        load_pseudo_labels(str(tmp_path))
    record = json.loads((directory / "export.json").read_text())
    for change, message in (
        ({"complete": False}, "was interrupted; run the same export again"),
        ({"settings": record["settings"] | {"format": "coco-json"}}, "in coco-json: export png or parquet to train on"),
        ({"settings": record["settings"] | {"classes": ["cat"]}}, "are not those it was exported with"),
    ):
        (directory / "export.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=message):
            load_pseudo_labels(str(directory))
    (directory / "export.json").write_text(json.dumps(record))
    assert len(load_pseudo_labels(str(directory)).dataset) == 6, "complete, in png, of its classes: as advised"
    mask.unlink()
    with pytest.raises(FileNotFoundError, match=mask.name):
        load_pseudo_labels(str(directory))


def renumbered(ids: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids % 2)
    image.putpalette([10, 20, 30, 40, 50, 60])
    return image


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ids: to_palette_image(ids[:-1]), "is 48x47"),
        (lambda ids: to_palette_image(ids * 0 + 77), r"holds the ids \[77\]"),
        (lambda ids: to_palette_image(ids).convert("RGB"), "has mode 'RGB'"),
        (lambda ids: to_palette_image(ids * 0 + 255), "is all 255: not one pixel"),
        (renumbered, r"in the colour \(10, 20, 30\), VOC's palette in \(0, 0, 0\)"),
    ],
    ids=["size", "class count", "mode", "nothing labelled", "palette"],
)
def test_a_mask_that_cannot_be_learned_is_named_with_its_file(png, spoil, message):
    directory, mask = png
    spoil(np.array(Image.open(mask))).save(mask)
    with pytest.raises(ValueError, match=rf"1 of 6 pseudo-labels.*\n.*{mask.name}: .*{message}"):
        check_masks(load_pseudo_labels(str(directory)).dataset)


def test_a_row_without_a_mask_is_named(export):
    dataset = undecoded(load_pseudo_labels(str(export("parquet"))).dataset)
    spoilt = dataset.map(lambda row, index: {"mask": None if index == 2 else row["mask"]}, with_indices=True)
    with pytest.raises(ValueError, match=rf"1 of 6 pseudo-labels.*\n  {dataset[2]['image_id']}: "):
        check_masks(spoilt)


@pytest.mark.parametrize("advised", ["export again", "save it as a grey image"])
def test_what_the_error_of_a_palette_advises_works(advised, png):
    directory, mask = png
    exported = mask.read_bytes()
    renumbered(np.array(Image.open(mask))).save(mask)
    with pytest.raises(ValueError, match=advised):
        check_masks(load_pseudo_labels(str(directory)).dataset)
    if advised == "export again":
        mask.write_bytes(exported)
    else:
        Image.fromarray(np.array(Image.open(mask))).convert("L").save(mask)
    check_masks(load_pseudo_labels(str(directory)).dataset)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"complete": true, "settings": {}}', '{"complete": 1, "settings": {"format": "png"}}']
)
def test_a_damaged_record_of_an_export_is_named(tmp_path, text):
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(ValueError, match=r"export\.json is not as an export writes it"):
        load_pseudo_labels(str(tmp_path))
