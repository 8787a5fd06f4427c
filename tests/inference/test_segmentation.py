"""One image and its maps."""

import pytest

from cosa_hf.inference import crf_size


@pytest.mark.parametrize(
    ("size", "labels", "expected"),
    [
        ((500, 375), 21, (500, 375)),  # VOC
        ((640, 480), 81, (640, 480)),  # COCO
        ((4000, 3000), 21, (653, 490)),
        ((8000, 6000), 2, (653, 490)),
        ((640, 480), 1001, (206, 155)),
    ],
)
def test_the_size_of_a_crf_is_bounded_and_keeps_the_shape(size, labels, expected):
    assert crf_size(size, labels) == expected
