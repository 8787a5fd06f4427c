"""What a reader has to be told about a dataset."""

from dataclasses import dataclass

from cosa_hf.settings import Settings, setting


@dataclass(kw_only=True)
class DatasetOptions(Settings):
    """Options of the readers, most of "folder" and "hub"; recipes and commands have them as flags of the same names.

    Example:
        >>> DatasetOptions(dataset_name="org/pets", label_column="label").image_column
        'image'
    """

    _argument_group_name = "Dataset"

    dataset_name: str | None = setting(None, "hub: name on the Hub (org/name), or a local path that load_dataset takes")
    dataset_config: str | None = setting(None, "hub: which configuration, where it has several")
    image_column: str = setting("image", "hub: column of the images")
    label_column: str = setting("labels", "hub: column of the tags")
    mask_column: str = setting("mask", "hub: column of the masks, for evaluation")
    classes: list[str] | None = setting(
        None, "folder, hub: the classes in the order of their ids; default: all tags found, sorted"
    )
    mask_values: list[str] | None = setting(
        None,
        "what values in masks mean where they are not ids of classes, VALUE=NAME each, such as 0=background 255=cat; "
        "NAME is a class, background or ignore",
    )


@dataclass(kw_only=True)
class DataConfig(DatasetOptions):
    """Where a run's images come from, and what it is evaluated on."""

    dataset: str = setting("voc", "voc, coco, folder, hub, or shapes (the demo set)")
    data_dir: str | None = setting(None, "root of the dataset, e.g. VOCdevkit/VOC2012")
    eval_split: str = setting("val", "split whose masks are compared with, if eval_every > 0")


__all__ = ["DataConfig", "DatasetOptions"]
