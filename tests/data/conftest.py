import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from images_of import image_of
from PIL import Image

from cosa_hf.data.tags import tag_features

TAGS = {"2007_01": ["cat", "dog"], "2007_02": ["train"], "2007_03": ["aeroplane"]}


@pytest.fixture
def voc_dir(tmp_path: Path) -> Path:
    """Three images with tags and masks in the layout of VOC 2012; the split is called "train"."""
    root = tmp_path / "VOC2012"
    for name in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClassAug"):
        (root / name).mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(TAGS) + "\n")
    (root / "image_labels.json").write_text(json.dumps(TAGS))
    for number, image_id in enumerate(TAGS):
        image_of(20 + number, 10).save(root / f"JPEGImages/{image_id}.jpg")
        mask = Image.fromarray(np.full((10, 20 + number), number, dtype=np.uint8), mode="L").convert("P")
        mask.save(root / f"SegmentationClassAug/{image_id}.png")
    return root


@pytest.fixture
def one_image(tmp_path):
    """Makes a dataset of one image (and mask) from files."""

    def make(image_path: Path, mask_path: Path | None = None, labels=(1,)):
        columns = {"image": [str(image_path)], "labels": [list(labels)], "image_id": [Path(image_path).stem]}
        if mask_path is not None:
            columns["mask"] = [str(mask_path)]
        features = tag_features(["cat", "dog"], masks=mask_path is not None)
        return Dataset.from_dict(columns, features=features)

    return make
