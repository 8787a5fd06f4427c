"""Small datasets of drawn images on disk, in layouts that people have."""

import json

from cosa_hf.data import SHAPES_CLASSES, load_shapes


def write_photos(folder, count):
    """A folder of photos with a table of their tags."""
    folder.mkdir(parents=True)
    lines = ["file_name,labels"]
    for index, row in enumerate(load_shapes("train", num_images=count)):
        row["image"].save(folder / f"{index}.png")
        lines.append(f"{index}.png,{'; '.join(SHAPES_CLASSES[label] for label in row['labels'])}")
    (folder / "metadata.csv").write_text("\n".join(lines))


def write_voc(root, splits, classes=SHAPES_CLASSES):
    """Six images with masks in the layout of VOC, in each of the splits; their tags are the first of `classes`."""
    for name in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClassAug"):
        (root / name).mkdir(parents=True)
    tags = {}
    for row in load_shapes("val", num_images=6, masks=True):
        row["image"].save(root / "JPEGImages" / f"{row['image_id']}.jpg")
        row["mask"].save(root / "SegmentationClassAug" / f"{row['image_id']}.png")
        tags[row["image_id"]] = [classes[label] for label in row["labels"]]
    (root / "image_labels.json").write_text(json.dumps(tags))
    for split in splits:
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(tags) + "\n")
