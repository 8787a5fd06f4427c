"""Colours of class ids."""

import numpy as np
import pytest
from PIL import Image

from cosa_hf.data.palette import mask_image, painted, to_palette_image, voc_palette

# As printed by the VOC devkit's VOClabelcolormap.
DEVKIT = {
    0: (0, 0, 0),
    1: (128, 0, 0),
    7: (128, 128, 128),
    8: (64, 0, 0),
    15: (192, 128, 128),
    20: (0, 64, 128),
}


def test_colours_are_the_devkits():
    palette = voc_palette()
    assert {index: palette[index] for index in DEVKIT} == DEVKIT
    assert palette[255] == (224, 224, 192)
    assert len(set(palette)) == 256


def test_a_shorter_palette_is_the_beginning_of_the_whole():
    assert voc_palette(21) == voc_palette()[:21]


@pytest.mark.parametrize("number", [0, 65537])
def test_impossible_length_is_refused(number):
    with pytest.raises(ValueError, match=str(number)):
        voc_palette(number)


def test_every_id_survives_the_file(tmp_path):
    ids = np.arange(256).reshape(16, 16)
    to_palette_image(ids).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), ids)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")).reshape(-1, 3), voc_palette())


def test_wide_ids_survive_the_file_and_have_colours_of_their_own(tmp_path):
    ids = np.arange(65536).reshape(256, 256)
    mask_image(ids, 255).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(image), ids)
    colours = np.asarray(painted(ids)).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == 65536
    np.testing.assert_array_equal(colours[:256], voc_palette())


@pytest.mark.parametrize(("classes", "mode"), [(1, "P"), (254, "P"), (255, "I;16"), (65534, "I;16")])
def test_how_many_bits_a_mask_has_is_decided_by_the_classes(classes, mode):
    assert mask_image(np.array([[0, 1]]), classes).mode == mode


def test_more_classes_than_sixteen_bits_hold_are_refused():
    with pytest.raises(ValueError, match="hold 65534 classes, got 65535"):
        mask_image(np.array([[0, 1]]), 65535)


@pytest.mark.parametrize("ids", [np.array([[256]]), np.array([[-1]]), np.zeros((1, 2, 2), int)])
def test_what_is_no_mask_is_refused(ids):
    with pytest.raises(ValueError, match=r"0\.\.255|shape"):
        to_palette_image(ids)
