"""Annotations in COCO's JSON, with classes of your own: the categories of an image's annotations are its tags."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cosa_hf.data.importers.rows import ImportOptions, Row
from cosa_hf.data.tags import parse_json, read_text


def read(path: Path, options: ImportOptions) -> Iterator[Row]:
    """The images of a JSON file.

    Raises:
        ValueError: it has no images, annotations and categories, or an annotation is of none of them.

    Example:
        >>> images, categories = '[{"id": 1, "file_name": "a.jpg"}]', '[{"id": 3, "name": "cat"}]'
        >>> annotations = '[{"id": 7, "image_id": 1, "category_id": 3}]'
        >>> text = f'{{"images": {images}, "categories": {categories}, "annotations": {annotations}}}'
        >>> _ = Path("instances.json").write_text(text)
        >>> [(row.files, row.tags) for row in read(Path("instances.json"), ImportOptions())]
        [(['a.jpg'], ['cat'])]
    """
    content = parse_json(read_text(path), path)
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        found = defaultdict(list)
        for annotation in content["annotations"]:
            if annotation["image_id"] not in files or annotation["category_id"] not in names:
                raise ValueError(f"annotation {annotation.get('id')} is of an image or category that is not listed")
            found[annotation["image_id"]].append(names[annotation["category_id"]])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not an instances file as COCO has them: {type(error).__name__}: {error}"
        ) from error
    for number, file in files.items():
        yield Row(f"{path}, image {number}", [file], options.tags(found[number]))


def recognises(path: Path) -> bool:
    """Whether a JSON file has the keys of COCO."""
    if path.suffix.lower() != ".json":
        return False
    content = parse_json(read_text(path), path)
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content)
