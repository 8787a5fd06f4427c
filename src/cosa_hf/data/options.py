"""What a reader has to be told about a dataset."""

import math
from dataclasses import dataclass
from typing import Literal

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
class PictureConfig(Settings):
    """What values and bands of image files become colours; photos need neither.

    Raises:
        ValueError: what is not a range, or neither one nor three bands; the message names it.

    Example:
        >>> PictureConfig(value_range=[0, 4095]).asked_range
        (0.0, 4095.0)
    """

    _argument_group_name = "Pictures of more than 8 bits, or of several bands"

    value_range: list[str] = setting(
        ["auto"],
        "what values of more than 8 bits are scaled from: LOW HIGH, the same for all images; auto: found over the "
        "images; window: that of each DICOM file",
    )
    bands: list[int] | None = setting(
        None, "one or three bands, from 1, that are grey or red, green and blue; default: the file's own", least=1
    )

    def __post_init__(self) -> None:
        words = self.value_range if isinstance(self.value_range, list | tuple) else str(self.value_range).split()
        self.value_range = [str(word) for word in words]  # YAML reads numbers
        super().__post_init__()
        _ = self.asked_range
        if self.bands is not None and len(self.bands) not in (1, 3):
            raise ValueError(f"bands must be one number or three, got {self.bands}")

    @property
    def asked_range(self) -> tuple[float, float] | Literal["auto", "window"]:
        """The value range that the words say."""
        if self.value_range == ["auto"]:
            return "auto"
        if self.value_range == ["window"]:
            return "window"
        try:
            low, high = map(float, self.value_range)
            if not -math.inf < low < high < math.inf:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"value_range must be auto, window, or two numbers LOW HIGH, got {' '.join(self.value_range)}"
            ) from None
        return low, high


@dataclass(kw_only=True)
class DataConfig(DatasetOptions, PictureConfig):
    """Where a run's images come from, and what it is evaluated on."""

    dataset: str = setting("voc", "voc, coco, folder, hub, or shapes (the demo set)")
    data_dir: str | None = setting(None, "root of the dataset, e.g. VOCdevkit/VOC2012")
    eval_split: str = setting("val", "split whose masks are compared with, if eval_every > 0")


__all__ = ["DataConfig", "DatasetOptions", "PictureConfig"]
