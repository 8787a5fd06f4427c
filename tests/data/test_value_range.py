"""One range for all images of a set, found by `check` and by training alike."""

import numpy as np
import pytest
from datasets import Dataset
from hostile import dicom
from PIL import Image

import cosa_hf.data.value_range
from cosa_hf.data import load_folder, load_shapes
from cosa_hf.data.check import check_splits, format_findings
from cosa_hf.data.formats import Look, Reading
from cosa_hf.data.images import UnreadableImageError
from cosa_hf.data.options import DataConfig, PictureConfig
from cosa_hf.data.tags import tag_features
from cosa_hf.data.value_range import range_of, settled_reading

VALUES = np.random.default_rng(0).integers(100, 4000, (30, 20, 20), dtype=np.uint16)


def dataset_of(tmp_path, images, ending="tif") -> Dataset:
    paths = [tmp_path / f"{number}.{ending}" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image) if isinstance(image, bytes) else Image.fromarray(image).save(path)
    columns = {"image": list(map(str, paths)), "labels": [[0]] * len(paths), "image_id": [path.stem for path in paths]}
    return Dataset.from_dict(columns, features=tag_features(["cat"]))


def settled(dataset, **options) -> tuple[Reading, list[str]]:
    said: list[str] = []
    return settled_reading(PictureConfig(**options), dataset, 0, said.append), said


def test_photos_have_no_range_and_nothing_is_said():
    assert settled(load_shapes("train", num_images=3)) == (Reading(), [])


def test_the_range_of_12_bits_in_16_and_of_floats_beyond_1(tmp_path):
    reading, said = settled(dataset_of(tmp_path, VALUES))
    low, high = reading.value_range
    assert 100 <= low < 120
    assert 3980 < high < 4000
    assert said == [f"values of more than 8 bits in 30 images looked at: --value_range {low:g} {high:g}"]
    floats = [(values / 3900).astype(np.float32) for values in VALUES]
    low, high = settled(dataset_of(tmp_path, floats))[0].value_range
    assert 1.0 < high < 1.03, "the image with 1.02 and those below 1 have one range"


def test_hot_pixels_and_a_wrong_image_do_not_make_the_range(tmp_path):
    images = [*VALUES] * 5
    images[7] = np.full((20, 20), 65535, np.uint16)
    images[8] = np.tile(images[8], (2, 2))
    images[8][3, 3] = 65535
    _, high = settled(dataset_of(tmp_path, images))[0].value_range
    assert high < 4000


def test_what_is_asked_for_is_not_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cosa_hf.data.value_range, "_looks", None)
    dataset = dataset_of(tmp_path, VALUES[:1])
    assert settled(dataset, value_range=["-160", "240"], bands=[1]) == (Reading((-160.0, 240.0), (1,)), [])
    assert settled(dataset, value_range="window")[0] == Reading("window")


def test_a_stream_is_looked_at_from_its_start(tmp_path):
    dataset = dataset_of(tmp_path, VALUES)
    assert settled(dataset.to_iterable_dataset())[0] == settled(dataset)[0]


def test_windows_of_all_files_are_taken(tmp_path):
    pytest.importorskip("pydicom")
    windowed, plain = dicom(VALUES[0], WindowCenter=2000, WindowWidth=3000), dicom(VALUES[1])
    assert settled(dataset_of(tmp_path, [windowed, windowed], "dcm"))[0].value_range == "window"
    low, high = settled(dataset_of(tmp_path, [windowed, plain], "dcm"))[0].value_range
    assert 100 <= low < high < 4000


def test_a_constant_set_has_a_range():
    assert range_of([Look(7.0, 7.0, True, None, False, (1, 1))]) == (7.0, 8.0)


def test_a_missing_library_stops_at_the_start(tmp_path, monkeypatch):
    pytest.importorskip("pydicom")
    dataset = dataset_of(tmp_path, [dicom(VALUES[0])], "dcm")
    monkeypatch.setattr(cosa_hf.data.formats, "find_spec", lambda name: None)
    with pytest.raises(UnreadableImageError, match=r"image '0' .* needs pydicom: pip install \"cosa-hf\[dicom\]\"$"):
        settled(dataset)


@pytest.mark.parametrize("words", ["automatic", "0", "0 1 2", "5 5", "9 1", "0 nan", "0 inf"])
def test_what_is_no_range(words):
    with pytest.raises(ValueError, match=f"value_range must be auto, window, or two numbers LOW HIGH, got {words}"):
        PictureConfig(value_range=words.split())


def test_ranges_of_recipes_and_flags():
    for value_range in ([0, 4095], ["0", "4095"], "0 4095"):
        assert DataConfig(value_range=value_range).asked_range == (0.0, 4095.0)
    assert DataConfig(value_range="auto").value_range == DataConfig().value_range == ["auto"]
    with pytest.raises(ValueError, match=r"bands must be one number or three, got \[1, 2\]"):
        DataConfig(bands=[1, 2])


def test_check_finds_the_range_of_training_and_what_is_black_in_it(tmp_path):
    images = [*VALUES[:28], np.zeros((20, 20), np.uint16), np.full((20, 20), 2000, np.uint16)]
    dataset = dataset_of(tmp_path, images)
    reading, _ = settled(dataset)
    found = check_splits({"train": dataset}, progress=False)
    low, high = reading.value_range
    assert found.value_range == f"--value_range {low:g} {high:g}"
    assert f"images with more than 8 bits are scaled as with {found.value_range}" in format_findings(found)
    assert found.warnings["dark"] == ["train: 28: values 0 to 0", "train: 29: values 2000 to 2000"]
    found = check_splits({"train": dataset}, progress=False, pictures=PictureConfig(value_range=[0, 65535]))
    assert len(found.warnings["dark"]) == 30, "12 bits in 16 are nearly black"
    assert not found.errors


def test_check_of_photos(tmp_path):
    images = [np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8), VALUES[0].astype(np.uint8)]
    found = check_splits({"train": dataset_of(tmp_path, images, "png")}, progress=False)
    assert found.warnings["dark"] == ["train: 0: values 0 to 0", "train: 1: values 200 to 200"]
    assert found.value_range == ""


def test_check_names_files_without_a_window_and_with_several_pages(tmp_path):
    pytest.importorskip("pydicom")
    dataset = dataset_of(tmp_path, [dicom(VALUES[0])], "dcm")
    found = check_splits({"train": dataset}, progress=False, pictures=PictureConfig(value_range="window"))
    assert found.errors["window"] == ["train: 0"]
    found = check_splits({"train": dataset}, progress=False, pictures=PictureConfig(value_range=[0, 4095]))
    assert not found.errors, "as advised"
    frame = Image.fromarray(VALUES[0].astype(np.uint8))
    frame.save(tmp_path / "0.gif", save_all=True, append_images=[frame.rotate(90)])
    dataset = Dataset.from_dict(
        {"image": [str(tmp_path / "0.gif")], "labels": [[0]], "image_id": ["0"]}, features=tag_features(["cat"])
    )
    assert check_splits({"train": dataset}, progress=False).warnings["several"] == ["train: 0"]
    assert settled(dataset)[1] == ["1 images have several pages or frames; the first of each is taken: 0"]


def test_a_folder_takes_names_of_all_formats(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("a.heic", "b.avif", "c.dcm", "d.tiff"):
        (tmp_path / "cat" / name).write_bytes(b"whatever")
    assert len(load_folder(tmp_path)) == 4
