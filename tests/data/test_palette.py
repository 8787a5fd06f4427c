"""Colours of class ids."""

import numpy as np
import pytest
from PIL import Image

from cosa_hf.data.palette import to_palette_image, voc_palette

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


@pytest.mark.parametrize("number", [0, 257])
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


@pytest.mark.parametrize("ids", [np.array([[256]]), np.array([[-1]]), np.zeros((1, 2, 2), int)])
def test_what_is_no_mask_is_refused(ids):
    with pytest.raises(ValueError, match=r"0\.\.255|shape"):
        to_palette_image(ids)
