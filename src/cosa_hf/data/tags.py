"""What a tagged dataset looks like: its columns, its class names, its tags as vectors."""

import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value


def tag_features(class_names: list[str], masks: bool = False) -> Features:
    """Columns shared by every dataset of this package.

    Args:
        class_names: the C foreground classes. Tag ``c`` is ``class_names[c]`` and has id ``c + 1`` in a mask.
        masks: add the `mask` column (ids 0 for background, 1..C, 255 for ignore).

    Example:
        >>> list(tag_features(["cat", "dog"]))
        ['image', 'labels', 'image_id']
    """
    features = {
        "image": Image(),
        "labels": List(ClassLabel(names=list(class_names))),
        "image_id": Value("string"),
    }
    if masks:
        features["mask"] = Image()
    return Features(features)


def class_names(dataset: Dataset) -> list[str]:
    """Names of the C foreground classes, in tag order.

    Raises:
        ValueError: the dataset has no `labels` column of type ``List(ClassLabel)``.

    Example:
        >>> examples = {"image": [], "labels": [], "image_id": []}
        >>> class_names(Dataset.from_dict(examples, features=tag_features(["cat", "dog"])))
        ['cat', 'dog']
    """
    labels = dataset.features.get("labels")
    if not isinstance(labels, List) or not isinstance(labels.feature, ClassLabel):
        raise ValueError(
            f"the dataset needs a column 'labels' of type List(ClassLabel(names=...)), found {labels!r} "
            f"among the columns {dataset.column_names}"
        )
    return list(labels.feature.names)


def multi_hot(labels: list[int], num_classes: int) -> torch.Tensor:
    """Tags of one image as a float vector (C,).

    Example:
        >>> multi_hot([2, 0], num_classes=4)
        tensor([1., 0., 1., 0.])
    """
    vector = torch.zeros(num_classes)
    vector[labels] = 1.0
    return vector


def without_untagged(dataset: Dataset) -> tuple[Dataset, list[str]]:
    """The images that have at least one tag, and the `image_id` of those left out.

    An image without a tag teaches nothing here: every activation map of it is emptied before it is used.
    The order of the others is kept. Nothing is written to disk.

    Raises:
        ValueError: no image has a tag.

    Example:
        >>> examples = {"image": [None, None], "labels": [[1], []], "image_id": ["a", "b"]}
        >>> dataset = Dataset.from_dict(examples, features=tag_features(["cat", "dog"]))
        >>> tagged, dropped = without_untagged(dataset)
        >>> tagged["image_id"][:], dropped
        (['a'], ['b'])
    """
    plain = dataset.with_format(None)
    tags, image_ids = plain["labels"][:], plain["image_id"][:]
    kept = [index for index, labels in enumerate(tags) if labels]
    if not kept:
        raise ValueError(f"none of the {len(dataset)} images has a tag: nothing to train on")
    if len(kept) == len(tags):
        return dataset, []
    dropped = [image_id for image_id, labels in zip(image_ids, tags, strict=True) if not labels]
    return dataset.select(kept, keep_in_memory=True), dropped
