"""What a reader has to be told about data that is not in one of the official layouts."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class DatasetOptions:
    """Options of the readers "folder" and "hub"; recipes and scripts have them as flags of the same names.

    Example:
        >>> DatasetOptions(dataset_name="org/pets", label_column="label").image_column
        'image'
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "hub: name on the Hub (org/name), or a local path that load_dataset takes"}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "hub: which configuration, where it has several"}
    )
    image_column: str = field(default="image", metadata={"help": "hub: column of the images"})
    label_column: str = field(default="labels", metadata={"help": "hub: column of the tags"})
    mask_column: str = field(default="mask", metadata={"help": "hub: column of the masks, for evaluation"})
    classes: list[str] | None = field(
        default=None,
        metadata={"help": "folder, hub: the classes in the order of their ids; without, all tags found, sorted"},
    )


__all__ = ["DatasetOptions"]
