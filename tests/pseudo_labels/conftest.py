import numpy as np
import pytest
from datasets import Dataset
from pets import CLASSES
from PIL import Image
from tiny import square, tiny_cosa

from cosa_hf.data.tags import tag_features
from cosa_hf.inference import Segmenter

SIZES = {"plain": (40, 30), "IMG 12%": (31, 44), "pets/übung": (24, 24), "turned": (50, 20), "long": (20_000, 20)}


@pytest.fixture(scope="session")
def model():
    return tiny_cosa(CLASSES, cam_threshold=0.4, affinity="features", affinity_layer=-3)


@pytest.fixture
def segmenter(model):
    return Segmenter(model, square(64), batch_size=2)


@pytest.fixture
def columns(tmp_path):
    """Five images in files: a blank, a slash, an umlaut in their ids; one lies on its side; one is 1,000 times as wide
    as it is high."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(SIZES.values()):
        colours = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if list(SIZES)[number] == "turned" else 1  # 6: show turned by a quarter
        image.save(folder / f"{number}.jpg", exif=exif)
        paths.append(str(folder / f"{number}.jpg"))
    return {"image": paths, "labels": [[0], [1, 2], [0, 1, 2], [2], [1]], "image_id": list(SIZES)}


@pytest.fixture
def dataset(columns):
    return Dataset.from_dict(columns, features=tag_features(CLASSES))
