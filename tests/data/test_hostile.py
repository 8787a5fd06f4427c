"""Damaged files: no reader crashes, passes one over in silence or fills the memory, and all agree on them."""

import resource
import sys

import pytest
from hostile import bomb, readers_on

from cosa_hf.data.images import UnreadableImageError, open_image

#: Those of the first 10,000 that were read amiss once.
FOUND_ONCE = (1244, 6009)  # a damaged EXIF block
MOST_GROWTH = 2.5e9  # bytes


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.filterwarnings("ignore")  # Pillow has much to say of such files
def test_every_reader_reads_or_refuses_by_name(tmp_path):
    before = peak()
    refused = readers_on([*range(300), *FOUND_ONCE], tmp_path)
    assert refused["check"] == refused["training"] == refused["predict"]
    assert 60 < len(refused["check"]) < 240, "some are damaged beyond reading, and some are not"
    assert peak() - before < MOST_GROWTH


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_bombs_are_refused_before_they_grow(tmp_path, number):
    (tmp_path / "bomb").write_bytes(bomb(number))
    before = peak()
    with pytest.raises(UnreadableImageError, match="bomb"):
        open_image(tmp_path / "bomb")
    assert peak() - before < 2e8
